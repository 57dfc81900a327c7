"""Latency in several runtimes, each in a process of its own, as their thread pools disturb each other.

`latency.py --runtime` has a row for each runtime and precision, with its own full model and limits. A limit is the same
model's blocks on as many tokens as the variant has, in the same blocks; the tokens are the first ones, for nothing.
`fidelity.py --runtime` has columns of each runtime.
"""

import argparse
import copy
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import peers
import torch
from harness import Bench
from peers._peer import Attended
from results import Row, ratio
from torch import Tensor, nn
from variants import FULL, OURS, PEERS, Variant, choose, registry

from vwt import Absorb, IntraImage, Neighbours, PruningSchedule, VWTokenizer
from vwt.errors import ArgumentError, VWTError, first_line
from vwt.export.formats import Run
from vwt.export.runtimes import PRECISIONS, RUNTIMES, check_runtime, run_in, run_module, written_in
from vwt.measure.timing import on_batches

LIMIT = "limit of "


@dataclass(frozen=True)
class Reduced:
    """A variant, and the patches that its limit has fewer; it has a limit if these are given.

    Attributes:
        name: of its columns.
        options: of VWTokenizer.
        before: share of the patches that are gone before the first block.
        removed: patches that go inside, by block.
    """

    name: str
    options: Mapping[str, Any]
    before: float = 0.0
    removed: Mapping[int, int] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """Of the table."""
        return [self.name, LIMIT + self.name] if self.before or self.removed else [self.name]


VARIANTS = [
    Reduced("Absorb(98)", {"schedule": PruningSchedule({3: Absorb(98)})}, removed={3: 98}),
    Reduced("Neighbours(0.33)", {"strategy": Neighbours(0.33)}),
    Reduced("IntraImage(0.5)", {"strategy": IntraImage(0.5)}, before=0.5),
]
COLUMNS = {"runtime": "", "precision": "", "full_ms": ".2f"}
COLUMNS |= {name: ".3f" for each in VARIANTS for name in each.columns} | {"note": ""}


def runtime_and_precisions(text: str) -> list[tuple[str, str]]:
    """`openvino:bfloat16`, `openvino` (both precisions) or `all`, for argparse."""
    runtime, _, precision = text.partition(":")
    found = [
        (one, other) for one in RUNTIMES for other in PRECISIONS if runtime in (one, "all") and precision in (other, "")
    ]
    if not found:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not RUNTIME[:PRECISION], with RUNTIME one of all, {', '.join(RUNTIMES)}, and PRECISION one "
            f"of {', '.join(PRECISIONS)}"
        )
    return found


def measure(bench: Bench) -> list[Row]:
    """A row for each runtime and precision of --runtime; what cannot be had is a row with a note."""
    pairs = list(dict.fromkeys(pair for pairs in bench.arguments.runtime for pair in pairs))
    return [
        {"runtime": runtime, "precision": precision} | as_row(timed)
        for (runtime, precision), timed in zip(pairs, time_apart(bench, pairs, limited), strict=True)
    ]


@dataclass
class Timed:
    """What was measured in a runtime, by the names of variants.

    Attributes:
        seconds: (batches, runs) of each; empty if the full model could not be had.
        notes: why the others could not.
    """

    seconds: dict[str, np.ndarray] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def as_row(timed: Timed) -> Row:
    """Milliseconds of the full model, all else as a ratio to it, and a note where something could not be had."""
    row: Row = {}
    for name, seconds in timed.seconds.items():
        full = timed.seconds[FULL]
        row |= {"full_ms": 1e3 * float(np.median(full))} if name == FULL else {name: ratio(seconds, full)}
    for note in list(timed.notes.values())[:1]:
        row["note"] = note
    return row


# Ways to open what is timed, by the names of variants, for a bench, a runtime, a precision and images of an example.
Openers: TypeAlias = Callable[[Bench, str, str, Tensor], Iterator[tuple[str, Callable[[], Run]]]]


def time_apart(bench: Bench, pairs: Sequence[tuple[str, str]], openers: Openers) -> list[Timed]:
    """What is measured in runtimes and precisions; some are opened at once, each is timed alone."""
    measured = [Apart(runtime, precision) for runtime, precision in pairs]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda own: own.open(bench, openers), measured))
    return [own.time() for own in measured]


