"""What a model answers to images, full and reduced."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from vwt.datasets import ImageSource
from vwt.errors import DataError
from vwt.models.spec import PatchSpec, prepare
from vwt.progress import say
from vwt.tokenizer import VWTokenizer
from vwt.tuning.calibration import BATCH, NEVER, SHARPNESS, Fidelity, compare

FIRST = 5  # classes of an answer that are shown
DRAWN = 64  # images of a data set


@dataclass(frozen=True, eq=False)
class Photographs:
    """Images to look at.

    Attributes:
        pixels: (n, C, H, W) uint8, of the model's size.
        names: of each.
        skipped: the names of those that could not be read, each with its reason.
        drawn: whether they are some of a data set.
    """

    pixels: Tensor
    names: list[str]
    skipped: list[str]
    drawn: bool


def load_photographs(
    images: Tensor | str | os.PathLike[str], model: nn.Module, *, seed: int = 0, progress: bool = True
) -> Photographs:
    """Images of a data set, drawn at random, or as they are given.

    Args:
        images: a data set, or (n, C, H, W), uint8 or normalised for the model.
        model: of timm or transformers.
        seed: of the draw.
        progress: show a progress bar.

    Raises:
        DataError: if there is no image that can be read.
    """
    if isinstance(images, Tensor):
        pixels = images if images.dtype == torch.uint8 else _as_pixels(images, model)
        if not len(pixels):
            raise DataError("there are no images; give at least one")
        return Photographs(pixels.cpu(), [f"image {index}" for index in range(len(pixels))], [], False)
    source = ImageSource(os.fspath(images), model)
    say(f"reading {DRAWN} images of {os.fspath(images)}", progress)
    drawn = source.draw(DRAWN, seed=seed, progress=progress)
    if not drawn.indices:
        raise DataError(f"{images} has no image that can be read; give others")
    names = [source.filename(index) for index in drawn.indices]
    return Photographs(drawn.images, names, [f"{name} ({reason})" for _, name, reason in drawn.skipped], True)


def _as_pixels(images: Tensor, model: nn.Module) -> Tensor:
    """Normalised images as uint8."""
    mean, std = (torch.tensor(own)[:, None, None] for own in PatchSpec.of(model).normalisation)
    return ((images.float().cpu() * std + mean) * 255).round().clamp(0, 255).byte()


@dataclass(frozen=True, eq=False)
class Answers:
    """Answers to n images, full and reduced.

    Attributes:
        full: (n, classes) probabilities of the model itself.
        reduced: (n, classes) those of the reduced model.
        fidelity: how they compare.
        names: of the classes.
    """

    full: Tensor
    reduced: Tensor
    fidelity: Fidelity
    names: Sequence[str]

    def first(self, index: int) -> list[tuple[str, float, float]]:
        """The first classes of one image, of either model: name and both probabilities, by those of the full one."""
        count = min(FIRST, self.full.shape[1])
        chosen = {*self.full[index].topk(count).indices.tolist(), *self.reduced[index].topk(count).indices.tolist()}
        rows = [(self.names[c], float(self.full[index, c]), float(self.reduced[index, c])) for c in chosen]
        return sorted(rows, key=lambda row: -row[1])

    def by_change(self) -> list[int]:
        """Images: those on which the first class changed, by KL, the greatest first; then the others in their order."""
        kl, agrees = self.fidelity.kl.tolist(), self.fidelity.agrees.tolist()
        return sorted(range(len(kl)), key=lambda i: (agrees[i], 0.0 if agrees[i] else -kl[i]))


@torch.inference_mode()
def answer(fast: VWTokenizer, photographs: Photographs) -> Answers:
    """Both answers to each image.

    The classes of a model that only embeds images are the images, see `vwt.tuning.calibration.Calibration`.
    """
    family, model = fast.family, fast.model
    batches = [prepare(batch, model) for batch in photographs.pixels.split(BATCH)]
    full, reduced = (
        torch.cat([family.vectors(module(batch)).float().cpu() for batch in batches]) for module in (model, fast)
    )
    names: Sequence[str] = photographs.names
    if family.has_classes:
        names = class_names(model, full.shape[1])
    else:
        anchors = F.normalize(full, dim=-1)
        full, reduced = (SHARPNESS * F.normalize(own, dim=-1) @ anchors.T for own in (full, reduced))
        full.fill_diagonal_(NEVER)
        reduced.fill_diagonal_(NEVER)
    return Answers(full.softmax(-1), reduced.softmax(-1), compare(full, reduced), names)


def class_names(model: nn.Module, classes: int) -> list[str]:
    """What the classes of a model are called, as far as it or timm says."""
    labels = getattr(getattr(model, "config", None), "id2label", None) or {}
    if len(labels) == classes:
        return [str(labels[index]) for index in range(classes)]
    subset = infer_imagenet_subset(model)
    known = ImageNetInfo(subset) if subset else None
    if known is not None and known.num_classes() == classes:
        return [known.index_to_description(index).split(",")[0] for index in range(classes)]
    return [f"class {index}" for index in range(classes)]
