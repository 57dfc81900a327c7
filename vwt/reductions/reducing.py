"""How tokens become fewer after the attention of a block."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vwt.errors import ModelError
from vwt.reductions.assignment import Assignment
from vwt.reductions.reduction import Reduction
from vwt.tokens.attention import Half, run_blocks
from vwt.tokens.packing import Packed
from vwt.tokens.tensors import equal_lengths, lengthen
from vwt.tokens.words import Words, regroup


@dataclass(frozen=True, eq=False)
class Step:
    """How the tokens of packed images became fewer inside a block.

    Attributes:
        assignments: one for each of `Packed.runs`.
        counts: patch tokens of each image that are left.
    """

    assignments: list[Assignment]
    counts: Sequence[int]


def reduce_after(
    attention: Half, packed: Packed, reduction: Reduction, prefix: int, following: float, *, one_by_one: bool
) -> tuple[Packed, Step]:
    """Run the first half of a block, and make fewer tokens of its output, each image's on its own account.

    Args:
        attention: the block up to what follows its attention.
        packed: the sequences.
        reduction: what to do.
        prefix: P.
        following: see `Reduction.assign`.
        one_by_one: see `run_blocks`.

    Raises:
        ModelError: if the block has no fused attention, or several.
    """
    seen: list[Tensor] = []
    before = run_blocks(attention, packed, one_by_one=one_by_one, attend=reduction.watch(prefix, seen))
    runs = before.runs(before.values)
    if len(seen) != len(runs):
        raise ModelError(
            f"a reduction needs blocks that call fused attention once, not {len(seen) // len(runs)} times; leave this "
            "block out of the schedule, or create the model after timm.layers.set_fused_attn(True)"
        )
    assignments = [reduction.assign(what, run, prefix, following) for what, run in zip(seen, runs, strict=True)]
    after = _apply(reduction, assignments, before, runs, following)
    return after, Step(assignments, lengthen(after.lengths, -prefix))


def _apply(
    reduction: Reduction, assignments: list[Assignment], packed: Packed, runs: list[Tensor], following: float
) -> Packed:
    """Packed images of fewer tokens, with the sizes, key sizes and positions of these."""
    nothing: list[Tensor] | list[None] = [None] * len(runs)
    sizes = nothing if packed.sizes is None else packed.runs(packed.sizes)
    key_sizes = nothing if packed.key_size is None else packed.runs(packed.key_size)
    fewer = [own.apply(tokens, size) for own, tokens, size in zip(assignments, runs, sizes, strict=True)]
    values, totals = ([each[part] for each in fewer] for part in (0, 1))
    every = zip(assignments, key_sizes, sizes, totals, strict=True)
    new_key_sizes = [own for own in (reduction.key_size(*each, following) for each in every) if own is not None]
    lengths = _lengths(values)
    places = packed.places
    if places is not None:
        each = zip(assignments, packed.runs(places.rows), sizes, strict=True)
        places = places.replace(_flat([own.apply(at, size)[0] for own, at, size in each]), lengths, whole=False)
    key_size = _flat(new_key_sizes) if new_key_sizes else None
    bias_on_self = packed.bias_on_self and reduction.bias_on_self
    return Packed(_flat(values), lengths, _flat(totals), key_size, places, bias_on_self)


def _lengths(values: Sequence[Tensor]) -> Sequence[int]:
    """Of runs (b, n, C) image after image."""
    if len(values) == 1:
        return equal_lengths(values[0].shape[1], values[0].shape[0])
    return tuple(value.shape[1] for value in values)


def _flat(runs: Sequence[Tensor]) -> Tensor:
    """Runs (b, n, ...) as one sequence (T, ...)."""
    return runs[0].flatten(0, 1) if len(runs) == 1 else torch.cat([run.flatten(0, 1) for run in runs])


def follow(words: Words, steps: Sequence[Step]) -> Words:
    """Words to those after all reductions inside the blocks."""
    for step in steps:
        target = _flat([own.target for own in step.assignments])
        weights = [own.weight for own in step.assignments if own.weight is not None]
        words = regroup(words, target, step.counts, _flat(weights) if weights else None)
    return words
