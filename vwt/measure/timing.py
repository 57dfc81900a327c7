"""Wall time of calls that are compared, measured interleaved."""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from vwt.errors import ArgumentError
from vwt.progress import progress_bar

TIMED, TIMED_RUNS = 8, 12  # batches on which latency is measured, and runs of each


def measure_latency(
    model: Callable[[Tensor], Any],
    reduced: Sequence[Callable[[Tensor], Any]],
    images: Tensor,
    batch_size: int,
    *,
    seed: int = 0,
    progress: bool = True,
) -> list["Latency"]:
    """The latency of a model and of its reduced versions, interleaved in one run.

    Args:
        model: first in the result.
        reduced: the versions that are compared with it.
        images: (n, C, H, W), of which the first batches are taken.
        batch_size: images at a time.
        seed: of the order.
        progress: show a progress bar.

    Raises:
        ArgumentError: if the images do not fill a batch.
    """
    if len(images) < batch_size:
        raise ArgumentError(f"{len(images)} images do not fill a batch of {batch_size}; give more")
    batches = [batch for batch in images[: TIMED * batch_size].split(batch_size) if len(batch) == batch_size]
    return measure_batches([model, *reduced], batches, device=images.device, seed=seed, progress=progress)


def measure_batches(
    modules: Sequence[Callable[[Any], Any]],
    batches: Sequence[Any],
    *,
    device: torch.device,
    seed: int = 0,
    progress: bool = True,
) -> list["Latency"]:
    """The latency of modules on each of the batches, interleaved in one run; ratios are to the first module."""
    calls: list[Calls] = [{"run": on_batches(module, batches)} for module in modules]
    with torch.inference_mode():
        seconds = interleave(calls, len(batches), TIMED_RUNS, device=device, seed=seed, progress=progress)
    return [_latency(timed["run"], seconds[0]["run"]) for timed in seconds]


class Latency(NamedTuple):
    """The latency of a module.

    Attributes:
        milliseconds: a batch; the median over batches of the median over runs.
        ratio: of that to the model's, batch by batch.
        bounds: between which the median ratio of single runs lies, with a confidence of 95 %.
    """

    milliseconds: float
    ratio: float
    bounds: tuple[float, float]


def _latency(own: np.ndarray, model: np.ndarray) -> Latency:
    """Of seconds (batches, runs) of a module and of the model."""
    medians, ratios = np.median(own, axis=1), np.sort((own / model).ravel())
    reach = round(1.96 * math.sqrt(len(ratios)) / 2)  # order statistics: half of the runs are below the median
    middle = len(ratios) // 2
    low, high = ratios[max(middle - reach, 0)], ratios[min(middle + reach, len(ratios) - 1)]
    ratio = np.median(medians / np.median(model, axis=1))
    return Latency(1e3 * float(np.median(medians)), float(ratio), (float(low), float(high)))


class Stopwatch:
    """Accumulates wall time by part.

    Attributes:
        seconds: so far, by part.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time of the `with` block to this part."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begin


WARMUP = 5  # items on which every call runs before the first is timed


# Calls that are timed, by role; each takes the index of an item. Those of one group run right after each other.
Calls: TypeAlias = dict[str, Callable[[int], Any]]


# Seconds (items, runs), by role.
Seconds: TypeAlias = dict[str, np.ndarray]


def on_batches(module: Callable[..., Any], batches: Sequence[Any]) -> Callable[[int], Any]:
    """A call that takes the index of a batch and runs the module on it."""
    return lambda item: module(batches[item])


def interleave(
    groups: Sequence[Calls],
    items: int,
    runs: int,
    *,
    device: torch.device | None = None,
    warmup: int = WARMUP,
    seed: int = 0,
    progress: bool = True,
) -> list[Seconds]:
    """Wall time of each call on each item, interleaved.

    The calls of a group run right after each other on the same item, in an order that is reversed from one run to the
    next; the order of the groups is random each time. So a drift of the machine's speed affects all of them alike.

    Args:
        groups: calls by role, each of which takes the index of an item.
        items: number of items.
        runs: on each item.
        device: that is synchronised before and after each call, if it is a GPU.
        warmup: items on which every call runs twice before the first is timed.
        seed: of the order.
        progress: show a progress bar.

    Returns:
        Seconds (items, runs) by role, for each group.
    """
    rng = random.Random(seed)
    seconds = [{role: np.zeros((items, runs)) for role in calls} for calls in groups]
    warm = [item for item in range(min(warmup, items)) for _ in range(2)]
    with progress_bar(total=len(warm) + items * runs, desc="timing", unit="round", show=progress) as bar:
        for item in warm:
            for calls in groups:
                for call in calls.values():
                    call(item)
            bar.update()
        for run in range(runs):
            for item in range(items):
                for index in rng.sample(range(len(groups)), len(groups)):
                    roles = list(groups[index])
                    for role in roles if (run + item) % 2 else reversed(roles):
                        seconds[index][role][item, run] = time_call(groups[index][role], item, device)
                bar.update()
    return seconds


def time_call(call: Callable[[int], Any], item: int, device: torch.device | None = None) -> float:
    """Seconds of one call."""
    cuda = device is not None and device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call(item)
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
