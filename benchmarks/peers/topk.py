"""The patches that the class token attends to most, as in EViT (Liang et al., ICLR 2022, arXiv 2202.07800)."""

import torch.nn.functional as F
from torch import Tensor, nn

from peers._peer import Attended, Peer, select
from vwt.errors import ArgumentError


class ClassAttentionTopK(Peer):
    """Keep so many patches in one block, without EViT's token for what was dropped.

    Attention stays fused; only the class token's row is computed once more.

    Args:
        model: see `Peer`.
        keep: patches to keep.
        block: index of the block.
    """

    def __init__(self, model: nn.Module, keep: int, block: int = 3) -> None:
        super().__init__(model)
        blocks = len(self.model.blocks)
        if keep < 1 or not 0 <= block < blocks:
            raise ArgumentError(f"keep is {keep}, block {block}; expected at least 1 patch, and a block below {blocks}")
        self.keep, self.block = keep, block

    def remaining(self, block: int, tokens: int) -> int:
        """See `Peer`."""
        return min(tokens, self.keep + 1) if block == self.block else tokens

    def reduce(self, attended: Attended, tokens: Tensor, size: Tensor | None, left: int) -> tuple[Tensor, None]:
        """See `Peer`."""
        scale = attended.query.shape[-1] ** -0.5
        row = (attended.query[:, :, :1] * scale) @ attended.keys.transpose(-2, -1)  # (B, H, 1, n)
        score = row.softmax(dim=-1).mean(dim=1)[:, 0, 1:]
        kept = score.topk(left - 1, dim=1).indices.sort(dim=1).values + 1
        return select(tokens, F.pad(kept, (1, 0))), None
