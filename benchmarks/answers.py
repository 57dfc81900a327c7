"""The full model's answers, and the labels of a data set."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vwt.datasets import ImageSource
from vwt.errors import ArgumentError, first_line

SYNSETS = Path(timm.__file__).parent / "data" / "_info" / "imagenet_synsets.txt"
EVERY = 1024  # new images after which the answers are written


class FullAnswers:
    """What the full model answers to images, kept in a file, so that it is asked once for each.

    An image is known by its pixels: another crop, or a changed file, is another image.

    Args:
        path: a safetensors file; made, with its folder, when there is something to keep.

    Raises:
        ArgumentError: if the file holds something else, or its folder cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[int, Tensor] = {}
        self.fresh = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(f"cannot write to {path.parent}: {error.strerror}; choose another --cache") from error
        if path.exists():
            try:
                held = load_file(path)
                self.known = dict(zip(held["images"].tolist(), held["logits"], strict=True))
            except Exception as error:  # safetensors, operating system, and files of another kind
                raise ArgumentError(
                    f"{path} holds no answers ({first_line(error)}); remove it, and it is made anew"
                ) from error

    def __call__(self, images: Tensor, ask: Callable[[], Tensor]) -> Tensor:
        """Logits (B, classes) float32 on the CPU, of images (B, C, H, W) uint8; `ask` is called if one is unknown."""
        keys = [_digest(image) for image in images]
        if not all(key in self.known for key in keys):
            self.known |= zip(keys, ask().float().cpu(), strict=True)
            self.fresh += len(keys)
        if self.fresh >= EVERY:
            self.save()
        return torch.stack([self.known[key] for key in keys])

    def save(self) -> None:
        """Write the answers, if there are new ones, so that the file holds either all or what it held before.

        Raises:
            ArgumentError: if the disk refuses.
        """
        if not self.fresh:
            return
        beside = self.path.with_name(f".{self.path.name}.fresh")
        logits = torch.stack(list(self.known.values()))
        try:
            save_file({"images": torch.tensor(list(self.known)), "logits": logits}, beside)
            os.replace(beside, self.path)
        except Exception as error:  # safetensors has errors of its own for the disk's
            beside.unlink(missing_ok=True)
            raise ArgumentError(f"cannot write {self.path}: {first_line(error)}; choose another --cache") from error
        self.fresh = 0


def _digest(image: Tensor) -> int:
    digest = hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def find_class_map(source: ImageSource, classes: int) -> Path | None:
    """ImageNet's classes, if the model has as many, and those of a data set are named by its WordNet ids."""
    names = set(SYNSETS.read_text().split())
    return SYNSETS if len(names) == classes and source.classes and set(source.classes) <= names else None


def has_labels(source: ImageSource, classes: int, class_map: Path | None) -> bool:
    """Whether a data set's labels are the model's classes: by a map, or because there are as many.

    Raises:
        ArgumentError: if the map has more classes than the model.
    """
    if class_map is None:
        return len(source.classes) == classes
    most = max(source.classes.values(), default=-1)
    if most >= classes:
        raise ArgumentError(f"{class_map} has {most + 1} classes, the model has {classes}; give another --class-map")
    return True
