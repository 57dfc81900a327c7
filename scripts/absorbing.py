"""Why Absorb keeps what it keeps: what it sees of one picture, its scores, and which patches join which."""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vwt
from vwt.cli import run_script
from vwt.datasets import read_image
from vwt.models.backbone import Backbone
from vwt.models.create import create_model
from vwt.models.spec import PatchSpec, prepare
from vwt.pictures.figures import check_picture, save_figure, subplots
from vwt.pictures.palette import PLAN, look
from vwt.pictures.tiles import colours
from vwt.reductions.absorb import exponent, isolation
from vwt.reductions.assignment import Assignment
from vwt.reductions.kinds import check_amounts

DIM = 0.35  # what is left of the colours of patches that go
PHOTOGRAPH = files("sklearn.datasets.images") / "flower.jpg"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--image", default=str(PHOTOGRAPH), help="file of a photograph")
    parser.add_argument("--model", default="vit_tiny_patch16_224.augreg_in21k_ft_in1k", help="timm model")
    parser.add_argument("--checkpoint", help="file of weights; by default the pretrained ones from the hub")
    parser.add_argument("--block", type=int, default=3, help="that reduces")
    parser.add_argument("--share", type=float, default=0.65, help="of the patches that go")
    parser.add_argument("--out", type=Path, default=Path("absorbing.png"), help="where to write the picture")


@dataclass(frozen=True, eq=False)
class Seen:
    """What Absorb saw of one image, and what it did.

    Attributes:
        received: (m,) attention that each patch receives.
        patches: (m, C).
        assignment: which became which.
        exponent: of the distance in the score.
    """

    received: Tensor
    patches: Tensor
    assignment: Assignment
    exponent: float

    @property
    def kept(self) -> Tensor:
        """Patches (k,) that stay."""
        assert self.assignment.kept is not None
        return self.assignment.kept[0]


def watch(model: nn.Module, pixels: Tensor, block: int, share: float) -> Seen:
    """Reduce one image (1, C, H, W), normalised for the model, in one block."""
    found: list[Seen] = []

    class Absorb(vwt.Absorb):
        def assign(self, seen: Tensor, tokens: Tensor, prefix: int, following: float) -> Assignment:
            assignment = super().assign(seen, tokens, prefix, following)
            found.append(Seen(seen[0], tokens[0, prefix:], assignment, exponent(following)))
            return assignment

    reductions = {block: Absorb(share)}
    check_amounts(reductions, Backbone(model).depth)
    fast = vwt.VWTokenizer(model)
    fast.backbone.encode_packed(fast.pack(pixels)[0], reductions)
    return found[0]


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> None:
    """What the options ask for."""
    check_picture(arguments.out)
    model = create_model(arguments.model, arguments.checkpoint)
    picture = read_image(arguments.image, model)
    seen = watch(model, prepare(picture[None], model), arguments.block, arguments.share)
    draw(arguments.out, colours(picture), PatchSpec.of(model).patch_size, seen)
    print(f"{len(seen.received) - len(seen.kept)} patches join {len(seen.kept)} in block {arguments.block}")
    print(arguments.out)


def draw(path: Path, picture: Tensor, patch: tuple[int, int], seen: Seen) -> None:
    """Six panels: the image, attention received, distance, score, what is kept, and which patches join which.

    Args:
        path: of the picture.
        picture: (3, h, w) in [0, 1].
        patch: its height and width.
        seen: in the model.
    """
    grid = picture.shape[1] // patch[0], picture.shape[2] // patch[1]
    received, (_, distance) = seen.received, isolation(seen.received[None], seen.patches[None])
    power = (distance[0] / seen.patches.shape[-1]).pow(seen.exponent)
    root = "√" if seen.exponent < 1 else ""
    figure, ((image, first, second), (third, kept, joined)) = subplots(2, 3, size=(3, 3.5))
    show(image, picture, "the image")
    maps = (
        (first, received, "attention received"),
        (second, power, f"{root}distance to the most similar\nthat receives more"),
    )
    for axes, values, title in (*maps, (third, received * power, "score: their product")):
        top = values.quantile(0.98).item()  # a few patches receive many times as much as the others
        extent = (0, picture.shape[2], picture.shape[1], 0)
        axes.imshow(values.view(grid).numpy(), cmap="cividis", vmax=top, extent=extent)
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    stays = torch.zeros(len(received)).scatter(0, seen.kept, 1.0).view(grid)
    bright = stays.repeat_interleave(patch[0], 0).repeat_interleave(patch[1], 1)
    dimmed = picture * (DIM + (1 - DIM) * bright)
    show(kept, dimmed, f"kept: {len(seen.kept)} of {len(received)}")
    show(joined, dimmed, "which patches join which")
    draw_joins(joined, seen, grid, patch)
    save_figure(figure, path, dpi=80)


def show(axes: Any, picture: Tensor, title: str) -> None:
    """A picture (3, h, w) in [0, 1]."""
    axes.imshow(picture.permute(1, 2, 0).numpy())
    axes.set_title(title, fontsize=10)
    axes.axis("off")


def draw_joins(axes: Any, seen: Seen, grid: tuple[int, int], patch: tuple[int, int]) -> None:
    """A line from each patch that goes to the kept one that it joins."""
    colour = look(PLAN).colour
    index = torch.arange(len(seen.received))
    keeper = seen.kept[seen.assignment.target[0]]
    for patches in torch.stack([index, keeper], dim=1)[index != keeper]:
        x, y = ((patches % grid[1] + 0.5) * patch[1]).tolist(), ((patches // grid[1] + 0.5) * patch[0]).tolist()
        axes.plot(x, y, color=colour, linewidth=0.7)
        axes.plot(x[1], y[1], "o", color=colour, markersize=2.5)


main = partial(run_script, "absorbing", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
