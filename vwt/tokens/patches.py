"""Images to patches to features, in pixel or embedding space.

Patches are in row-major order of the grid. In pixel space a patch is its normalised pixels, channel first
(C, ph, pw) and flattened; in embedding space it is the output of the model's patch projection, without position.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Space = Literal["pixel", "embedding"]


SPACES: tuple[Space, ...] = ("pixel", "embedding")


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Images (B, C, H, W) uint8 in [0, 255] to float32 as the model was trained: x / 255, minus mean, over std."""
    scale, shift = torch.tensor([(1 / (255 * s), -m / s) for m, s in zip(mean, std, strict=True)]).T
    scale, shift = (t.to(images.device).view(1, -1, 1, 1) for t in (scale, shift))
    return images.float().mul_(scale).add_(shift)


def patchify(images: Tensor, patch_size: tuple[int, int], grid: tuple[int, int] | None = None) -> Tensor:
    """Images (B, C, H, W) to flattened patches (B, N, C·ph·pw).

    Where the image is no multiple of the patch, `grid` says how many patches the model sees: the image is padded with
    zeros or cut at the right and the bottom, as the projection does.

    >>> patchify(torch.arange(16.0).view(1, 1, 4, 4), (2, 2))[0, 1]
    tensor([2., 3., 6., 7.])
    """
    batch, channels, height, width = images.shape
    ph, pw = patch_size
    rows, columns = grid or (height // ph, width // pw)
    if (rows * ph, columns * pw) != (height, width):
        images = F.pad(images, (0, columns * pw - width, 0, rows * ph - height))
    cells = images.reshape(batch, channels, rows, ph, columns, pw)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * ph * pw)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`: flattened patches (B, N, C·ph·pw) to images (B, C, H, W)."""
    batch, (ph, pw), (rows, columns) = patches.shape[0], patch_size, grid
    cells = patches.reshape(batch, rows, columns, -1, ph, pw)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, rows * ph, columns * pw)
