"""Token Merging, ToMe (Bolya et al., ICLR 2023, arXiv 2210.09461), with proportional attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

from peers._peer import Attended, Peer, merge


class TokenMerging(Peer):
    """The most similar pairs of tokens become their size-weighted mean; the paper does so in every block."""

    @staticmethod
    def most(patches: int) -> int:
        """See `Peer`: every other token can merge into one of the rest."""
        return patches // 2

    def reduce(self, block: int, attended: Attended, tokens: Tensor, left: int) -> tuple[Tensor, Tensor]:
        """See `Peer`."""
        rows = match_pairs(attended.keys.mean(dim=1), tokens.shape[1] - left)
        return merge(tokens, attended.size, rows, left)


def match_pairs(metric: Tensor, r: int) -> Tensor:
    """Bipartite soft matching: even tokens propose to odd tokens, and the r most similar pairs merge.

    Args:
        metric: (B, n, d), compared by cosine; token 0 is the class token, which never merges into another.
        r: pairs, at most (n - 1) // 2.

    Returns:
        The place of each token (B, n) int64 in the merged sequence of n - r: first the even tokens that stay, then the
        odd ones.
    """
    metric = F.normalize(metric, dim=-1)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(-2, -1)
    best, partner = similarity.max(dim=-1)  # (B, ceil(n / 2))
    best[:, 0] = -torch.inf
    merged = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(r, dim=1).indices, True)
    stay = best.shape[1] - r
    rows = partner.new_empty(metric.shape[:2])
    rows[:, ::2] = torch.where(merged, stay + partner, (~merged).cumsum(dim=1) - 1)
    rows[:, 1::2] = torch.arange(stay, metric.shape[1] - r, device=metric.device)
    return rows
