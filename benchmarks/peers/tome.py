"""Token Merging, ToMe (Bolya et al., ICLR 2023, arXiv 2210.09461), with proportional attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers._peer import Attended, Peer
from vwt.errors import ArgumentError


class TokenMerging(Peer):
    """In every block, the r most similar pairs of tokens become their size-weighted mean.

    Args:
        model: see `Peer`.
        r: pairs to merge in each block; where fewer tokens are left, as many as there can be.
    """

    def __init__(self, model: nn.Module, r: int) -> None:
        super().__init__(model)
        if r < 0:
            raise ArgumentError(f"r is {r}; expected a number of pairs a block of at least 0")
        self.r = r

    def remaining(self, block: int, tokens: int) -> int:
        """See `Peer`."""
        return tokens - min(self.r, (tokens - 1) // 2)

    def reduce(self, attended: Attended, tokens: Tensor, size: Tensor | None, left: int) -> tuple[Tensor, Tensor]:
        """See `Peer`."""
        rows = match_pairs(attended.keys.mean(dim=1), tokens.shape[1] - left)
        return merge_pairs(tokens, size, rows, left)


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


def merge_pairs(tokens: Tensor, size: Tensor | None, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Size-weighted means of the tokens of each place.

    Args:
        tokens: (B, n, C).
        size: (B, n) float32, patches in each token; None where all are 1.
        rows: (B, n) int64, the place of each token.
        count: places.

    Returns:
        Tokens (B, count, C) and their sizes (B, count) float32.
    """
    batch, _, width = tokens.shape
    if size is None:
        size = tokens.new_ones(rows.shape, dtype=torch.float32)
    index = (rows + torch.arange(0, batch * count, count, device=rows.device)[:, None]).flatten()
    total = size.new_zeros(batch * count).index_add_(0, index, size.flatten())
    # Shares of at most 1, so that no sum is larger than its terms in half precision.
    share = (size.flatten() / total[index]).to(tokens.dtype)
    merged = tokens.new_zeros(batch * count, width).index_add_(0, index, tokens.flatten(0, 1) * share[:, None])
    return merged.view(batch, count, width), total.view(batch, count)
