"""What the fidelity benchmark keeps of images, and the labels of a data set."""

import hashlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from vwt.datasets import ImageSource
from vwt.errors import ArgumentError, first_line

SYNSETS = Path(timm.__file__).parent / "data" / "_info" / "imagenet_synsets.txt"
EVERY = 60.0  # seconds after which what is new is written


class ImageCache:
    """What was found of images, kept in a file, so that it is found once for each, however often a run is interrupted.

    An image is known by its pixels: another crop, or a changed file, is another image. A file that is damaged or holds
    something else is not believed: it is made anew, and a line on stderr says so.

    Args:
        path: a safetensors file; made, with its folder, when there is something to keep.

    Raises:
        ArgumentError: if its folder cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[int, Tensor] = {}
        self.fresh, self.saved = False, time.monotonic()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(f"cannot write to {path.parent}: {error.strerror}; choose another --cache") from error
        if path.exists():
            try:
                self.known = _load(path)
            except Exception as error:  # safetensors, operating system, and files of another kind
                print(f"fidelity: {path} is damaged ({first_line(error)}) and is made anew", file=sys.stderr)

    def __call__(self, images: Tensor, find: Callable[[], Tensor]) -> Tensor:
        """What is known of images (B, C, H, W) uint8, (B, ...); `find` gives it, on the CPU, if one is unknown."""
        keys = [_digest(image) for image in images]
        if not all(key in self.known for key in keys):
            for key, value in zip(keys, find(), strict=True):
                self.known.setdefault(key, value)  # what is known stays, as it would in a run without interruption
            self.fresh = True
        if time.monotonic() - self.saved > EVERY:
            self.save()
        return torch.stack([self.known[key] for key in keys])

    def save(self) -> None:
        """Write what there is, if any of it is new, so that the file holds either all or what it held before.

        Raises:
            ArgumentError: if the disk refuses.
        """
        if not self.fresh:
            return
        inputs = self.path.with_name(f".{self.path.name}.fresh")
        tensors = {"images": torch.tensor(list(self.known)), "values": torch.stack(list(self.known.values()))}
        try:
            save_file(tensors, inputs, {"checksum": _checksum(tensors)})
            os.replace(inputs, self.path)
        except Exception as error:  # safetensors has errors of its own for the disk's
            inputs.unlink(missing_ok=True)
            raise ArgumentError(f"cannot write {self.path}: {first_line(error)}; choose another --cache") from error
        self.fresh, self.saved = False, time.monotonic()


def _load(path: Path) -> dict[int, Tensor]:
    """What `ImageCache.save` wrote."""
    with safe_open(path, "pt") as file:
        tensors, meta = {name: file.get_tensor(name) for name in ("images", "values")}, file.metadata() or {}
    if meta.get("checksum") != _checksum(tensors):
        raise ValueError("its checksum is another")
    return dict(zip(tensors["images"].tolist(), tensors["values"], strict=True))


def _checksum(tensors: dict[str, Tensor]) -> str:
    return hashlib.blake2b(save(tensors)).hexdigest()


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
