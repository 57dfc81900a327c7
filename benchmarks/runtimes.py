"""Latency in several runtimes, each in a process of its own, as their thread pools disturb each other.

`latency.py --runtime` has a row for each runtime and precision, with its own full model and limits. A limit is the same
model's blocks on as many tokens as the variant has, in the same blocks; the tokens are the first ones, for nothing.
`fidelity.py --runtime` adds a column for each runtime.
"""

import argparse
import copy
import multiprocessing
import os
from collections.abc import Callable, Collection, Mapping, Sequence
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
from variants import FULL, QUANTISED, registry

from vwt import Absorb, IntraImage, Neighbours, PruningSchedule, VWTokenizer
from vwt.errors import ArgumentError, first_line
from vwt.export.formats import Run
from vwt.export.runtimes import PRECISIONS, RUNTIMES, check_runtime, run_in, run_module, written_in
from vwt.measure.timing import on_batches
from vwt.tokens.patches import Space

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
    """A row for each runtime and precision of --runtime, with a note on what cannot be had."""
    pairs = list(dict.fromkeys(pair for pairs in bench.arguments.runtime for pair in pairs))
    timed = time_in_processes(bench.arguments, bench.device, pairs, with_limits)
    return [
        {"runtime": runtime, "precision": precision} | as_row(own)
        for (runtime, precision), own in zip(pairs, timed, strict=True)
    ]


@dataclass
class Timed:
    """What was measured in a runtime, by the names of variants.

    Attributes:
        seconds: (batches, runs) of each.
        notes: why others were not measured; under FULL, why nothing was.
    """

    seconds: dict[str, np.ndarray] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def as_row(timed: Timed) -> Row:
    """Milliseconds of the full model, all else as a ratio to it, and why a column has none."""
    row: Row = {}
    for name, seconds in timed.seconds.items():
        full = timed.seconds[FULL]
        row |= {"full_ms": 1e3 * float(np.median(full))} if name == FULL else {name: ratio(seconds, full)}
    if timed.notes:
        row["note"] = "; ".join(note if name == FULL else f"{name} {note}" for name, note in timed.notes.items())
    return row


# From a bench, and the precision that weights are written in, to what makes each model, by the names of variants.
Models: TypeAlias = Callable[[Bench, torch.dtype], Mapping[str, Callable[[], nn.Module]]]


def time_in_processes(
    arguments: argparse.Namespace,
    device: torch.device,
    pairs: Sequence[tuple[str, str]],
    models: Models,
    words: Sequence[tuple[Space, int]] = (),
) -> list[Timed]:
    """Latency in each of `pairs`, a runtime and a precision; some are opened at once, each is timed alone.

    Args:
        arguments: the options.
        device: what they name.
        pairs: see `run_in`.
        models: a function of a module, which processes import.
        words: see `Bench.open`.
    """
    processes = [RuntimeProcess(runtime, precision) for runtime, precision in pairs]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda process: process.open(arguments, device, models, words), processes))
    return [process.time() for process in processes]


class RuntimeProcess:
    """A process that measures models in a runtime and precision.

    Args:
        runtime: see `run_in`.
        precision: see `run_in`.
    """

    def __init__(self, runtime: str, precision: str) -> None:
        self.runtime, self.precision = runtime, precision
        self.timed = Timed()
        self.process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def open(
        self,
        arguments: argparse.Namespace,
        device: torch.device,
        models: Models,
        words: Sequence[tuple[Space, int]],
    ) -> None:
        """Start the process, in which everything is exported or compiled, and called once; see `time_in_processes`."""
        try:
            check_runtime(self.runtime, self.precision, device)
            if self.precision == "bfloat16" and not has_bfloat16():
                raise ArgumentError(
                    "this CPU has no instructions for bfloat16, which takes many times as long as float32"
                )
        except ArgumentError as error:
            self.timed.notes[FULL] = not_measured(error)
            return
        self.timed.notes |= self._ask(open_here, arguments, self.runtime, self.precision, models, words)

    def time(self) -> Timed:
        """What was measured; the process ends."""
        with self.process:
            if FULL not in self.timed.notes:
                self.timed.seconds |= self._ask(time_here)
        return self.timed

    def _ask(self, function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        """What a function gives in the process; nothing, and a note, where it fails."""
        try:
            return self.process.submit(function, *arguments).result()
        except BrokenProcessPool:
            note = "not measured: its process died, of a crash or for lack of memory; measure fewer, with --only"
        except Exception as error:  # of whichever runtime
            note = not_measured(error)
        self.timed.notes[FULL] = note
        return {}


def not_measured(error: Exception) -> str:
    """As a note says it."""
    return f"not measured: {first_line(error)}"


def has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16, as far as Linux says."""
    path = Path("/proc/cpuinfo")
    return not path.exists() or "bf16" in path.read_text()


# -- in such a process -------------------------------------------------------------------------------------------------

_here: list[tuple[Bench, dict[str, Run]]] = []  # what a process was started for


def open_here(
    arguments: argparse.Namespace, runtime: str, precision: str, models: Models, words: Sequence[tuple[Space, int]]
) -> dict[str, str]:
    """Open everything, and call it once, which is when torch compiles; why something cannot be had, by name."""
    bench = Bench.open(arguments, words)
    example = bench.batches()[0]
    runs: dict[str, Run] = {}
    notes: dict[str, str] = {}
    for name, build in models(bench, getattr(torch, written_in(runtime, precision))).items():
        try:
            run = open_in(runtime, precision, build(), example)
            with torch.inference_mode():
                run(example)
            runs[name] = run
        except Exception as error:  # runtimes have errors of their own
            notes[name] = not_measured(error)
    _here.append((bench, runs))
    return notes


def open_in(runtime: str, precision: str, model: nn.Module, example: Tensor) -> Run:
    """As `run_in`, of what has images and answers in float32 already, too."""
    opener = run_module if isinstance(model, peers.Peer | Limit) else run_in
    return opener(runtime, precision, model, example)


def time_here() -> dict[str, np.ndarray]:
    """Seconds (batches, runs) by name."""
    bench, runs = _here.pop()
    batches = bench.batches()
    with torch.inference_mode():
        seconds = bench.time([{"actual": on_batches(run, batches)} for run in runs.values()], len(batches))
    return {name: own["actual"] for name, own in zip(runs, seconds, strict=True)}


def with_limits(bench: Bench, dtype: torch.dtype) -> dict[str, Callable[[], nn.Module]]:
    """The full model, and each of VARIANTS with its limit."""
    found: dict[str, Callable[[], nn.Module]] = {FULL: lambda: bench.model}
    for variant in VARIANTS:
        found[variant.name] = partial(VWTokenizer, bench.model, **variant.options)
        if LIMIT + variant.name in variant.columns:
            found[LIMIT + variant.name] = partial(Limit, bench.model, variant.before, variant.removed, dtype)
    return found


def of_registry(names: Collection[str], bench: Bench, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """The variants of these names, except those whose weights are quantised."""
    return {v.name: v.build for v in registry(bench) if v.name in names and v.group != QUANTISED}


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
