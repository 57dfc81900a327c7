"""The feature map of one picture, full and reduced side by side: the first three principal components as colours."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

import vwt
from vwt.cli import run_script
from vwt.datasets import read_image
from vwt.errors import ArgumentError
from vwt.models.backbone import Backbone
from vwt.models.create import create_model
from vwt.models.spec import prepare

SIZE = 336  # pixels of each of the three pictures


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--image", help="file of a photograph; without, a scene is drawn")
    parser.add_argument("--model", default="vit_tiny_patch16_224.augreg_in21k_ft_in1k", help="timm model")
    parser.add_argument("--checkpoint", help="file of weights; by default the pretrained ones from the hub")
    parser.add_argument("--block", type=int, default=5, help="that merges tokens")
    parser.add_argument("--share", type=float, default=0.25, help="of the tokens that it merges away")
    parser.add_argument("--out", type=Path, default=Path("feature_map.png"), help="where to write the picture")


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> None:
    """What the options ask for."""
    model = create_model(arguments.model, arguments.checkpoint)
    fast = vwt.VWTokenizer(model, schedule=vwt.PruningSchedule({arguments.block: vwt.Merge(arguments.share)}))
    picture = read_image(arguments.image, model) if arguments.image else draw_scene(*Backbone(model).input_shape[1:])
    pixels = prepare(picture[None], model)
    full, reduced = (
        one.forward_intermediates(pixels, 1, norm=True, intermediates_only=True)[0][0]
        for one in (vwt.VWTokenizer(model), fast)
    )
    packed, _ = fast.forward_features(pixels, unmerge=False)
    save_row(arguments.out, [picture / 255, *colour(full, reduced)])
    alike = F.cosine_similarity(full, reduced, dim=0)
    print(f"{full[0].numel()} patches, {packed.lengths[0] - fast.backbone.prefix} tokens leave the last block")
    print(f"cosine of the patches' features: mean {alike.mean():.3f}, 5 % quantile {alike.quantile(0.05):.3f}")
    print(arguments.out)


def draw_scene(height: int, width: int) -> Tensor:
    """A house, a tree and the sun, always the same, as a picture (3, height, width) uint8."""
    scene = Image.new("RGB", (448, 448), (135, 190, 235))
    draw = ImageDraw.Draw(scene)
    for row in range(290):  # the sky, paler towards the ground
        draw.line([(0, row), (448, row)], (110 + row // 3, 170 + row // 5, 235))
    draw.ellipse([330, 40, 400, 110], (255, 225, 90))
    draw.polygon([(0, 300), (120, 190), (260, 290), (360, 230), (448, 280), (448, 448), (0, 448)], (95, 150, 75))
    draw.polygon([(150, 448), (215, 350), (245, 350), (290, 448)], (200, 175, 130))  # the way
    draw.rectangle([150, 230, 310, 360], (225, 205, 180))
    for row in range(230, 360, 10):  # its bricks
        draw.line([(150, row), (310, row)], (190, 165, 140))
    draw.polygon([(130, 235), (230, 150), (330, 235)], (165, 60, 50))
    draw.rectangle([215, 290, 250, 360], (95, 60, 40))
    for left in (170, 268):
        draw.rectangle([left, 260, left + 26, 290], (80, 110, 150), (255, 255, 255), 3)
    draw.rectangle([62, 270, 80, 380], (100, 70, 45))
    for x, y in [(35, 200), (70, 170), (95, 215), (60, 235)]:
        draw.ellipse([x - 40, y - 38, x + 40, y + 38], (45, 105, 50), (60, 125, 60), 4)
    return torch.from_numpy(np.array(scene.resize((width, height), Image.Resampling.BICUBIC))).permute(2, 0, 1)


def colour(full: Tensor, reduced: Tensor) -> list[Tensor]:
    """Feature maps (C, rows, columns) to colours (3, rows, columns) in [0, 1], by the components of the first."""
    patches = full.flatten(1).T
    centre = patches.mean(0)
    axes = torch.linalg.svd(patches - centre, full_matrices=False).Vh[:3]
    maps = [torch.einsum("kc,chw->khw", axes, one - centre[:, None, None]) for one in (full, reduced)]
    low, high = (maps[0].flatten(1).quantile(q, dim=1)[:, None, None] for q in (0.01, 0.99))
    return [((one - low) / (high - low)).clamp(0, 1) for one in maps]


def save_row(path: Path, pictures: Sequence[Tensor]) -> None:
    """Write pictures (3, h, w) in [0, 1] beside each other, each as large as the others.

    Raises:
        ArgumentError: if the file cannot be written.
    """
    row = [F.interpolate(one[None], size=(SIZE, SIZE), mode="nearest")[0] for one in pictures]
    pixels = (torch.cat(row, dim=2).permute(1, 2, 0) * 255).round().byte().numpy()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(pixels)).save(path, optimize=True)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"cannot write {path}: {error}; choose another --out, such as feature_map.png") from error


main = partial(run_script, "feature_map", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
