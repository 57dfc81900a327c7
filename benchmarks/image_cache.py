"""What was found of images, kept in a file, so that an interrupted run goes on."""

import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vwt.documents import replacing
from vwt.errors import ArgumentError, first_line

EVERY = 60.0  # seconds after which what is new is written


class ImageCache:
    """A tensor for each image that was seen, found once however often a run is interrupted.

    An image is known by its pixels: another crop, or a changed file, is another image. A file that is damaged or holds
    something else is made anew, and a line on stderr says so.

    Args:
        path: a safetensors file, in a folder that exists; made when there is something to keep.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[int, Tensor] = {}
        self.fresh, self.saved = False, time.monotonic()
        if path.exists():
            try:
                kept = load_file(path)
                self.known = dict(zip(kept["images"].tolist(), kept["values"], strict=True))
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
        tensors = {"images": torch.tensor(list(self.known)), "values": torch.stack(list(self.known.values()))}
        try:
            with replacing(self.path) as draft:
                save_file(tensors, draft)
        except Exception as error:  # safetensors has errors of its own for the disk's
            raise ArgumentError(f"cannot write {self.path}: {first_line(error)}; choose another --cache") from error
        self.fresh, self.saved = False, time.monotonic()


def _digest(image: Tensor) -> int:
    digest = hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
