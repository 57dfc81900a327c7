"""Dropping patches at random: the yardstick that every other way must beat at the same count."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers._peer import Attended, Peer, select
from vwt.errors import ArgumentError
from vwt.models.spec import PatchSpec
from vwt.tokens.patches import Space
from vwt.tokens.words import Words, keep_patches


def draw(pixels: Tensor, patches: int, count: int, seed: int) -> Tensor:
    """So many of each image's patches, drawn by its own pixels (B, ..., D) and the seed: (B, count) int64, ascending.

    So that batch mates do not matter.
    """
    bits = pixels.float().flatten(1).contiguous().view(torch.int32).sum(dim=1).tolist()
    draws = [torch.rand(patches, generator=torch.Generator().manual_seed(own ^ seed)) for own in bits]
    return torch.stack(draws).topk(count, dim=1).indices.sort(dim=1).values.to(pixels.device)


class RandomDrop(nn.Module):
    """A strategy that drops patches at random.

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
        return keep_patches(draw(features, patches, count, self.seed), grid)


class RandomDropInside(Peer):
    """The same inside blocks.

    Args:
        model: see `Peer`.
        removed: see `Peer`.
        seed: of the draw.
    """

    def __init__(self, model: nn.Module, removed: Mapping[int, int], seed: int = 0) -> None:
        super().__init__(model, removed)
        self.seed = seed

    def reduce(self, block: int, attended: Attended, tokens: Tensor, left: int) -> tuple[Tensor, None]:
        """See `Peer`; drawn by the tokens, which are the image's own."""
        kept = draw(tokens, tokens.shape[1] - 1, left - 1, self.seed) + 1
        return select(tokens, F.pad(kept, (1, 0))), None
