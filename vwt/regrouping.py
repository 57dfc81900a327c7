"""Which tokens become which inside a block, and how: the plans that `vwt.pruning` makes and carries out.

Shapes as in `vwt.pruning`: B images, n tokens of which the first P are prefix tokens and m = n - P are patches.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vwt.words import flat_index, precisely


class Plan(Protocol):
    """Which tokens become which, for a batch."""

    def apply(self, tokens: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens (B, n, C) with sizes (B, n) float32, None where all are 1, to fewer: (B, n', C) and (B, n')."""
        ...

    def count(self, counted: Tensor | None, sizes: Tensor | None, total: Tensor) -> Tensor | None:
        """How often attention counts the new tokens (B, n'), None where once each.

        Args:
            counted: (B, n) float32, how often it counts the former ones, None where once each.
            sizes: (B, n), the former sizes.
            total: (B, n'), the new ones.
        """
        ...

    def places(self) -> Tensor:
        """(B, m) int64: the new place of each patch token, prefix tokens not counted."""
        ...

    def times(self) -> Tensor | None:
        """(B, m) float32: how often each patch token counts in its mean, beside its size; None where once each."""
        ...


def prune(scores: Tensor, removed: int, prefix: int) -> "PrunePlan":
    """Keep the patches with the highest scores (B, m); the `removed` + 1 others become one token, R fewer in all."""
    order = scores.sort(dim=1, descending=True).indices
    kept = scores.shape[1] - removed - 1
    return PrunePlan(order[:, :kept].sort(dim=1).values, order[:, kept:], prefix)


