"""The whole path on two photographs: crops of them to a codebook, a model on visual words, a table and a picture."""

import os
import statistics
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import vwt
from vwt.datasets import ImageSource
from vwt.errors import ModelError, VWTError
from vwt.models.create import create_model
from vwt.models.spec import prepare
from vwt.pictures.show import save_stages

MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
OUT = Path("demo")
WORDS = 200
RUNS = 30


def main() -> int:
    """Run the demo; writes to `demo/`."""
    crops = make_crops(OUT / "crops")
    model, trained = load_model()
    codebook = vwt.build_codebook(crops, model, words=WORDS, out=OUT / "words.zarr", overwrite=True)
    images = torch.cat([batch.images for batch in ImageSource(str(crops), model).batches(32)])
    inputs = prepare(images, model)

    variants = {
        "full model": vwt.VWTokenizer(model),
        "inter-image, threshold 0.1": vwt.VWTokenizer(model, vwt.InterImage(codebook, 0.1)),
        "inter-image, threshold 0.2": vwt.VWTokenizer(model, vwt.InterImage(codebook, 0.2)),
        "intra-image, drop 0.25": vwt.VWTokenizer(model, vwt.IntraImage(0.25)),
        "intra-image, drop 0.5": vwt.VWTokenizer(model, vwt.IntraImage(0.5)),
    }
    print_table(variants, inputs)
    if not trained:
        print("The weights are RANDOM: neither the hub nor a checkpoint is in reach, so agreement means nothing here.")

    fast = variants["inter-image, threshold 0.2"]
    save_stages(
        OUT / "words.png", images[0], fast, codebook, images, heading="Patches of one visual word share a colour"
    )
    print(f"Wrote {OUT / 'words.zarr'} (codebook) and {OUT / 'words.png'} (picture).")
    return 0


def make_crops(folder: Path, size: int = 224, step: int = 100) -> Path:
    """Overlapping crops of scikit-learn's two photographs, as PNG files."""
    samples = load_sample_images()
    for array, filename in zip(samples.images, samples.filenames, strict=True):
        photograph, name = Image.fromarray(array), Path(filename).stem
        (folder / name).mkdir(parents=True, exist_ok=True)
        for top in range(0, photograph.height - size + 1, step):
            for left in range(0, photograph.width - size + 1, step):
                crop = photograph.crop((left, top, left + size, top + size))
                crop.save(folder / name / f"{top}-{left}.png")
    return folder


def load_model() -> tuple[nn.Module, bool]:
    """The model, and whether its weights are trained: from VWT_SHARED, else the hub, else random."""
    checkpoint = Path(os.environ.get("VWT_SHARED", "../shared/data")) / "models" / f"{MODEL}.safetensors"
    if checkpoint.is_file():
        return create_model(MODEL, checkpoint), True
    try:
        return create_model(MODEL), True
    except ModelError as error:
        print(error)
        torch.manual_seed(0)
        return create_model(MODEL, weights=False), False


@torch.inference_mode()
def print_table(variants: dict[str, vwt.VWTokenizer], inputs: Tensor) -> None:
    """Tokens, agreement with the full model, and milliseconds at batch 1, timed in turn."""
    milliseconds: dict[str, list[float]] = {name: [] for name in variants}
    for run in range(-3, RUNS):
        for name, model in variants.items():
            begin = time.perf_counter()
            model(inputs[run % len(inputs)][None])
            if run >= 0:  # the first runs warm up
                milliseconds[name].append(1e3 * (time.perf_counter() - begin))
    answers = {name: model(inputs).argmax(1) for name, model in variants.items()}
    full, full_ms = answers["full model"], statistics.median(milliseconds["full model"])
    print(f"\n{'':28}{'tokens':>16}{'agreement':>12}{'ms':>8}{'ratio':>8}   (batch 1, {len(inputs)} images)")
    for name, model in variants.items():
        words = model.tokenize(inputs)
        before, after = words.grid[0] * words.grid[1], words.counts.float().mean()
        agreement = (answers[name] == full).float().mean()
        ms = statistics.median(milliseconds[name])
        print(f"{name:28}{before:>7} → {after:6.1f}{100 * agreement:>10.0f} %{ms:>8.1f}{ms / full_ms:>8.2f}")
    print()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except VWTError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(2)
