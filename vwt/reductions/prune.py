"""Prune: the least important patches become one token, their mean."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vwt.reductions.assignment import _means, _with_sizes
from vwt.reductions.observe import _explicitly, _received
from vwt.reductions.reduction import Reduction
from vwt.tokens.attention import Attend, attend_explicitly
from vwt.tokens.tensors import select


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

    def count(self, key_size: Tensor | None, sizes: Tensor | None, total: Tensor) -> Tensor | None:
        """See `Plan`; the mean of several counts once."""
        if key_size is None:
            return None
        alone = self.dropped.shape[1] == 1  # nothing is removed
        chosen = torch.cat([self.kept, self.dropped], dim=1) if alone else self.kept
        kept = select(key_size[..., None], chosen + self.prefix)[..., 0]
        mean = torch.ones_like(key_size[:, : 0 if alone else 1])
        return torch.cat([key_size[:, : self.prefix], kept, mean], dim=1)

    def places(self) -> Tensor:
        """See `Plan`."""
        batch, kept = self.kept.shape
        places = self.kept.new_full((batch, kept + self.dropped.shape[1]), kept)
        return places.scatter(1, self.kept, torch.arange(kept, device=places.device).expand(batch, -1))

    def times(self) -> None:
        """See `Plan`."""


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
