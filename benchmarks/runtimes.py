"""The table of `latency.py --runtime`: a row for each runtime and precision, with its own full model and limits.

Each row is measured in a process of its own, as the thread pools of runtimes disturb each other. A limit is the same
model's blocks on as many tokens as the variant has, in the same blocks; the tokens are the first ones, for nothing.
"""

import argparse
import copy
import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from harness import Bench
from peers._peer import Attended
from results import Row, ratio
from torch import Tensor, nn

from vwt import Absorb, IntraImage, Neighbours, PruningSchedule, VWTokenizer
from vwt.errors import ArgumentError, VWTError, first_line
from vwt.export.runtimes import PRECISIONS, RUNTIMES, check_runtime, run_in, run_module, written_in
from vwt.measure.timing import on_batches

FULL, LIMIT = "full", "limit of "


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
    pairs = dict.fromkeys(pair for pairs in bench.arguments.runtime for pair in pairs)
    rows = [Measured(runtime, precision) for runtime, precision in pairs]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda row: row.open(bench), rows))
    return [row.time() for row in rows]


class Measured:
    """A row, and the process that it is measured in; some are opened at once, each is timed alone.

    Args:
        runtime: see `run_in`.
        precision: see `run_in`.
    """

    def __init__(self, runtime: str, precision: str) -> None:
        self.row: Row = {"runtime": runtime, "precision": precision}
        self.process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def open(self, bench: Bench) -> None:
        """Start the process, in which everything is exported or compiled, and called once."""
        runtime, precision = self.row["runtime"], self.row["precision"]
        try:
            check_runtime(runtime, precision, bench.device)
            if precision == "bfloat16" and not has_bfloat16():
                raise ArgumentError(
                    "this CPU has no instructions for bfloat16, which takes many times as long as float32"
                )
            self.process.submit(open_here, bench.arguments, runtime, precision).result()
        except (VWTError, RuntimeError, BrokenProcessPool) as error:
            self.row["note"] = f"not measured: {first_line(error)}"

    def time(self) -> Row:
        """The row; the process ends."""
        with self.process:
            if "note" not in self.row:
                self.row |= self.process.submit(time_here).result()
        return self.row


def has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16, as far as Linux says."""
    path = Path("/proc/cpuinfo")
    return not path.exists() or "bf16" in path.read_text()


# -- in the process of a row -------------------------------------------------------------------------------------------

_here: list[tuple[Bench, dict[str, Any]]] = []  # what a process was started for


def open_here(arguments: argparse.Namespace, runtime: str, precision: str) -> None:
    """Open everything, and call it once, which is when torch compiles."""
    bench = Bench.open(arguments, [])
    example = bench.batches()[0]
    modules = open_all(bench, runtime, precision, example)
    with torch.inference_mode():
        for run in modules.values():
            run(example)
    _here.append((bench, modules))


def time_here() -> Row:
    """Milliseconds of the full model, and all else as a ratio to it."""
    bench, modules = _here.pop()
    batches = bench.batches()
    with torch.inference_mode():
        seconds = bench.time([{"actual": on_batches(run, batches)} for run in modules.values()], len(batches))
    timed = {name: own["actual"] for name, own in zip(modules, seconds, strict=True)}
    ratios = {name: ratio(own, timed[FULL]) for name, own in timed.items() if name != FULL}
    return {"full_ms": 1e3 * float(np.median(timed[FULL]))} | ratios


def open_all(bench: Bench, runtime: str, precision: str, example: Tensor) -> dict[str, Any]:
    """What is timed, by name."""
    model, dtype = bench.model, getattr(torch, written_in(runtime, precision))
    opened: dict[str, Any] = {FULL: run_in(runtime, precision, model, example)}
    for variant in VARIANTS:
        opened[variant.name] = run_in(runtime, precision, VWTokenizer(model, **variant.options), example)
        if LIMIT + variant.name in variant.columns:
            limit = Limit(model, variant.before, variant.removed, dtype)
            opened[LIMIT + variant.name] = run_module(runtime, precision, limit, example)
    return opened


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
