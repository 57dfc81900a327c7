"""The patches that the class token attends to most, as in EViT (Liang et al., ICLR 2022, arXiv 2202.07800)."""

import torch.nn.functional as F
from torch import Tensor

from peers._peer import Attended, Peer, select


class ClassAttentionTopK(Peer):
    """Drop the patches that the class token attends to least, without EViT's token for what was dropped.

    Attention stays fused; only the class token's row is computed once more.
    """

    def reduce(self, block: int, attended: Attended, tokens: Tensor, left: int) -> tuple[Tensor, None]:
        """See `Peer`."""
        kept = attended.of_class_token().topk(left - 1, dim=1).indices.sort(dim=1).values + 1
        return select(tokens, F.pad(kept, (1, 0))), None