class Apart:
    """A process that models are measured in, in a runtime and precision.

    Args:
        runtime: see `run_in`.
        precision: see `run_in`.
    """

    def __init__(self, runtime: str, precision: str) -> None:
        self.runtime, self.precision = runtime, precision
        self.timed = Timed()
        self.process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def open(self, bench: Bench, openers: Openers) -> None:
        """Start the process, in which everything is exported or compiled, and called once."""
        try:
            check_runtime(self.runtime, self.precision, bench.device)
            if self.precision == "bfloat16" and not has_bfloat16():
                raise ArgumentError(
                    "this CPU has no instructions for bfloat16, which takes many times as long as float32"
                )
            opened = self.process.submit(open_here, bench.arguments, self.runtime, self.precision, openers)
            self.timed.notes |= opened.result()
        except (VWTError, RuntimeError, BrokenProcessPool) as error:
            self.timed.notes[FULL] = not_measured(error)

    def time(self) -> Timed:
        """What was measured; the process ends."""
        with self.process:
            if FULL not in self.timed.notes:
                self.timed.seconds |= self.process.submit(time_here).result()
        return self.timed


def not_measured(error: Exception) -> str:
    """As a note says it."""
    return f"not measured: {first_line(error)}"


def has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16, as far as Linux says."""
    path = Path("/proc/cpuinfo")
    return not path.exists() or "bf16" in path.read_text()


# -- in such a process -------------------------------------------------------------------------------------------------

_here: list[tuple[Bench, dict[str, Run]]] = []  # what a process was started for


def open_here(arguments: argparse.Namespace, runtime: str, precision: str, openers: Openers) -> dict[str, str]:
    """Open everything, and call it once, which is when torch compiles; notes on what cannot be had, by name."""
    bench = Bench.open(arguments, [])
    example, opened, notes = bench.batches()[0], {}, {}
    for name, opener in openers(bench, runtime, precision, example):
        try:
            opened[name] = opener()
            with torch.inference_mode():
                opened[name](example)
        except (VWTError, RuntimeError) as error:
            opened.pop(name, None)
            notes[name] = not_measured(error)
    _here.append((bench, opened))
    return notes


def time_here() -> dict[str, np.ndarray]:
    """Seconds (batches, runs) by name."""
    bench, opened = _here.pop()
    batches = bench.batches()
    with torch.inference_mode():
        seconds = bench.time([{"actual": on_batches(run, batches)} for run in opened.values()], len(batches))
    return {name: own["actual"] for name, own in zip(opened, seconds, strict=True)}


def limited(bench: Bench, runtime: str, precision: str, example: Tensor) -> Iterator[tuple[str, Callable[[], Run]]]:
    """The full model, and each of VARIANTS with its limit."""
    model, dtype = bench.model, getattr(torch, written_in(runtime, precision))
    yield FULL, partial(run_in, runtime, precision, model, example)
    for variant in VARIANTS:
        yield variant.name, partial(run_in, runtime, precision, VWTokenizer(model, **variant.options), example)
        if LIMIT + variant.name in variant.columns:
            limit = Limit(model, variant.before, variant.removed, dtype)
            yield LIMIT + variant.name, partial(run_module, runtime, precision, limit, example)


def registered(bench: Bench, runtime: str, precision: str, example: Tensor) -> Iterator[tuple[str, Callable[[], Run]]]:
    """The variants that `fidelity.py` compares, but those whose weights are quantised."""
    for variant in choose(registry(bench), bench.arguments.only):
        if variant.group in (FULL, *OURS, *PEERS):
            yield variant.name, partial(open_variant, variant, runtime, precision, example)


def open_variant(variant: Variant, runtime: str, precision: str, example: Tensor) -> Run:
    """A variant in a runtime; see `run_in`."""
    module: Any = variant.build()
    return (run_module if isinstance(module, peers.Peer) else run_in)(runtime, precision, module, example)


class Cut(peers.Peer):
    """Removes the last patches, for nothing."""

    @staticmethod
    def most(patches: int) -> int:
        """See `Peer`."""
        return patches

    def reduce(self, block: int, attended: Attended, tokens: Tensor, left: int) -> tuple[Tensor, None]:
        """See `Peer`."""
        return tokens[:, :left], None


class Limit(nn.Module):
    """The model on fewer tokens, from images (B, C, H, W) float32 to its answer (B, classes) float32.

    As in VWTokenizer, the last MLP is spared all but the class token.

    Args:
        model: see `peers.check_model`.
        before: share of the patches that is gone before the first block.
        removed: patches that go inside, by block.
        dtype: what it computes in.
    """

    def __init__(self, model: Any, before: float, removed: Mapping[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        peers.check_model(model)
        patches = model.patch_embed.num_patches
        self.entering = 1 + patches - int(patches * before + 1e-9)
        last = {len(model.blocks) - 1: patches}
        self.cut = Cut(copy.deepcopy(model).to(dtype), {**removed, **last})
        self.dtype = dtype
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """See above."""
        model = self.cut.model
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images.to(self.dtype))))
        return self.cut.run(tokens[:, : self.entering]).float()
