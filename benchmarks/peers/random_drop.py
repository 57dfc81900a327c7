"""Dropping patches at random: the yardstick that every strategy must beat at the same count."""

import torch
from torch import Tensor, nn

from vwt.errors import ArgumentError
from vwt.models.spec import PatchSpec
from vwt.tokens.patches import Space
from vwt.tokens.words import Words, keep_patches


class RandomDrop(nn.Module):
    """A strategy that drops patches at random.

    What is drawn depends on an image's own pixels and the seed, so that batch mates do not matter.

    Args:
        drop: share of the patches, in [0, 1).
        seed: of the draw.
    """

    space: Space = "pixel"
    fixed_count = True
    size_exponent = 0.0

    def __init__(self, drop: float, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= drop < 1:
            raise ArgumentError(f"drop is {drop}; expected a share in [0, 1)")
        self.drop, self.seed = drop, seed

    def bind(self, spec: PatchSpec) -> "RandomDrop":
        """The strategy itself: it serves any model."""
        return self

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Words:
        """Pixel patches (B, N, D) to Words of N - int(N · drop) tokens an image."""
        patches = features.shape[1]
        count = max(1, patches - int(patches * self.drop + 1e-9))
        bits = features.float().view(torch.int32).sum(dim=(1, 2)).tolist()
        draws = [torch.rand(patches, generator=torch.Generator().manual_seed(own ^ self.seed)) for own in bits]
        kept = torch.stack(draws).topk(count, dim=1).indices.sort(dim=1).values
        return keep_patches(kept.to(features.device), grid)
