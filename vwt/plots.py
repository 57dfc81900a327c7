"""Pictures of words, groups, profiles and schedules. Needs matplotlib: `pip install vwt[plots]`."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vwt.errors import ArgumentError
from vwt.profile import LatencyProfile
from vwt.schedule import down_to, utility
from vwt.words import Words


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
    members = torch.bincount(group.clamp(min=0), minlength=1)[group.clamp(min=0)]
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
    """
    figure, axes = subplots(2, len(images))
    for column, (image, title) in enumerate(zip(images, titles, strict=True)):
        for row, shown in enumerate((image, colour_groups(image, words, column))):
            axes[row][column].imshow(shown.permute(1, 2, 0).clamp(0, 1).numpy())
            axes[row][column].axis("off")
        axes[0][column].set_title(title, fontsize=9)
    figure.suptitle(heading)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def plot_profile(path: str | os.PathLike[str], profile: LatencyProfile) -> None:
    """Draw the latency of a block over tokens, its knees, and predicted against measured forwards.

    Raises:
        ArgumentError: if matplotlib is not installed.
    """
    figure, axes = subplots(1, 2, size=(5.5, 4.2))
    left, right = axes[0]
    left.plot(profile.counts, profile.block, marker=".", label="one block")
    left.plot(profile.counts, profile.attention, marker=".", label="of that, up to its attention")
    left.plot(profile.counts, profile.counting, linestyle=":", label="one block after a merge")
    for count in profile.knees():
        left.axvline(count, color="0.7", linestyle="--", linewidth=1)
        left.annotate(f"{count}", (count, 0), fontsize=8, color="0.4", ha="center")
    left.set(xlabel="tokens (dashed: knees)", ylabel="milliseconds a batch", ylim=(0, None))
    left.legend(fontsize=8)
    measured, predicted = ([check[name] for check in profile.checks] for name in ("measured", "predicted"))
    right.plot([0, max(measured, default=1)], [0, max(measured, default=1)], color="0.7", linewidth=1)
    right.plot(measured, predicted, "o")
    right.set(xlabel="measured forward, ms", ylabel="predicted, ms", title=f"median error {100 * profile.error:.1f} %")
    machine = profile.machine
    figure.suptitle(
        f"{profile.model}, batch {profile.batch_size}, {profile.dtype}\n{machine['cpu']}, {machine['device']}, "
        f"{machine['threads']} threads, torch {machine['torch']}",
        fontsize=8,
    )
    figure.savefig(path, dpi=120)


def plot_utility(
    path: str | os.PathLike[str], profile: LatencyProfile, accuracy: Mapping[int, float], alpha: float, block: int
) -> None:
    """Draw latency, accuracy and utility over the tokens that are left, and the choice.

    Raises:
        ArgumentError: if matplotlib is not installed.
    """
    curve = utility(profile, accuracy, alpha, block)
    counts = list(curve)
    latency = [profile.predict(down_to(profile, block, n)) / profile.predict() for n in counts]
    figure, axes = subplots(1, 1, size=(6.5, 4.2))
    axes = axes[0][0]
    axes.plot(counts, latency, label="latency, of the full model's")
    axes.plot(counts, [accuracy[n] for n in counts], marker=".", label="accuracy under random removal")
    axes.plot(counts, [curve[n] for n in counts], marker="o", label=f"utility, alpha {alpha:g}")
    best = max(curve, key=lambda n: (curve[n], n))
    axes.axvline(best, color="0.7", linestyle="--", linewidth=1)
    axes.set(xlabel=f"tokens left after block {block}", ylim=(0, None), title=f"{profile.model}: {best} tokens")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def check_picture(path: str | os.PathLike[str] | None) -> None:
    """Raise ArgumentError, before anything is measured, if a picture is asked for that cannot be drawn."""
    if path is None:
        return
    path = Path(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise ArgumentError("pictures need matplotlib; pip install 'vwt[plots]'")
    if path.suffix.lower() not in (".png", ".svg", ".pdf") or not path.parent.is_dir():
        raise ArgumentError(f"cannot draw {path}; expected a .png, .svg or .pdf in a folder that exists")


def subplots(rows: int, columns: int, size: tuple[float, float] = (2.4, 2.5)) -> tuple[Any, Any]:
    """A figure without pyplot, and its axes (rows, columns), each of a size in inches.

    Raises:
        ArgumentError: if matplotlib is not installed.
    """
    figure = new_figure(size[0] * columns, size[1] * rows)
    return figure, figure.subplots(rows, columns, squeeze=False)


def new_figure(width: float, height: float, layout: Literal["tight", "constrained"] = "tight") -> Any:
    """An empty figure without pyplot, of a size in inches, with one of matplotlib's layouts.

    Raises:
        ArgumentError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError("pictures need matplotlib; pip install 'vwt[plots]'") from error
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure
