"""Merge: the most similar pairs of patches become one token each."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vwt.reductions.assignment import _means, _with_sizes
from vwt.reductions.reduction import Reduction
from vwt.tokens.attention import Attend
from vwt.tokens.tensors import flat_index, select


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

    def count(self, key_size: Tensor | None, sizes: Tensor | None, total: Tensor) -> Tensor:
        """See `Plan`; as often as tokens were merged into one."""
        if key_size is None:
            if sizes is None:
                return total
            key_size = torch.ones_like(sizes)
        return self._sum(key_size[..., None])[..., 0]

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
