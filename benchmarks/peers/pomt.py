"""Prune One More Token (Eliopoulos et al., WACV 2025, arXiv 2407.05941) in the paper's way."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers._peer import Attended, Peer, select
from vwt.errors import ArgumentError


class PruneOneMoreToken(Peer):
    """Every block computes its attention explicitly, although one prunes.

    An image's scores are divided by its own maximum, so that the answers are those of `vwt.Prune`.

    Args:
        model: see `Peer`.
        removed: R; R + 1 patches become one token, their mean.
        block: index of the block that prunes.
    """

    explicit = True

    def __init__(self, model: nn.Module, removed: int, block: int = 3) -> None:
        super().__init__(model)
        blocks = len(self.model.blocks)
        if removed < 1 or not 0 <= block < blocks:
            raise ArgumentError(
                f"removed is {removed}, block {block}; expected at least 1 patch, and a block below {blocks}"
            )
        self.removed, self.block = removed, block

    def remaining(self, block: int, tokens: int) -> int:
        """See `Peer`.

        Raises:
            ArgumentError: if there are too few tokens.
        """
        if block != self.block:
            return tokens
        if tokens < self.removed + 2:  # class token, and the mean of R + 1 patches
            raise ArgumentError(f"R is {self.removed}; expected less than {tokens - 1}, the patches that there are")
        return tokens - self.removed

    def reduce(self, attended: Attended, tokens: Tensor, size: Tensor | None, left: int) -> tuple[Tensor, None]:
        """See `Peer`."""
        assert attended.weights is not None
        received = attended.weights.amax(dim=1)[:, 1:, 1:].sum(dim=1)
        energy = attended.value.amax(dim=1).sum(dim=-1).softmax(dim=-1)[:, 1:]
        score = received / received.amax(dim=-1, keepdim=True) + energy
        order = score.sort(dim=1, descending=True).indices + 1
        kept, dropped = order.split([left - 2, self.removed + 1], dim=1)
        kept = F.pad(kept.sort(dim=1).values, (1, 0))
        return torch.cat([select(tokens, kept), select(tokens, dropped).mean(dim=1, keepdim=True)], dim=1), None
