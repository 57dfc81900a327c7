"""Which tokens become which inside a block, and how: the plans that `vwt.reductions.reduction` makes and carries out.

Shapes as in `vwt.reductions.reduction`: B images, n tokens of which the first P are prefix tokens and m = n - P are
patches.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Plan(Protocol):
    """Which tokens become which, for a batch."""

    def apply(self, tokens: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens (B, n, C) with sizes (B, n) float32, None where all are 1, to fewer: (B, n', C) and (B, n')."""
        ...

    def count(self, key_size: Tensor | None, sizes: Tensor | None, total: Tensor) -> Tensor | None:
        """How often attention counts the new tokens (B, n'), None where once each.

        Args:
            key_size: (B, n) float32, how often it counts the former ones, None where once each.
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
