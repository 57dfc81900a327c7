"""The feature map of one photograph, full and reduced side by side: the first three principal components as colours."""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_data_config
from torch import Tensor

import vwt
from vwt.backbones import create_model
from vwt.errors import VWTError

SIZE = 448  # pixels of each of the three pictures


def main() -> int:
    """Write the picture, and print how alike the two maps are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--image", help="photograph; by default one of scikit-learn's")
    parser.add_argument("--model", default="vit_tiny_patch16_224.augreg_in21k_ft_in1k", help="timm model")
    parser.add_argument("--checkpoint", help="file of weights; by default the pretrained ones from the hub")
    parser.add_argument("--block", type=int, default=5, help="that merges tokens")
    parser.add_argument("--share", type=float, default=0.25, help="of the tokens that it merges away")
    parser.add_argument("--out", default="feature_map.png", help="where to write the picture")
    arguments = parser.parse_args()

    model = create_model(arguments.model, arguments.checkpoint)
    photograph = Image.fromarray(load_sample_images().images[0])
    if arguments.image is not None:
        photograph = Image.open(arguments.image).convert("RGB")
    config = resolve_data_config(model=model)
    pixels = create_transform(**config)(photograph)
    schedule = vwt.PruningSchedule({arguments.block: vwt.Merge(arguments.share)})
    fast = vwt.VWTokenizer(model, schedule=schedule)

    with torch.inference_mode():
        full, reduced = (
            one.forward_intermediates(pixels[None], 1, norm=True, intermediates_only=True)[0][0]
            for one in (vwt.VWTokenizer(model), fast)
        )
        packed, _ = fast.forward_features(pixels[None], unmerge=False)
    alike = F.cosine_similarity(full, reduced, dim=0)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    save_row(arguments.out, [(pixels * std + mean).clamp(0, 1), *colour(full, reduced)])
    print(f"{full[0].numel()} patches, {packed.lengths[0] - fast.backbone.prefix} tokens leave the last block")
    print(f"cosine of the patches' features: mean {alike.mean():.3f}, 5 % quantile {alike.quantile(0.05):.3f}")
    print(arguments.out)
    return 0


def colour(full: Tensor, reduced: Tensor) -> list[Tensor]:
    """Feature maps (C, rows, columns) to colours (3, rows, columns) in [0, 1], by the components of the first."""
    patches = full.flatten(1).T
    centre = patches.mean(0)
    axes = torch.linalg.svd(patches - centre, full_matrices=False).Vh[:3]
    maps = [torch.einsum("kc,chw->khw", axes, one - centre[:, None, None]) for one in (full, reduced)]
    low, high = (maps[0].flatten(1).quantile(q, dim=1)[:, None, None] for q in (0.01, 0.99))
    return [((one - low) / (high - low)).clamp(0, 1) for one in maps]


def save_row(path: str, pictures: list[Tensor]) -> None:
    """Write pictures (3, h, w) in [0, 1] beside each other, each as large as the others."""
    row = [F.interpolate(one[None], size=(SIZE, SIZE), mode="nearest")[0] for one in pictures]
    pixels = (torch.cat(row, dim=2).permute(1, 2, 0) * 255).round().byte().numpy()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except VWTError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
