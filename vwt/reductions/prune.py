"""Prune: the least important patches become one token, their mean."""

import torch
from torch import Tensor

from vwt.reductions.assignment import Assignment
from vwt.reductions.observe import attention_received, explicitly
from vwt.reductions.reduction import Reduction
from vwt.tokens.attention import Attend, attend_explicitly


def prune(scores: Tensor, removed: int, prefix: int) -> Assignment:
    """Keep the patches with the highest scores (B, m); the `removed` + 1 others become one token, R fewer in all.

    Kept patches stay in their order; the mean of the others comes last.
    """
    order = scores.sort(dim=1, descending=True).indices
    last = scores.shape[1] - removed - 1
    dropped = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, last:], True)
    return Assignment(torch.where(dropped, last, (~dropped).cumsum(dim=1) - 1), last + 1, prefix)


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
        return explicitly(seen, lambda query, key, value, weights: importance(query, key, value, prefix, weights))

    @staticmethod
    def key_size(
        assignment: Assignment, key_size: Tensor | None, sizes: Tensor | None, total: Tensor, following: float
    ) -> Tensor | None:
        """See `Reduction`: the mean of several counts once."""
        if key_size is None:
            return None
        members = assignment.sum(torch.ones_like(key_size))
        return torch.where(members > 1, 1.0, assignment.sum(key_size))

    def assign(self, seen: Tensor, tokens: Tensor, prefix: int, following: float) -> Assignment:
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
    received = attention_received(weights, prefix)
    energy = value.amax(dim=1).sum(dim=-1, dtype=torch.float32).softmax(dim=-1)
    # Where prefix tokens get all attention, all patches get none.
    return received / received.amax(dim=-1, keepdim=True).clamp_min(1e-30) + energy[:, prefix:]
