"""Fewer tokens inside a block, between its attention and its MLP: pruning and merging.

Pruning is that of "Pruning One More Token is Enough" (Eliopoulos et al., WACV 2025, arXiv 2407.05941), section 3.2,
except that an image's scores depend on that image alone, and that any number of prefix tokens is left in peace. Merging
is the bipartite soft matching of "Token Merging" (Bolya et al., ICLR 2023, arXiv 2210.09461), section 3, done once with
a large count rather than a little in every block. Absorbing is our own; see `Absorb`.

Shapes: B images, n tokens of which the first P are prefix tokens and m = n - P are patches (or words), H heads, C
channels. All functions are dense; `vwt.backbones` calls them on a batch of equal lengths, or image by image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from vwt.errors import ArgumentError, ModelError
from vwt.packing import Beside, Packed, run_blocks
from vwt.positions import PREFIX, Places, regroup_places
from vwt.regrouping import AbsorbPlan, MergePlan, Plan, PrunePlan, absorb, match, prune
from vwt.words import Words, regroup

Attend: TypeAlias = Callable[..., Tensor]  # called like F.scaled_dot_product_attention
# Tokens (B, n, C), and what a block is given beside them, to tokens.
Half: TypeAlias = Callable[[Tensor, Beside | None], Tensor]


@dataclass(frozen=True, repr=False)
class Reduction:
    """How many of the patch tokens that enter a block leave it.

    Args:
        amount: tokens to remove, at least 1, or their share, in (0, 1).

    Raises:
        ArgumentError: for any other amount.
    """

    amount: int | float

    def __post_init__(self) -> None:
        amount = self.amount
        whole = isinstance(amount, int) and not isinstance(amount, bool)
        if not (amount >= 1 if whole else isinstance(amount, float) and 0 < amount < 1):
            raise ArgumentError(f"{self}: expected a number of tokens to remove, at least 1, or a share in (0, 1)")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.amount!r})"

    @property
    def kind(self) -> str:
        """The operation's name in files and tables."""
        return type(self).__name__.lower()

    @staticmethod
    def most(patches: int) -> int:
        """The most tokens that it can remove of so many."""
        raise NotImplementedError

    def wanted(self, patches: int) -> int:
        """Tokens to remove of so many, whether that can be done or not."""
        return self.amount if isinstance(self.amount, int) else int(self.amount * patches + 1e-9)

    def removed(self, patches: int) -> int:
        """Tokens that are removed of so many: what is wanted, as far as there are enough."""
        return max(0, min(self.wanted(patches), self.most(patches)))

    def watch(self, prefix: int, seen: list[Tensor]) -> Attend:
        """Attention that appends to `seen` what `plan` needs."""
        raise NotImplementedError

    def plan(self, seen: Tensor, tokens: Tensor, prefix: int) -> Plan:
        """The plan for what was seen of a batch, and its tokens (B, n, C) after the attention."""
        raise NotImplementedError


class Prune(Reduction):
    """Keep the most important patches, and replace the others by one token, their mean.

    The R + 1 least important (see `importance`) become one token, so that R tokens less go on. The mean is weighted by
    the patches that each token stands for.

    Args:
        amount: R, at least 1, or its share of the patch tokens that enter, in (0, 1).
    """

    @staticmethod
    def most(patches: int) -> int:
        """One patch stays beside the mean of the others."""
        return patches - 2

    def watch(self, prefix: int, seen: list[Tensor]) -> Attend:
        """Explicit attention, of which the scores (B, m) are made; it is not computed twice."""
        return _explicitly(seen, lambda query, key, value, weights: importance(query, key, value, prefix, weights))

    def plan(self, seen: Tensor, tokens: Tensor, prefix: int) -> "PrunePlan":
        """Importance (B, m) to what is kept and what is dropped."""
        return prune(seen, self.removed(seen.shape[1]), prefix)


