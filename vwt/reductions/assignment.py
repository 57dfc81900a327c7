"""Which patch tokens of a block become which, and the weighted mean that carries it out.

Shapes as in `vwt.reductions.reduction`: B images, n tokens of which the first P are prefix tokens and m = n - P are
patches (or words).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vwt.tokens.tensors import flat_index, lazy_property, numbers, select, sum_at


@dataclass(frozen=True, eq=False)
class Assignment:
    """The new token of each patch token, for a batch; prefix tokens stay as they are, and come first.

    Attributes:
        target: (B, m) int64, the new token of each patch token, from 0 to k - 1; each of these is taken.
        count: k, new patch tokens.
        prefix: P.
        kept: (B, k) int64, for each new token the patch token that counts twice in its mean; None where all count once.
    """

    target: Tensor
    count: int
    prefix: int
    kept: Tensor | None = None

    @property
    def weight(self) -> Tensor | None:
        """(B, m) float32, how often each patch token counts in its mean, beside its size; None where all count once."""
        if self.kept is None:
            return None
        return torch.ones(self.target.shape, device=self.target.device).scatter(1, self.kept, 2.0)

    def apply(self, tokens: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens (B, n, C) to the means of those that become one (B, P + k, C), and how many patches these stand for.

        Sums are accumulated in float32 for lower precisions.

        Args:
            tokens: or whatever else is to be averaged in the same way.
            sizes: (B, n) float32, patches that each token stands for, 1 for prefix tokens; None where all are 1.

        Returns:
            The means, and the new sizes (B, P + k) float32.
        """
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        if sizes is None:
            sizes = wide.new_ones(tokens.shape[:2], dtype=torch.float32)
        else:
            wide = wide * sizes[..., None]
        total = count = self.sum(sizes)
        if self.kept is None:
            sums = self.sum(wide)
        else:
            twice = with_prefix(self.kept, self.prefix)  # prefix tokens too, which changes no mean
            sums = self._add(wide, select(wide, twice))
            count = total + sizes.gather(1, twice)
        return (sums / count[..., None]).to(tokens.dtype), total

    def sum(self, values: Tensor) -> Tensor:
        """Values (B, n, ...) of tokens to their sums over those that become one (B, P + k, ...)."""
        return self._add(values, values.new_zeros(values.shape[0], self.prefix + self.count, *values.shape[2:]))

    def _add(self, values: Tensor, to: Tensor) -> Tensor:
        """The same, added to what is (B, P + k, ...)."""
        if torch.compiler.is_exporting():
            return to + sum_at(values, with_prefix(self.target, self.prefix), self.prefix + self.count)
        return to.flatten(0, 1).index_add(0, self._rows, values.flatten(0, 1)).view(to.shape)

    @lazy_property
    def _rows(self) -> Tensor:
        """Row of the new token of each token, prefix tokens too, image after image: (B·n,)."""
        return flat_index(with_prefix(self.target, self.prefix), self.prefix + self.count)


def with_prefix(index: Tensor, prefix: int) -> Tensor:
    """Numbers (B, k) of patch tokens to those of all tokens, prefix tokens first: (B, P + k)."""
    first = numbers(prefix, index.device).expand(index.shape[0], -1)
    return torch.cat([first, index + prefix], dim=1)
