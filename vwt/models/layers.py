"""Hidden states of a vision tower that sees fewer tokens, as vision-language models read them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vwt.errors import ArgumentError
from vwt.models.backbone import NOTHING, Backbone
from vwt.reductions.kinds import check_amounts
from vwt.reductions.reducing import Step, follow
from vwt.reductions.reduction import Reduction
from vwt.tokens.packing import Packed
from vwt.tokens.words import Words, merge, unmerge

# Which hidden states: numbers as transformers has them (0 is what enters the first block, -1 what leaves the last), or
# None for the tower's own output, after all blocks and the norm.
Layers: TypeAlias = Sequence[int] | None


def blocks_read(layers: Layers, depth: int) -> list[int]:
    """How many of the tower's blocks each of the layers is the output of.

    Raises:
        ArgumentError: for a layer that the tower does not have.
    """
    if layers is None:
        return [depth]
    if any(not -depth - 1 <= layer <= depth for layer in layers):
        raise ArgumentError(
            f"vision_feature_layer is {list(layers)}; expected numbers from {-depth - 1} to {depth}, as the vision "
            f"tower has {depth} blocks"
        )
    return [layer % (depth + 1) for layer in layers]


def join_reductions(
    reductions: Mapping[int, Reduction], after: Reduction | None, blocks: int
) -> Mapping[int, Reduction]:
    """The schedule of the first `blocks` blocks with what happens after the last of them; raise ArgumentError for both.

    Nor may the schedule name a block whose output is not read.
    """
    idle = [block for block in sorted(reductions) if block >= blocks]
    if idle:
        raise ArgumentError(
            f"the schedule names block {idle[0]}, but the language model reads what leaves the first {blocks} blocks "
            f"of the vision tower; expected blocks from 0 to {blocks - 1}"
        )
    if after is None:
        return reductions
    if blocks == 0:
        raise ArgumentError("after reduces by the attention of the last block that is read, and none is; leave it out")
    if blocks - 1 in reductions:
        raise ArgumentError(
            f"schedule and after both reduce in block {blocks - 1}, whose attention tells of one of them only; leave "
            "one out"
        )
    return {**reductions, blocks - 1: after}


def encode_layers(
    backbone: Backbone,
    packed: Packed,
    words: Words,
    layers: Layers,
    reductions: Mapping[int, Reduction] = NOTHING,
    after: Reduction | None = None,
) -> tuple[list[Tensor], Words]:
    """Tokens of images to hidden states of the tower; blocks that nobody reads do not run.

    All hidden states are of the same tokens, those that are left at the last of the layers: where an earlier layer had
    more of them, these are averaged as they became one.

    Args:
        backbone: of the vision tower.
        packed: what enters the norm before the first block.
        words: of these tokens.
        layers: which hidden states.
        reductions: inside the blocks, by block.
        after: of what leaves the last block that is read, by the attention of that block.

    Returns:
        Hidden states (B, P + N, C) on the full grid in the order of the layers, and the Words of their tokens.

    Raises:
        ArgumentError: for layers, or reductions, that there cannot be.
    """
    ends = blocks_read(layers, backbone.depth)
    check_amounts(join_reductions(reductions, after, max(ends)), backbone.depth, words.count)
    leave = _keep if layers is not None else backbone.family.final_norm
    packed, start = backbone.pre_norm(packed), 0
    steps: list[Step] = []
    states: dict[int, Tensor] = {}
    done: dict[int, int] = {}
    for end in sorted(set(ends)):
        reduced = after if end == max(ends) else None
        packed, more = backbone.run(packed, reductions, start, end if reduced is None else end - 1)
        steps, start = [*steps, *more], end
        if reduced is not None:
            packed, step = backbone.run_and_reduce(packed, end - 1, reduced, leave)
            steps.append(step)
        elif layers is None:
            packed = backbone.final_norm(packed)
        states[end], done[end] = backbone.to_grid(packed, words, steps), len(steps)
    left = follow(words, steps)
    for end in states:
        if done[end] < len(steps):
            states[end] = _average(states[end], left, backbone.prefix)
    return [states[end] for end in ends], left


def _keep(values: Any) -> Any:
    return values


def _average(tokens: Tensor, words: Words, prefix: int) -> Tensor:
    """Tokens (B, P + N, C) in which each patch takes the mean of its token."""
    return torch.cat([tokens[:, :prefix], unmerge(merge(tokens[:, prefix:], words), words)], dim=1)


# Images (B, C, H, W) and layers to hidden states and Words.
EncodeLayers: TypeAlias = Callable[[Tensor, Layers], tuple[list[Tensor], Words]]
