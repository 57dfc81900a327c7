"""Merge: the most similar pairs of patches become one token each."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vwt.reductions.assignment import Assignment
from vwt.reductions.reduction import Reduction
from vwt.tokens.attention import Attend


def match(metric: Tensor, removed: int, prefix: int) -> Assignment:
    """Bipartite soft matching: every second patch proposes to the most similar of the others; the best pairs merge.

    The odd patches that stay come first, then the even ones.

    Args:
        metric: (B, m, d), compared by cosine.
        removed: R pairs, at most m // 2.
        prefix: P tokens that come before the patches, and take no part.
    """
    unit = F.normalize(metric, dim=-1)
    best, partner = (unit[:, 1::2] @ unit[:, ::2].transpose(-2, -1)).max(dim=-1)  # (B, m // 2)
    source = best.sort(dim=1, descending=True).indices[:, :removed]
    merges = torch.zeros_like(partner, dtype=torch.bool).scatter(1, source, True)
    patches, stay = metric.shape[1], best.shape[1] - removed
    odd = torch.where(merges, partner + stay, (~merges).cumsum(dim=1) - 1)
    even = torch.arange(stay, patches - removed, device=odd.device).expand(odd.shape[0], -1)
    pairs = torch.stack([even[:, : odd.shape[1]], odd], dim=-1).flatten(1)
    return Assignment(torch.cat([pairs, even[:, odd.shape[1] :]], dim=1), patches - removed, prefix)


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

    @staticmethod
    def key_size(
        assignment: Assignment, key_size: Tensor | None, sizes: Tensor | None, total: Tensor, following: float
    ) -> Tensor:
        """See `Reduction`: as often as tokens were merged into one."""
        if key_size is None:
            return total if sizes is None else assignment.sum(torch.ones_like(sizes))
        return assignment.sum(key_size)

    def assign(self, seen: Tensor, tokens: Tensor, prefix: int, following: float) -> Assignment:
        """Metric (B, m, d) to the pairs."""
        return match(seen, self.removed(seen.shape[1]), prefix)
