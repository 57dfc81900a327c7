"""One figure of what becomes of an image, from left to right: its words, what each reduction leaves, the answer.

Needs matplotlib: `pip install vwt[plots]`.
"""

import itertools
import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vwt.codebook.codebook import Codebook
from vwt.pictures.answers import Answers, Photographs, answer
from vwt.pictures.figures import SLIDE, new_figure, save_figure
from vwt.pictures.palette import MODEL, PLAN, look
from vwt.pictures.stages import DROPPED, Stage, stages
from vwt.pictures.tiles import colours, frequent, word_tiles
from vwt.tokenizer import VWTokenizer

ACROSS = 5  # panels in a row at most
GAP = 2  # pixels between patches
TINT, DIM = 0.42, 0.22  # of a merged patch, by the colour of its keeper; what is left of a dropped one
INSET = 0.06  # of an outline, in patches, so that those of neighbours lie beside each other


def save_stages(
    path: str | os.PathLike[str],
    image: Tensor,
    fast: VWTokenizer,
    codebook: Codebook | None = None,
    images: Tensor | None = None,
    *,
    heading: str = "",
) -> None:
    """Draw an image, what is left of it before the blocks and after each reduction, and the answer before and after.

    Dropped patches are dark. Patches of one token have an outline of one colour, and all but the one of largest share
    are tinted with it. Below are the most frequent words of the codebook: pixel words as they are, embedding words by
    their nearest patches.

    Args:
        path: .png, .svg or .pdf.
        image: (C, H, W) uint8, of the model's size.
        fast: with a strategy, a schedule or both.
        codebook: whose words are shown.
        images: (n, C, H, W) uint8, in which the nearest patches are sought; by default the image alone.
        heading: above all, before what becomes of the tokens.

    Raises:
        ArgumentError: if matplotlib is not installed.
        MismatchError: if the codebook was made for another model.
        DocumentError: if the file cannot be written.
    """
    left, plain = stages(fast, image), colours(image)
    everything = fast.backbone.prefix + len(left[0].keeper)
    panels: list[Stage | Answers | None] = [None, *(left if fast.strategy is not None else left[1:])]
    if fast.family.has_classes:
        panels.append(answer(fast, Photographs(image[None], [""], [], False)))
    tiles = None if codebook is None else word_tiles(fast, codebook, image[None] if images is None else images)
    rows = math.ceil(len(panels) / ACROSS)
    across = math.ceil(len(panels) / rows)
    side = SLIDE / max(across, 4)
    heights = [side + 0.3] * rows + ([] if tiles is None else [0.8 + 0.5 * tiles.shape[0]])
    figure = new_figure(side * across, sum(heights) + 0.5, layout="constrained")
    layout = figure.add_gridspec(len(heights), across, height_ratios=heights)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(layout[index // across, index % across])
        if isinstance(panel, Answers):
            _draw_answer(axes, panel)
            continue
        axes.imshow((plain if panel is None else tint(plain, panel)).permute(1, 2, 0).clamp(0, 1).numpy())
        axes.axis("off")
        axes.set_title(f"the image: {everything} tokens" if panel is None else panel.title, fontsize=11)
        if panel is not None:
            _outline(axes, panel, plain.shape[1:])
    if codebook is not None and tiles is not None:
        _draw_words(figure.add_subplot(layout[rows, :]), codebook, tiles)
    became = f"{everything} tokens become {left[-1].tokens}"
    figure.suptitle(f"{heading}: {became}" if heading else became, fontsize=12)
    save_figure(figure, path, dpi=160)


def tint(image: Tensor, stage: Stage) -> Tensor:
    """An image (3, H, W) in [0, 1]: dropped patches dark, merged ones in the colour of the one they merged into."""
    rows, columns = stage.grid
    keeper = stage.keeper

    def per_pixel(values: Tensor) -> Tensor:
        grid = values.view(-1, rows, columns).float()
        return F.interpolate(grid[None], image.shape[1:], mode="nearest")[0]

    merged = per_pixel((keeper != torch.arange(len(keeper))) & (keeper != DROPPED)) * TINT
    dropped = per_pixel(keeper == DROPPED)
    tinted = image * (1 - merged) + per_pixel(hues(keeper).T) * merged
    return tinted * (1 - dropped) + DIM * image.mean(0, keepdim=True) * dropped


def hues(number: Tensor) -> Tensor:
    """A colour (n, 3) for each number; steps of the golden ratio keep neighbouring ones apart."""
    hue = (number.float() * 0.618034) % 1.0
    phase = hue[:, None] * 6 + torch.tensor([0.0, 4.0, 2.0])
    return (torch.abs(phase % 6 - 3) - 1).clamp(0, 1)


def _outline(axes: Any, stage: Stage, size: Any) -> None:
    """Draw a line around the tokens of several patches, in an image of (height, width) pixels."""
    from matplotlib.collections import LineCollection

    rows, columns = stage.grid
    keeper, shared = stage.keeper.view(rows, columns), stage.shared
    high, wide = size[0] / rows, size[1] / columns
    lines, drawn = [], []
    for row, column in itertools.product(range(rows), range(columns)):
        own = int(keeper[row, column])
        if own not in shared:
            continue
        top, bottom, start, end = row + INSET, row + 1 - INSET, column + INSET, column + 1 - INSET
        sides = {
            (row - 1, column): ((start, top), (end, top)),
            (row + 1, column): ((start, bottom), (end, bottom)),
            (row, column - 1): ((start, top), (start, bottom)),
            (row, column + 1): ((end, top), (end, bottom)),
        }
        for (beside, at), line in sides.items():
            inside = beside in range(rows) and at in range(columns)
            if not inside or int(keeper[beside, at]) != own:
                lines.append([(x * wide - 0.5, y * high - 0.5) for x, y in line])
                drawn.append(own)
    every = hues(torch.tensor(drawn or [0]))
    axes.add_collection(LineCollection(lines, colors=every.tolist()[: len(lines)], linewidths=1.0))


def _draw_answer(axes: Any, answers: Answers) -> None:
    """The first classes of the image, and their probabilities in the model and in the reduced one."""
    first = answers.first(0)
    places = range(len(first))
    for shift, column, method, label in ((-0.2, 1, MODEL, "the model"), (0.2, 2, PLAN, "reduced")):
        values = [100 * float(row[column]) for row in first]
        axes.barh([place + shift for place in places], values, height=0.38, color=look(method).colour, label=label)
    axes.set_yticks(list(places), [_short(name) for name, _, _ in first], fontsize=10)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=9)
    axes.set_xlabel("probability, %", fontsize=10)
    axes.set_title("the same first class" if answers.fidelity.agrees[0] else "another first class", fontsize=11)
    axes.legend(fontsize=10, loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _draw_words(axes: Any, codebook: Codebook, tiles: Tensor) -> None:
    """Tiles (k, n, 3, height, width) in rows, with each word's share of the patches it was counted on."""
    height, width = tiles.shape[3:]
    padded = F.pad(tiles, (0, GAP, 0, GAP), value=1.0)  # white
    canvas = padded.permute(0, 3, 1, 4, 2).reshape(len(tiles) * (height + GAP), -1, 3)
    axes.imshow(canvas.numpy())
    total = int(codebook.counts.sum())
    shares = [f"{100 * int(codebook.counts[word]) / total:.1f} %" if total else "" for word in frequent(codebook)]
    middles = [(width + GAP) * place + width / 2 for place in range(len(shares))]
    axes.set_xticks(middles, shares, fontsize=9)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    by = "" if codebook.space == "pixel" else ", by the nearest patches"
    axes.set_title(f"the most frequent of {len(codebook)} words ({codebook.space}){by}", fontsize=11)
