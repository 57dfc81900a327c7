"""The intra-image mode of the Visual Word Tokenizer."""

import torch
from torch import Tensor, nn

from vwt.errors import ArgumentError
from vwt.models.spec import PatchSpec
from vwt.tokens.patches import Space
from vwt.tokens.words import Words, keep_patches


class IntraImage(nn.Module):
    """Keep the patches of highest pixel variance (Visual Word Tokenizer, intra-image mode; arXiv 2411.15397).

    A patch scores the unbiased variance of its normalised pixels; the int(N · (1 - drop)) highest are kept as they
    are, in row-major order, and the others are dropped.

    Args:
        drop: share of patches to drop, in [0, 1); the paper uses 0.25, 0.33 and 0.5.
    """

    space: Space = "pixel"
    fixed_count = True

    def __init__(self, drop: float = 0.5) -> None:
        super().__init__()
        if not 0 <= drop < 1:
            raise ArgumentError(f"drop is {drop}; expected a share in [0, 1)")
        self.drop = drop

    def bind(self, spec: PatchSpec) -> "IntraImage":
        """The strategy itself: it serves any model."""
        return self

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Words:
        """Normalised pixel patches (B, N, C·ph·pw) to Words of max(1, int(N · (1 - drop))) tokens an image."""
        count = max(1, int(features.shape[1] * (1 - self.drop) + 1e-9))
        centred = features.float() - features.float().mean(dim=-1, keepdim=True)
        score = torch.linalg.vector_norm(centred, dim=-1)  # rises with the variance
        return keep_patches(score.topk(count, dim=1).indices.sort(dim=1).values, grid)

    def extra_repr(self) -> str:
        """For repr()."""
        return f"drop={self.drop}"
