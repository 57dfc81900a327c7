"""Prune One More Token (Eliopoulos et al., WACV 2025, arXiv 2407.05941) in the paper's way."""

import torch
import torch.nn.functional as F
from torch import Tensor

from peers._peer import Attended, Peer, select


class PruneOneMoreToken(Peer):
    """R + 1 patches become one token, their mean, so that R are removed; the paper does so in block 3.

    Every block computes its attention explicitly, although one prunes. An image's scores are divided by its own
    maximum, so that the answers are those of `vwt.Prune`.
    """

    explicit = True

    def reduce(self, block: int, attended: Attended, tokens: Tensor, left: int) -> tuple[Tensor, None]:
        """See `Peer`."""
        assert attended.weights is not None
        received = attended.weights.amax(dim=1)[:, 1:, 1:].sum(dim=1)
        energy = attended.value.amax(dim=1).sum(dim=-1).softmax(dim=-1)[:, 1:]
        score = received / received.amax(dim=-1, keepdim=True) + energy
        order = score.sort(dim=1, descending=True).indices + 1
        kept, dropped = order.tensor_split([left - 2], dim=1)
        kept = F.pad(kept.sort(dim=1).values, (1, 0))
        return torch.cat([select(tokens, kept), select(tokens, dropped).mean(dim=1, keepdim=True)], dim=1), None
