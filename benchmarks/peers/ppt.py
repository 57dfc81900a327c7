"""Token Pruning and Pooling, PPT (Wu et al., 2023, arXiv 2310.01812)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers._peer import Attended, Peer, merge, select
from peers.tome import match_pairs

THRESHOLD = 7e-5  # of the published run of DeiT-S, which removes 50 tokens in blocks 3, 6 and 9


class PruneOrPool(Peer):
    """Where the scores of an image's patches vary, the lowest are dropped; else the most similar pairs merge.

    Score: class attention times the length of the value, of which the patches' sum is 1. Pairs are those of `ToMe`,
    attention is proportional.

    Args:
        model: see `Peer`.
        removed: see `Peer`.
        threshold: variance of the scores from which on patches are dropped.
    """

    def __init__(self, model: nn.Module, removed: Mapping[int, int], threshold: float = THRESHOLD) -> None:
        super().__init__(model, removed)
        self.threshold = threshold

    @staticmethod
    def most(patches: int) -> int:
        """See `Peer`: as many as pairs can be."""
        return patches // 2

    def reduce(self, block: int, attended: Attended, tokens: Tensor, left: int) -> tuple[Tensor, Tensor]:
        """See `Peer`."""
        scores = significance(attended.of_class_token().float(), attended.value.float())
        rows = match_pairs(attended.keys.mean(dim=1), tokens.shape[1] - left)
        pooled, pooled_size = merge(tokens, attended.size, rows, left)
        kept = F.pad(scores.topk(left - 1, dim=1).indices.sort(dim=1).values + 1, (1, 0))
        kept_size = torch.ones_like(pooled_size) if attended.size is None else attended.size.gather(1, kept)
        prunes = (scores.var(dim=1) >= self.threshold)[:, None]
        return torch.where(prunes[..., None], select(tokens, kept), pooled), torch.where(prunes, kept_size, pooled_size)


def significance(attention: Tensor, value: Tensor) -> Tensor:
    """Class attention (B, m) and values (B, H, m + 1, d) to the patches' scores (B, m), whose sum is 1."""
    score = attention * value.transpose(1, 2).flatten(2).norm(dim=-1)[:, 1:]
    return score / score.sum(dim=1, keepdim=True)
