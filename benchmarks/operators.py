"""Operators alone: each removes as many patches in the same one block, the table of `fidelity.py --operators`."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import peers
from harness import Bench
from results import Row, bootstrap_interval
from torch import Tensor, nn
from variants import FULL, INSIDE, Variant, schedule_name

from vwt import Absorb, PruningSchedule, VWTokenizer
from vwt.errors import ArgumentError
from vwt.models.backbone import Backbone

OPERATOR = "operator"
BLOCKS = range(1, 9)
SHARES = (0.3, 0.5, 0.65)  # of the patches that go


class MakePeer(Protocol):
    """A comparator of a model, that removes patches by block."""

    def __call__(self, model: nn.Module, removed: Mapping[int, int]) -> peers.Peer:
        """See `peers.Peer`."""


OPERATORS: dict[str, MakePeer] = {
    "ToMe": peers.TokenMerging,
    "PiToMe": peers.EnergyMerging,
    "ATC": peers.AgglomerativeClustering,
    "ATC of tokens": peers.AgglomerativeClusteringOfTokens,
    "DPC-KNN": peers.DensityPeaks,
    "DiffRate": peers.DiffRate,
    "PPT": peers.PruneOrPool,
    "POMT": peers.PruneOneMoreToken,
    "top-k": peers.ClassAttentionTopK,
    "random": peers.RandomDropInside,
}
OURS = "Absorb"


def operator_variants(bench: Bench) -> list[Variant]:
    """The full model, and each operator in each block with each share.

    Raises:
        ModelError: if the comparators do not know the model.
    """
    model = bench.model
    peers.check_model(model)
    before = BlockInputs(model)
    variants = [Variant(FULL, FULL, lambda: model)]
    for block, removed in settings(model):
        schedule = PruningSchedule({block: Absorb(removed)})
        variants.append(Variant(schedule_name(schedule), INSIDE, partial(VWTokenizer, model, schedule=schedule)))
        for name, make in OPERATORS.items():
            build = partial(FromBlock, make, before, block, removed)
            variants.append(Variant(operator_name(name, block, removed), OPERATOR, build))
    return variants


def settings(model: Any) -> Iterator[tuple[int, int]]:
    """Blocks, the last left out, as what it removes changes no answer; and how many patches go there."""
    backbone = Backbone(model)
    for block in BLOCKS:
        if block < backbone.depth - 1:
            yield from ((block, int(share * backbone.patches + 0.5)) for share in SHARES)


def operator_name(operator: str, block: int, removed: int) -> str:
    """As rows are named: `ToMe(59) in block 3`, and as `schedule_name` has it."""
    return f"{operator}({removed}) in block {block}"


class BlockInputs:
    """What enters each block of the full model; of the last images, kept for all that asks for these.

    Args:
        model: see `peers.check_model`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.images: Tensor | None = None
        self.inputs: list[Tensor] = []

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Tokens (B, n, C) for each block, of images (B, C, H, W)."""
        if images is not self.images:
            model, self.inputs = self.model, []
            tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
            for block in model.blocks:
                self.inputs.append(tokens)
                tokens = block(tokens)
            self.images = images
        return self.inputs


class FromBlock:
    """A comparator that removes patches in one block, and begins there: what is before is the full model's.

    Args:
        make: the comparator.
        before: of its model.
        block: its index.
        removed: patches.

    Raises:
        ArgumentError: if it cannot remove so many.
    """

    def __init__(self, make: MakePeer, before: BlockInputs, block: int, removed: int) -> None:
        self.peer, self.before, self.block = make(before.model, {block: removed}), before, block
        patches = before.model.patch_embed.num_patches
        if removed > (most := self.peer.most(patches)):
            raise ArgumentError(f"it removes at most {most} of {patches} patches at once")

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), normalised for the model, to its output (B, classes)."""
        return self.peer.run(self.before(images)[self.block], self.block)

    def lengths(self, tokens: int) -> list[int]:
        """See `peers.Peer`."""
        return self.peer.lengths(tokens)


# -- tables ------------------------------------------------------------------------------------------------------------

LOSSES = {"block": "", "removed": "", OURS: ".4f", **dict.fromkeys(OPERATORS, ".4f"), "best": ""}
CHANGE = {"change_low": "+.4f", "change_high": "+.4f"}
COLUMNS = LOSSES | {"ratio": ".2f"} | CHANGE
TOP1_COLUMNS = LOSSES | CHANGE


def by_depth(names: Sequence[str], loss: np.ndarray, model: nn.Module, seed: int) -> list[Row]:
    """One row a block and count: the mean loss of each operator, and of Absorb as a ratio to the best comparator.

    Args:
        names: of v variants.
        loss: (n, v) of n images, less is better.
        model: what they reduce.
        seed: of the bootstrap, which is of the difference to that comparator, image by image.
    """
    column = dict(zip(names, loss.T, strict=True))
    rows: list[Row] = []
    for block, removed in settings(model):
        own = {name: column.get(operator_name(name, block, removed)) for name in (OURS, *OPERATORS)}
        found = {name: values for name, values in own.items() if values is not None}
        row: Row = {"block": block, "removed": removed} | {name: float(x.mean()) for name, x in found.items()}
        ours = found.pop(OURS, None)
        if ours is not None and found:
            best = min(found, key=lambda name: row[name])
            low, high = bootstrap_interval((ours - found[best])[:, None], seed)
            ratio = row[OURS] / row[best] if row[best] > 0 else None
            row |= {"ratio": ratio, "best": best, "change_low": float(low[0]), "change_high": float(high[0])}
        if len(row) > 2:
            rows.append(row)
    return rows
