"""Shards on Ray: actors that each hold the model's projection, on any number of machines."""

import logging
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vwt.codebook.passes import Done
from vwt.errors import ArgumentError, CodebookError, VWTError, first_line

# How often a shard is begun again when its worker is lost.
_RETRIES = 3

_SECONDS = 10.0  # in which a cluster must answer

# How HTTP/2, and with it gRPC, begins (RFC 9113, section 3.4): the server answers with a frame of the same type.
_SETTINGS = b"\0\0\0\4\0\0\0\0\0"
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS


def run_ray(work: Any, shards: Sequence[int], workers: int | None, address: str | None, gpus: float) -> Iterator[Done]:
    """Work on all shards with actors of a Ray cluster; see `Engine`."""
    ray = import_ray()
    from ray.util import ActorPool

    with _connected(ray, address):
        actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=_RETRIES)(_Worker)
        shared = ray.put(work)
        actors: list[Any] = [actor.remote(shared) for _ in range(min(_number(ray, workers, gpus), len(shards)))]
        lost = 0
        try:
            for done in ActorPool(actors).map_unordered(lambda one, shard: one.work_on.remote(shard), list(shards)):
                if done.restarted:
                    lost += 1
                    warnings.warn(f"a worker was lost, {lost} so far; its shard was begun again", stacklevel=2)
                yield done
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, VWTError | OSError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            raise CodebookError(f"Ray lost its workers: {first_line(error)}; go on with --resume") from error
        finally:
            for one in actors:
                ray.kill(one)


class _Worker:
    """An actor; Ray starts it anew where it is lost."""

    def __init__(self, work: Any) -> None:
        import ray

        self.restarted = ray.get_runtime_context().was_current_actor_reconstructed
        torch.set_num_threads(1)
        self.work = work
        if ray.get_gpu_ids():
            work.features.to(torch.device("cuda"))

    def work_on(self, shard: int) -> Done:
        done = next(iter(self.work([shard])))
        done.restarted, self.restarted = self.restarted, False
        return done


def import_ray() -> Any:
    """Ray, or one line that says how to get it."""
    try:
        import ray
    # What Ray imports in turn may raise anything: amdsmi, which comes with zeus, raises KeyError without ROCm.
    except Exception as error:
        raise ArgumentError(
            f"the engine ray cannot be imported ({type(error).__name__}: {first_line(error)}); install vwt[ray] with "
            "the versions of constraints.txt, or take the engine local"
        ) from error
    return ray


@contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """Connected to a cluster: the one that this process has joined, or for as long as it is needed."""
    if ray.is_initialized():
        yield
        return
    _check_answers(address)
    try:
        ray.init(
            address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=None if address else False
        )
    # Ray raises ConnectionError, ValueError, RuntimeError and others of its own.
    except Exception as error:
        raise CodebookError(
            f"no Ray cluster answers at {address or 'this machine'}: {first_line(error)}; start one with "
            "`ray start --head`, or leave --address out"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str | None) -> None:
    """Raise CodebookError unless a server of Ray's protocol, gRPC, is at HOST:PORT; Ray itself waits for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                connection.sendall(_PREFACE)
                if connection.recv(len(_SETTINGS))[3:4] != _SETTINGS[3:4]:
                    raise ConnectionError("something else listens there")
    except OSError as error:
        raise CodebookError(
            f"no Ray cluster answers at {address}: {error.strerror or error}; start one with "
            "`ray start --head`, or leave --address out"
        ) from error


def _number(ray: Any, workers: int | None, gpus: float) -> int:
    """Workers that the cluster has room for; raises ArgumentError if more are asked for."""
    have = ray.cluster_resources()
    room = int(have.get("CPU", 0))
    if gpus:
        room = min(room, int(have.get("GPU", 0) / gpus))
    if workers is None:
        workers = max(1, room)
    if workers > room:
        raise ArgumentError(
            f"{workers} workers need {workers} processors" + (f" and {workers * gpus:g} GPUs" if gpus else "") + f", "
            f"the Ray cluster has {have.get('CPU', 0):g} and {have.get('GPU', 0):g}; give fewer with --num-workers"
        )
    return workers