class Merge(Reduction):
    """Merge the most similar pairs of patches into their mean.

    The R most similar pairs (see `match`) become one token each, the mean weighted by the patches that each stands for.
    From then on attention counts each token as often as tokens were merged into it (proportional attention).

    Args:
        amount: R, at least 1, or its share of the patch tokens that enter, in (0, 1); at most a half.
    """

    @staticmethod
    def most(patches: int) -> int:
        """Every other token can merge into one of the rest."""
        return patches // 2

    def watch(self, prefix: int, seen: list[Tensor]) -> Attend:
        """Fused attention; the keys' mean over the heads (B, m, d) is kept."""

        def attend(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
            seen.append(key[:, :, prefix:].mean(dim=1))
            return F.scaled_dot_product_attention(query, key, value, *rest, **options)

        return attend

    def plan(self, seen: Tensor, tokens: Tensor, prefix: int) -> "MergePlan":
        """Metric (B, m, d) to the pairs."""
        return match(seen, self.removed(seen.shape[1]), prefix)


class Absorb(Reduction):
    """Keep the most telling patches; each of the others merges into the kept one that is most like it.

    A patch tells by the attention that it receives (the first term of `importance`) times the square root of its
    distance from the likest patch that receives more: of several that are alike, one is enough. The kept patch counts
    twice in the mean, as a token that the model knows; else it is weighted by the patches that each stands for.
    Attention counts a token of s patches as s ** 0.8, and once when it attends to itself.

    From the third block on this was measured to change the answer less than half as much as the same number of `Prune`
    or `Merge`, and more than half of the patches can go.

    Args:
        amount: R, at least 1, or its share of the patch tokens that enter, in (0, 1).
    """

    @staticmethod
    def most(patches: int) -> int:
        """One patch stays."""
        return patches - 1

    def watch(self, prefix: int, seen: list[Tensor]) -> Attend:
        """Explicit attention; the attention that patches receive (B, m) is kept."""
        return _explicitly(seen, lambda query, key, value, weights: _received(weights, prefix))

    def plan(self, seen: Tensor, tokens: Tensor, prefix: int) -> "AbsorbPlan":
        """Attention received (B, m) and tokens to what is kept, and into what the others merge."""
        return absorb(seen, tokens[:, prefix:], self.removed(seen.shape[1]), prefix)


KINDS: dict[str, type[Reduction]] = {"prune": Prune, "merge": Merge, "absorb": Absorb}


def patches_entering(reductions: Mapping[int, Reduction], blocks: int, patches: int) -> list[int]:
    """Patch tokens that enter each of `blocks` blocks, and, last, those that leave, when so many enter the first."""
    counts = [patches]
    for block in range(blocks):
        reduction = reductions.get(block)
        counts.append(counts[-1] - (reduction.removed(counts[-1]) if reduction else 0))
    return counts


# -- inside a block ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Step:
    """How the tokens of packed images became fewer inside a block.

    Attributes:
        plans: one for each of `Packed.runs`.
        counts: patch tokens of each image that are left.
    """

    plans: list[Plan]
    counts: tuple[int, ...]


def reduce_between(
    attention: Half, mlp: Half, packed: Packed, reduction: Reduction, prefix: int, *, crossing: bool
) -> tuple[Packed, Step]:
    """Run a block whose tokens become fewer between its two halves, each image's on its own account.

    Args:
        attention: the block up to what follows its attention.
        mlp: the rest of it.
        packed: the sequences.
        reduction: what to do.
        prefix: P.
        crossing: see `run_blocks`.

    Raises:
        ModelError: if the block has no fused attention, or several.
    """
    seen: list[Tensor] = []
    before = run_blocks(attention, packed, crossing=crossing, attend=reduction.watch(prefix, seen))
    runs = before.runs(before.values)
    if len(seen) != len(runs):
        raise ModelError(
            f"a reduction needs blocks that call fused attention once, not {len(seen) // len(runs)} times; leave this "
            "block out of the schedule, or create the model after timm.layers.set_fused_attn(True)"
        )
    plans = [reduction.plan(what, run, prefix) for what, run in zip(seen, runs, strict=True)]
    after = _apply(plans, before, runs)
    patches = tuple(length - prefix for length in after.lengths)
    return run_blocks(mlp, after, crossing=crossing), Step(plans, patches)


def _apply(plans: list[Plan], packed: Packed, runs: list[Tensor]) -> Packed:
    nothing: list[Tensor] | list[None] = [None] * len(runs)
    sizes = nothing if packed.sizes is None else packed.runs(packed.sizes)
    counted = nothing if packed.counted is None else packed.runs(packed.counted)
    values, new_sizes, new_counted = [], [], []
    for plan, tokens, size, count in zip(plans, runs, sizes, counted, strict=True):
        fewer, total = plan.apply(tokens, size)
        values.append(fewer)
        new_sizes.append(total)
        new_counted.append(plan.count(count, size, total))
    lengths = tuple(value.shape[1] for value in values for _ in value)
    once = [count for count in new_counted if count is not None]
    counts_itself = packed.counts_itself and not isinstance(plans[0], AbsorbPlan)
    places = None if packed.places is None else _move(plans, packed, packed.places, lengths)
    counts = _flat(once) if once else None
    return Packed(_flat(values), lengths, _flat(new_sizes), counts, places, counts_itself)


def _move(plans: list[Plan], packed: Packed, places: Places, lengths: tuple[int, ...]) -> Places:
    """Where the tokens of other lengths are that plans make."""
    runs, prefix = packed.runs(places.rows), places.prefix
    sizes = [None] * len(runs) if packed.sizes is None else packed.runs(packed.sizes)
    moved = []
    for index, (plan, at, size) in enumerate(zip(plans, runs, sizes, strict=True)):
        amount, times = None if size is None else size[:, prefix:], plan.times()
        if times is not None:
            amount = times if amount is None else amount * times
        means = regroup_places(at[:, prefix:], amount, plan.places(), lengths[index] - prefix)
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


def importance(query: Tensor, key: Tensor, value: Tensor, prefix: int, weights: Tensor | None = None) -> Tensor:
    """How much the patches' attention and values say of each patch (Prune One More Token, section 3.2).

    The attention that a patch receives from all patches, each time of the strongest head, over the image's largest;
    plus the softmax over all tokens of its values' sum, each channel of the strongest head.

    Args:
        query: (B, H, n, d), as attention gets them.
        key: (B, H, n, d).
        value: (B, H, n, d).
        prefix: P tokens that come first; they take no part, except in that softmax.
        weights: (B, H, n, n), what attention makes of query and key, where it is known already.

    Returns:
        (B, m) float32.
    """
    if weights is None:
        _, weights = attend_explicitly(query, key, value)
    received = _received(weights, prefix)
    energy = value.amax(dim=1).sum(dim=-1, dtype=torch.float32).softmax(dim=-1)
    # Where prefix tokens get all attention, all patches get none.
    return received / received.amax(dim=-1, keepdim=True).clamp_min(1e-30) + energy[:, prefix:]


def _received(weights: Tensor, prefix: int) -> Tensor:
    """The attention (B, H, n, n) that each patch receives from all patches, of the strongest head: (B, m) float32."""
    return weights.amax(dim=1)[:, prefix:, prefix:].sum(dim=1, dtype=torch.float32)


def _explicitly(seen: list[Tensor], score: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Attend:
    """Explicit attention that appends to `seen` what is made of query, key, value and weights."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        output, weights = attend_explicitly(query, key, value, *rest, **options)
        seen.append(score(query, key, value, weights))
        return output

    return attend


def attend_explicitly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """What F.scaled_dot_product_attention answers (B, H, n, d), and its weights (B, H, n, n) before dropout.

    Raises:
        ArgumentError: for causal or grouped attention, which no Vision Transformer has.
    """
    if is_causal or enable_gqa:
        raise ArgumentError("pruning takes neither causal nor grouped attention; leave this block out of the schedule")
    logits = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    weights = logits.softmax(dim=-1)
    return F.dropout(weights, dropout_p) @ value if dropout_p else weights @ value, weights
