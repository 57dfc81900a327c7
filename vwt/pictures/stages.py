"""One picture of what a tokenizer does to an image: its words, what each reduction leaves, and the codebook's words.

Needs matplotlib: `pip install vwt[plots]`.
"""

import itertools
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vwt.codebook.codebook import Codebook
from vwt.models.spec import PatchSpec, prepare
from vwt.pictures.figures import new_figure, save_figure
from vwt.pictures.groups import colour_groups
from vwt.reductions.reducing import follow
from vwt.tokenizer import VWTokenizer
from vwt.tokens.patches import patchify, unpatchify
from vwt.tokens.words import Words

ACROSS = 5  # panels in a row at most


SHOWN = 16  # words


NEAREST = 3  # patches for each word in embedding space


GAP = 2  # pixels between patches


PANEL = 3.2  # inches


@dataclass(frozen=True, eq=False)
class Stage:
    """What is left of one image at one place.

    Attributes:
        title: where, and how many tokens.
        words: of the one image.
        gone: (N,) bool, patches that are dropped, stood for by another one, or inattentive: in the mean of what a block
            pruned.
    """

    title: str
    words: Words
    gone: Tensor


@torch.inference_mode()
def stages(fast: VWTokenizer, image: Tensor) -> list[Stage]:
    """What enters the blocks of one image (C, H, W) uint8, and what each reduction of the schedule leaves."""
    prefix = fast.backbone.prefix
    packed, words = fast.pack(prepare(image[None], fast.model))
    gone = _stood_for(words)
    found = [Stage(f"enter the blocks: {prefix + int(words.counts[0])} tokens", words, gone)]
    # Of a model whose head reads prefix tokens only, what the last block would reduce does not happen.
    last = fast.backbone.depth - fast.backbone.reads_prefix_only
    happens = {block: reduction for block, reduction in fast.schedule.items() if block < last}
    _, steps = fast.backbone.run(fast.backbone.pre_norm(packed), happens)
    for (block, reduction), step in zip(happens.items(), steps, strict=True):
        words, (assignment,) = follow(words, [step]), step.assignments
        token = step.counts[0] - 1  # the mean of what is pruned comes last
        if reduction.kind == "prune" and int((assignment.target == token).sum()) > 1:
            gone = gone | (words.group[0] == token)
        done = "pruned" if reduction.kind == "prune" else "merged"
        found.append(Stage(f"{done} in block {block}: {prefix + step.counts[0]} tokens", words, gone))
    return found


def _stood_for(words: Words) -> Tensor:
    """Of one image, the patches (N,) that are dropped, or of which another has a larger share in their token."""
    group, share = words.group[0], words.weight[0]
    largest = share.new_zeros(int(words.counts[0])).scatter_reduce(0, group.clamp(min=0), share, "amax")
    return (group < 0) | (share < largest[group.clamp(min=0)])