@dataclass(frozen=True, eq=False)
class PrunePlan:
    """Prefix tokens, kept patches in their order, and the mean of the dropped ones, last.

    Attributes:
        kept: (B, k) int64, patches, ascending.
        dropped: (B, R + 1) int64, patches.
        prefix: P.
    """

    kept: Tensor
    dropped: Tensor
    prefix: int

    def apply(self, tokens: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Plan`."""
        kept = self.kept.shape[1]
        weighted = _with_sizes(tokens, sizes)
        patches = select(weighted, torch.cat([self.kept, self.dropped], dim=1) + self.prefix)
        dropped = patches[:, kept:].sum(dim=1, keepdim=True)
        return _means(torch.cat([weighted[:, : self.prefix], patches[:, :kept], dropped], dim=1), tokens.dtype)

    def count(self, counted: Tensor | None, sizes: Tensor | None, total: Tensor) -> Tensor | None:
        """See `Plan`; the mean of several counts once."""
        if counted is None:
            return None
        alone = self.dropped.shape[1] == 1  # nothing is removed
        chosen = torch.cat([self.kept, self.dropped], dim=1) if alone else self.kept
        kept = select(counted[..., None], chosen + self.prefix)[..., 0]
        mean = torch.ones_like(counted[:, : 0 if alone else 1])
        return torch.cat([counted[:, : self.prefix], kept, mean], dim=1)

    def places(self) -> Tensor:
        """See `Plan`."""
        batch, kept = self.kept.shape
        places = self.kept.new_full((batch, kept + self.dropped.shape[1]), kept)
        return places.scatter(1, self.kept, torch.arange(kept, device=places.device).expand(batch, -1))

    def times(self) -> None:
        """See `Plan`."""


def match(metric: Tensor, removed: int, prefix: int) -> "MergePlan":
    """Bipartite soft matching: every second patch proposes to the most similar of the others; the best pairs merge.

    Args:
        metric: (B, m, d), compared by cosine.
        removed: R pairs, at most m // 2.
        prefix: P tokens that come before the patches, and take no part.
    """
    unit = F.normalize(metric, dim=-1)
    best, partner = (unit[:, 1::2] @ unit[:, ::2].transpose(-2, -1)).max(dim=-1)  # (B, m // 2)
    order = best.sort(dim=1, descending=True).indices
    source = order[:, :removed]
    return MergePlan(order[:, removed:].sort(dim=1).values, source, partner.gather(1, source), metric.shape[1], prefix)


@dataclass(frozen=True, eq=False)
class MergePlan:
    """Prefix tokens, then the odd patches that stay, then the even ones, with what merged into them.

    Attributes:
        stay: (B, m // 2 - R) int64, which of the odd patches stay, ascending.
        source: (B, R) int64, which of the odd patches merge.
        target: (B, R) int64, into which of the even patches.
        patches: m.
        prefix: P.
    """

    stay: Tensor
    source: Tensor
    target: Tensor
    patches: int
    prefix: int

    def apply(self, tokens: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Plan`."""
        return _means(self._sum(_with_sizes(tokens, sizes)), tokens.dtype)

    def count(self, counted: Tensor | None, sizes: Tensor | None, total: Tensor) -> Tensor:
        """See `Plan`; as often as tokens were merged into one."""
        if counted is None:
            if sizes is None:
                return total
            counted = torch.ones_like(sizes)
        return self._sum(counted[..., None])[..., 0]

    def _sum(self, values: Tensor) -> Tensor:
        """Values (B, n, C) to their sums over the tokens of each place (B, n - R, C)."""
        odd, even = values[:, self.prefix + 1 :: 2], values[:, self.prefix :: 2]
        sums = torch.cat([values[:, : self.prefix], select(odd, self.stay), even], dim=1)
        first = self.prefix + self.stay.shape[1]
        index = flat_index(self.target + first, sums.shape[1])
        merged = sums.flatten(0, 1).index_add(0, index, select(odd, self.source).flatten(0, 1))
        return merged.view(sums.shape)

    def places(self) -> Tensor:
        """See `Plan`."""
        batch, stay = self.stay.shape
        places = self.stay.new_empty(batch, self.patches)
        odd = places.new_empty(batch, self.patches // 2)
        odd = odd.scatter(1, self.stay, torch.arange(stay, device=odd.device).expand(batch, -1))
        places[:, 1::2] = odd.scatter(1, self.source, self.target + stay)
        places[:, ::2] = torch.arange(stay, stay + places[:, ::2].shape[1], device=odd.device)
        return places

    def times(self) -> None:
        """See `Plan`."""


def absorb(received: Tensor, patches: Tensor, removed: int, prefix: int) -> "AbsorbPlan":
    """Keep patches that receive attention and that no stronger one is like; the others go where they are most alike.

    Args:
        received: (B, m) float32, the attention that each patch receives.
        patches: (B, m, C), compared by the correlation of their channels.
        removed: R patches that merge into others, at most m - 1.
        prefix: P tokens that come before the patches, and take no part.
    """
    with precisely(patches.device):
        unit = F.layer_norm(patches.float(), patches.shape[-1:], eps=1e-12)
        likeness = unit @ unit.transpose(-2, -1)  # (B, m, m), the correlation times C
    stronger = received[:, None] > received[..., None]
    width = patches.shape[-1]
    distance = (width - (likeness * stronger).amax(dim=-1)).clamp(min=1e-3 * width)  # of copies the stronger goes first
    order = (received.square() * distance).sort(dim=1, descending=True).indices  # that of received · √distance
    kept, dropped = order.tensor_split([order.shape[1] - removed], dim=1)
    return AbsorbPlan(kept, dropped, _among(likeness, dropped, kept).argmax(dim=-1), prefix)


def _among(square: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Rows (B, r) and columns (B, c) of a matrix (B, m, m) of each image: (B, r, c)."""
    if len(square) == 1:  # gathering is dear at batch 1
        return square[0].index_select(0, rows[0]).index_select(1, columns[0])[None]
    return select(square, rows).gather(2, columns[:, None].expand(-1, rows.shape[1], -1))


@dataclass(frozen=True, eq=False)
class AbsorbPlan:
    """Prefix tokens, then kept patches, the most telling first, with what merged into them.

    Attributes:
        kept: (B, k) int64, patches.
        dropped: (B, R) int64, patches.
        target: (B, R) int64, into which of the kept ones each merges.
        prefix: P.
    """

    kept: Tensor
    dropped: Tensor
    target: Tensor
    prefix: int

    def apply(self, tokens: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Plan`; what is kept counts twice in the mean."""
        weighted = _with_sizes(tokens, sizes)
        patches = select(weighted, torch.cat([self.kept, self.dropped], dim=1) + self.prefix)
        kept, dropped = patches.tensor_split([self.kept.shape[1]], dim=1)
        kept = torch.cat([weighted[:, : self.prefix], kept], dim=1)
        index = flat_index(self.target + self.prefix, kept.shape[1])
        sums = kept.flatten(0, 1).index_add(0, index, dropped.flatten(0, 1)).view(kept.shape)
        means, _ = _means(sums + kept, tokens.dtype)
        return means, sums[..., -1]

    def count(self, counted: Tensor | None, sizes: Tensor | None, total: Tensor) -> Tensor:
        """See `Plan`; a token of s patches as s ** 0.8."""
        return total**0.8

    def places(self) -> Tensor:
        """See `Plan`."""
        places = self.kept.new_empty(len(self.kept), self.kept.shape[1] + self.dropped.shape[1])
        everything = torch.arange(self.kept.shape[1], device=places.device).expand(self.kept.shape)
        return places.scatter(1, self.kept, everything).scatter(1, self.dropped, self.target)

    def times(self) -> Tensor:
        """See `Plan`; what is kept twice."""
        batch, kept = self.kept.shape
        times = torch.ones(batch, kept + self.dropped.shape[1], device=self.kept.device)
        return times.scatter(1, self.kept, 2.0)


def _with_sizes(tokens: Tensor, sizes: Tensor | None) -> Tensor:
    """Tokens (B, n, C) times their sizes (B, n), and the sizes, as one more channel: (B, n, C + 1) float32 or wider."""
    tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
    if sizes is None:
        return F.pad(tokens, (0, 1), value=1.0)
    return torch.cat([tokens * sizes[..., None], sizes[..., None]], dim=-1)


def _means(sums: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sums of what `_with_sizes` gave, to means (B, n, C) and sizes (B, n)."""
    total = sums[..., -1]
    return (sums[..., :-1] / total[..., None]).to(dtype), total


def select(values: Tensor, index: Tensor) -> Tensor:
    """Rows of values (B, n, C) at the places (B, k) int64 of each image: (B, k, C)."""
    rows = values.flatten(0, 1).index_select(0, flat_index(index, values.shape[1]))
    return rows.view(*index.shape, values.shape[2])
