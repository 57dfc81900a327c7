"""Where shards are worked on: in this process, in processes of this machine, or on Ray.

The work itself and its results are the same (`vwt.codebook.passes`); the standard library and Ray divide it among
workers, and do again what a lost worker was at.
"""

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vwt.codebook.passes import Done
from vwt.errors import ArgumentError, CodebookError

ENGINES = ("local", "ray")

# How often in a row all workers may be lost before any shard is done.
_TRIES = 3

Work = Callable[[Iterable[int]], Iterator[Done]]


@dataclass(frozen=True)
class Engine:
    """Who works on shards.

    Attributes:
        kind: "local" or "ray".
        workers: how many; by default this process alone, or as many as the cluster has processors (GPUs, where each
            worker takes some).
        address: of a Ray cluster; by default the one that runs on this machine, or a new one.
        gpus: that each worker of Ray takes; a part of one is possible.
    """

    kind: Literal["local", "ray"] = "local"
    workers: int | None = None
    address: str | None = None
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ENGINES:
            raise ArgumentError(f"engine is {self.kind!r}; expected one of {', '.join(ENGINES)}")
        if self.workers is not None and self.workers < 1:
            raise ArgumentError(f"num_workers is {self.workers}; expected at least 1")
        if self.gpus < 0:
            raise ArgumentError(f"gpus_per_worker is {self.gpus}; expected 0 or more")
        if self.kind == "local" and (self.address is not None or self.gpus):
            raise ArgumentError("address and gpus_per_worker are of Ray; leave them out, or take the engine ray")

    @property
    def alone(self) -> bool:
        """Whether this process does all the work."""
        return self.kind == "local" and self.workers in (None, 1)

    def run(self, work: Work, shards: Sequence[int]) -> Iterator[Done]:
        """Work on all shards; yields each when its result is written.

        Raises:
            CodebookError: if workers are lost again and again, or Ray cannot be reached; and whatever `work` raises.
        """
        if self.alone:
            return work(shards)
        if self.kind == "local":
            return _run_processes(work, shards, self.workers or 1)
        from vwt.codebook.ray_engine import run_ray

        return run_ray(work, shards, self.workers, self.address, self.gpus)


def _run_processes(work: Work, shards: Sequence[int], workers: int) -> Iterator[Done]:
    """In processes of this machine; those that are lost are replaced."""
    left, failures = list(shards), 0
    with tempfile.TemporaryDirectory(prefix="vwt-work-") as scratch:
        # In a file, since a process is not started before it has read all that its pipe does not hold.
        shared = Path(scratch, "work")
        shared.write_bytes(pickle.dumps(work))
        while left:
            others = set(multiprocessing.active_children())
            pool = ProcessPoolExecutor(min(workers, len(left)), multiprocessing.get_context("spawn"), _begin, (shared,))
            try:
                for future in as_completed([pool.submit(_work_on, shard) for shard in left]):
                    done = future.result()
                    left.remove(done.shard)
                    failures = 0
                    yield done
            except BrokenProcessPool as error:
                failures += 1
                if failures == _TRIES:
                    raise CodebookError(
                        f"workers were lost {_TRIES} times before any finished a shard; is there enough memory? Take "
                        "fewer with --num-workers, and go on with --resume"
                    ) from error
                warnings.warn(f"a worker was lost; {len(left)} shards are left and given to new ones", stacklevel=2)
                # The pool does not end a worker that it was just starting, but would wait for it.
                for child in set(multiprocessing.active_children()) - others:
                    child.kill()
            finally:
                pool.shutdown(cancel_futures=True)


_work: Work | None = None


def _begin(shared: Path) -> None:
    """Make this process a worker that ends with the one that started it."""
    global _work
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of each
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _work = pickle.loads(shared.read_bytes())


def _end_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)


def _work_on(shard: int) -> Done:
    assert _work is not None  # set by `_begin`
    return next(iter(_work([shard])))