def save_stages(
    path: str | os.PathLike[str],
    image: Tensor,
    fast: VWTokenizer,
    codebook: Codebook | None = None,
    images: Tensor | None = None,
    *,
    heading: str = "",
) -> None:
    """Draw an image, its words, and what is left before the blocks and after each reduction inside them.

    Patches of one word, or of one merged token, share a colour and an outline; what is gone is dark. Below are the most
    frequent words of the codebook: pixel words as they are, embedding words by their nearest patches.

    Args:
        path: .png, .svg or .pdf.
        image: (C, H, W) uint8, of the model's size.
        fast: with a strategy, a schedule or both.
        codebook: whose words are shown.
        images: (n, C, H, W) uint8, in which the nearest patches are sought; by default the image alone.
        heading: above all.

    Raises:
        ArgumentError: if matplotlib is not installed.
        MismatchError: if the codebook was made for another model.
        DocumentError: if the file cannot be written.
    """
    left, plain = stages(fast, image), _colours(image)
    patches = fast.backbone.prefix + left[0].words.group.shape[1]
    panels: list[tuple[str, Tensor, Words | None]] = [(f"the image: {patches} tokens", plain, None)]
    if fast.strategy is not None:
        words = _named(left[0].words, left[0].words.group[0] < 0)
        panels.append((f"{type(fast.strategy).__name__}: its words", colour_groups(plain, words), words))
    for stage in left if fast.strategy is not None else left[1:]:
        words = _named(stage.words, stage.gone)
        panels.append((stage.title, colour_groups(plain, words, strength=0.4), words))
    tiles = None if codebook is None else word_tiles(fast, codebook, image[None] if images is None else images)
    rows = math.ceil(len(panels) / ACROSS)
    across = math.ceil(len(panels) / rows)
    heights = [PANEL + 0.3] * rows + ([] if tiles is None else [0.8 + 0.5 * tiles.shape[0]])
    figure = new_figure(PANEL * across, sum(heights) + 0.5, layout="constrained")
    layout = figure.add_gridspec(len(heights), across, height_ratios=heights)
    for index, (title, picture, drawn) in enumerate(panels):
        axes = figure.add_subplot(layout[index // across, index % across])
        axes.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
        axes.axis("off")
        axes.set_title(title, fontsize=10)
        if drawn is not None:
            _outline(axes, drawn, picture.shape[1:])
    if codebook is not None and tiles is not None:
        _draw_words(figure.add_subplot(layout[rows, :]), codebook, tiles)
    figure.suptitle(heading, fontsize=11)
    save_figure(figure, path, dpi=160)


def _named(words: Words, gone: Tensor) -> Words:
    """Words of one image for a picture: what is gone (N,) in no group, and each group named by its first patch.

    So a token keeps its colour from one stage to the next.
    """
    first: dict[int, int] = {}
    named = torch.tensor([first.setdefault(number, place) for place, number in enumerate(words.group[0].tolist())])
    return Words(torch.where(gone.cpu(), -1, named)[None], words.weight, words.counts, words.grid)


def _outline(axes: Any, words: Words, size: Sequence[int]) -> None:
    """Draw a line around the groups of several patches, in an image of (height, width) pixels."""
    from matplotlib.collections import LineCollection

    rows, columns = words.grid
    group = words.group[0].tolist()
    members = Counter(group)

    def shared(row: int, column: int) -> int | None:
        number = group[row * columns + column] if row in range(rows) and column in range(columns) else -1
        return number if number >= 0 and members[number] > 1 else None

    lines = []
    for row, column in itertools.product(range(rows + 1), range(columns + 1)):
        here = shared(row, column)
        lines += [((column, row), (column + 1, row))] * (here != shared(row - 1, column))
        lines += [((column, row), (column, row + 1))] * (here != shared(row, column - 1))
    high, wide = size[0] / rows, size[1] / columns
    ends = [[(x * wide - 0.5, y * high - 0.5) for x, y in line] for line in lines]
    axes.add_collection(LineCollection(ends, colors="white", linewidths=0.8))


def frequent(codebook: Codebook, count: int = SHOWN) -> Tensor:
    """Numbers (n,) of the most frequent words, the most frequent first; the first ones where nothing was counted."""
    return codebook.counts.argsort(descending=True, stable=True)[:count]


@torch.inference_mode()
def word_tiles(fast: VWTokenizer, codebook: Codebook, images: Tensor) -> Tensor:
    """Pictures (k, n, 3, height, width) in [0, 1] of the n most frequent words.

    Args:
        fast: around the model.
        codebook: for that model.
        images: (m, C, H, W) uint8, in whose patches the k nearest to an embedding word are sought (fewer, if there are
            fewer); k is 1 for pixel words, which are pictures themselves.

    Raises:
        MismatchError: if the codebook was made for another model.
    """
    spec = PatchSpec.of(fast.model)
    codebook = codebook.for_model(spec)
    chosen = frequent(codebook)
    height, width = spec.patch_size
    if codebook.space == "pixel":
        channels = len(codebook.mean)
        own = codebook.normalised((0.0,) * channels, (1.0,) * channels).words[chosen]
        pictures = own.clamp(0, 1)[None]
    else:
        features, pixels = [], []
        for image in images:
            patches, _, grid = fast.backbone.embed(prepare(image[None], fast.model))
            features.append(F.normalize(patches[0].float().cpu(), dim=-1))
            pixels.append(patchify(image[None], spec.patch_size, grid)[0])
        likeness = F.normalize(codebook.words[chosen], dim=-1) @ torch.cat(features).T
        nearest = likeness.topk(min(NEAREST, likeness.shape[1]), dim=1).indices.T  # (k, n)
        pictures = torch.cat(pixels)[nearest].float() / 255
    tiles = unpatchify(pictures.flatten(0, 1)[:, None], (height, width), (1, 1))
    return torch.stack([_colours(tile) for tile in tiles]).unflatten(0, pictures.shape[:2])


def _draw_words(axes: Any, codebook: Codebook, tiles: Tensor) -> None:
    """Tiles (k, n, 3, height, width) in rows, with each word's share of the patches it was counted on."""
    height, width = tiles.shape[3:]
    padded = F.pad(tiles, (0, GAP, 0, GAP), value=1.0)  # white
    canvas = padded.permute(0, 3, 1, 4, 2).reshape(len(tiles) * (height + GAP), -1, 3)
    axes.imshow(canvas.numpy())
    total = int(codebook.counts.sum())
    shares = [f"{100 * int(codebook.counts[word]) / total:.1f} %" if total else "" for word in frequent(codebook)]
    middles = [(width + GAP) * place + width / 2 for place in range(len(shares))]
    axes.set_xticks(middles, shares, fontsize=7)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    by = "" if codebook.space == "pixel" else ", by the nearest patches"
    axes.set_title(f"the most frequent of {len(codebook)} words ({codebook.space}){by}", fontsize=10)


def _colours(image: Tensor) -> Tensor:
    """An image (C, H, W), uint8 or float in [0, 1], as colours (3, H, W) float in [0, 1]; one channel makes grey."""
    image = image.cpu() / 255 if image.dtype == torch.uint8 else image.cpu()
    return image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
