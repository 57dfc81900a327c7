"""Which patch tokens of a block become which, and the weighted mean that carries it out.

Shapes as in `vwt.reductions.reduction`: B images, n tokens of which the first P are prefix tokens and m = n - P are
patches (or words).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vwt.tokens.tensors import flat_index


@dataclass(frozen=True, eq=False)
class Assignment:
    """The new token of each patch token, for a batch; prefix tokens stay as they are, and come first.

    Attributes:
        target: (B, m) int64, the new token of each patch token, from 0 to k - 1; each of these is taken.
        count: k, new patch tokens.
        prefix: P.
        weight: (B, m) float32, how often each counts in the mean, beside its size; None where once each.
    """

    target: Tensor
    count: int
    prefix: int
    weight: Tensor | None = None

    def apply(self, tokens: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens (B, n, C) to the means of those that become one (B, P + k, C), and how many patches these stand for.

        Sums are accumulated in float32 for lower precisions.

        Args:
            tokens: or whatever else is to be averaged in the same way.
            sizes: (B, n) float32, patches that each token stands for, 1 for prefix tokens; None where all are 1.

        Returns:
            The means, and the new sizes (B, P + k) float32.
        """
        own = None if sizes is None else sizes[:, self.prefix :]
        weight = own if self.weight is None else self.weight if own is None else own * self.weight
        patches = tokens[:, self.prefix :].to(torch.promote_types(tokens.dtype, torch.float32))
        if weight is None:
            weighted = F.pad(patches, (0, 1), value=1.0)
        else:
            weighted = torch.cat([patches * weight[..., None], weight[..., None]], dim=-1)
        sums = self._sum(weighted)
        means = (sums[..., :-1] / sums[..., -1:]).to(tokens.dtype)
        if self.weight is None:
            total = sums[..., -1].float()
        else:
            total = self._sum((torch.ones_like(self.weight) if own is None else own)[..., None])[..., 0]
        return torch.cat([tokens[:, : self.prefix], means], dim=1), F.pad(total, (self.prefix, 0), value=1.0)

    def sum(self, values: Tensor) -> Tensor:
        """Values (B, n) of tokens to their sums over those that become one (B, P + k)."""
        return torch.cat([values[:, : self.prefix], self._sum(values[:, self.prefix :, None])[..., 0]], dim=1)

    def _sum(self, values: Tensor) -> Tensor:
        """Values (B, m, C) of patch tokens to their sums (B, k, C)."""
        sums = values.new_zeros(values.shape[0] * self.count, values.shape[2])
        index = flat_index(self.target, self.count)
        return sums.index_add(0, index, values.flatten(0, 1)).view(values.shape[0], self.count, values.shape[2])
