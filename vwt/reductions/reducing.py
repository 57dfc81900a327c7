"""How a block runs whose tokens become fewer between its attention and its MLP."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vwt.errors import ModelError
from vwt.reductions.absorb import AbsorbPlan
from vwt.reductions.assignment import Plan
from vwt.reductions.reduction import Reduction
from vwt.tokens.attention import Half, run_blocks
from vwt.tokens.packing import Packed
from vwt.tokens.positions import PREFIX, Positions, mean_positions
from vwt.tokens.tensors import equal_lengths, lengthen
from vwt.tokens.words import Words, regroup


@dataclass(frozen=True, eq=False)
class Step:
    """How the tokens of packed images became fewer inside a block.

    Attributes:
        plans: one for each of `Packed.runs`.
        counts: patch tokens of each image that are left.
    """

    plans: list[Plan]
    counts: Sequence[int]


def reduce_between(
    attention: Half, mlp: Half, packed: Packed, reduction: Reduction, prefix: int, *, one_by_one: bool
) -> tuple[Packed, Step]:
    """Run a block whose tokens become fewer between its two halves, each image's on its own account.

    Args:
        attention: the block up to what follows its attention.
        mlp: the rest of it.
        packed: the sequences.
        reduction: what to do.
        prefix: P.
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
    plans = [reduction.plan(what, run, prefix) for what, run in zip(seen, runs, strict=True)]
    after = _apply(plans, before, runs)
    return run_blocks(mlp, after, one_by_one=one_by_one), Step(plans, lengthen(after.lengths, -prefix))


def _apply(plans: list[Plan], packed: Packed, runs: list[Tensor]) -> Packed:
    nothing: list[Tensor] | list[None] = [None] * len(runs)
    sizes = nothing if packed.sizes is None else packed.runs(packed.sizes)
    key_size = nothing if packed.key_size is None else packed.runs(packed.key_size)
    values, new_sizes, new_counted = [], [], []
    for plan, tokens, size, count in zip(plans, runs, sizes, key_size, strict=True):
        fewer, total = plan.apply(tokens, size)
        values.append(fewer)
        new_sizes.append(total)
        new_counted.append(plan.count(count, size, total))
    lengths = _lengths(values)
    lazy_property = [count for count in new_counted if count is not None]
    bias_on_self = packed.bias_on_self and not isinstance(plans[0], AbsorbPlan)
    places = None if packed.places is None else _move(plans, packed, packed.places, lengths)
    counts = _flat(lazy_property) if lazy_property else None
    return Packed(_flat(values), lengths, _flat(new_sizes), counts, places, bias_on_self)


def _lengths(values: Sequence[Tensor]) -> Sequence[int]:
    """Of runs (b, n, C) image after image."""
    if len(values) == 1:
        return equal_lengths(values[0].shape[1], values[0].shape[0])
    return tuple(value.shape[1] for value in values)


def _move(plans: list[Plan], packed: Packed, places: Positions, lengths: Sequence[int]) -> Positions:
    """Where the tokens of other lengths are that plans make."""
    runs, prefix = packed.runs(places.rows), places.prefix
    sizes = [None] * len(runs) if packed.sizes is None else packed.runs(packed.sizes)
    moved = []
    for index, (plan, at, size) in enumerate(zip(plans, runs, sizes, strict=True)):
        amount, times = None if size is None else size[:, prefix:], plan.times()
        if times is not None:
            amount = times if amount is None else amount * times
        means = mean_positions(at[:, prefix:], amount, plan.places(), lengths[index] - prefix)
        moved.append(F.pad(means, (0, 0, prefix, 0), value=PREFIX))
    return places.replace(_flat(moved), lengths, whole=False)


def _flat(runs: Sequence[Tensor]) -> Tensor:
    """Runs (b, n, ...) as one sequence (T, ...)."""
    return runs[0].flatten(0, 1) if len(runs) == 1 else torch.cat([run.flatten(0, 1) for run in runs])


def follow(words: Words, steps: Sequence[Step]) -> Words:
    """Words to those after all reductions inside the blocks."""
    for step in steps:
        places = _flat([plan.places() for plan in step.plans])
        every = [plan.times() for plan in step.plans]
        times = [own for own in every if own is not None]
        words = regroup(words, places, step.counts, _flat(times) if times else None)
    return words
