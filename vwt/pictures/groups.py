"""Images with the patches of each word in one colour. Needs Pillow."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from vwt.pictures.figures import save_figure, subplots
from vwt.tokens.words import Words


def colour_groups(image: Tensor, words: Words, index: int = 0, strength: float = 0.55) -> Tensor:
    """One image with the patches of each word in one colour.

    Tokens of a single patch stay as they are; dropped patches become grey and dark.

    Args:
        image: (3, H, W) float in [0, 1].
        words: of a batch.
        index: of the image in that batch.
        strength: of the colour, in [0, 1].

    Returns:
        (3, H, W) float in [0, 1].
    """
    group = words.group[index].cpu()
    members = torch.bincount(group[group >= 0], minlength=1)[group.clamp(min=0)]
    rows, columns = words.grid
    height, width = image.shape[-2:]

    def per_pixel(values: Tensor) -> Tensor:
        grid = values.view(-1, rows, columns).float()
        return torch.nn.functional.interpolate(grid[None], (height, width), mode="nearest")[0]

    shared = per_pixel((members > 1) & (group >= 0)) * strength
    dropped = per_pixel(group < 0)
    coloured = image * (1 - shared) + per_pixel(_hues(group).T) * shared
    return coloured * (1 - dropped) + 0.3 * image.mean(0, keepdim=True) * dropped


def _hues(group: Tensor) -> Tensor:
    """A colour (N, 3) for each group; steps of the golden ratio keep neighbouring numbers apart."""
    hue = (group.float() * 0.618034) % 1.0
    phase = hue[:, None] * 6 + torch.tensor([0.0, 4.0, 2.0])
    return (torch.abs(phase % 6 - 3) - 1).clamp(0, 1)


def save_groups(
    path: str | os.PathLike[str], images: Tensor, words: Words, titles: Sequence[str], *, heading: str = ""
) -> None:
    """Write a PNG with each image (B, 3, H, W) in [0, 1] above the same image with its words in colour.

    Raises:
        ArgumentError: if matplotlib is not installed.
        DocumentError: if the file cannot be written.
    """
    figure, axes = subplots(2, len(images))
    for column, (image, title) in enumerate(zip(images, titles, strict=True)):
        for row, shown in enumerate((image, colour_groups(image, words, column))):
            axes[row][column].imshow(shown.permute(1, 2, 0).clamp(0, 1).numpy())
            axes[row][column].axis("off")
        axes[0][column].set_title(title, fontsize=9)
    figure.suptitle(heading)
    save_figure(figure, path, dpi=120, bbox_inches="tight")
