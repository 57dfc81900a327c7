"""A stream of images to the features of their patches, in pixel or embedding space."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from vwt.datasets import Batch, ImageSource
from vwt.errors import DataError
from vwt.measure.timing import Stopwatch
from vwt.models.spec import PatchSpec, family_of
from vwt.tokens.patches import Space, normalise, patchify

_BATCH = 4  # images; larger ones are no faster, and leave holes in the heap that make memory grow

T = TypeVar("T")


class Unreadable(NamedTuple):
    """An image that cannot be read, and why."""

    name: str
    reason: str


class FeatureStream:
    """The features of a data set's patches, image by image.

    Each image is computed by itself, in one thread, so that its features depend neither on its batch mates nor on the
    number of threads; threads share the images of a batch.

    Args:
        source: the images.
        model: the model whose projection is used, on its own device.
        spec: of the model.
        space: "pixel" or "embedding".
        workers: processes that decode images.
        strict: stop at the first image that cannot be read, instead of skipping it.

    Attributes:
        timed: a stopwatch; "decode" is the time spent waiting for images.
    """

    def __init__(
        self, source: ImageSource, model: nn.Module, spec: PatchSpec, space: Space, *, workers: int, strict: bool
    ) -> None:
        self.source, self.family, self.spec, self.space = source, family_of(model), spec, space
        self.workers, self.strict = workers, strict
        self.timed = Stopwatch()
        self.mean, self.std = spec.normalisation
        self.device = self.family.projection.weight.device

    def to(self, device: torch.device) -> None:
        """Move the model that this holds, in a process of its own."""
        self.family.model.to(device)
        self.device = device

    def shape(self) -> tuple[int, int]:
        """(N, D): patches an image, and their width."""
        patches, width = self._features(torch.zeros(self.source.input_size, dtype=torch.uint8)).shape
        return patches, width

    def images(
        self, name: str, each: Callable[[Tensor], T], chosen: Iterable[int] | None = None, start: int = 0
    ) -> Iterator[tuple[int, T | Unreadable]]:
        """Each image's index with what is made of its features, or that it cannot be read.

        Args:
            name: of the part of the build, for the stopwatch.
            each: what is made of an image's features (N, D) float32; called in a thread.
            chosen: ascending indices; None for all from `start` on.
            start: likewise.
        """
        batches = self.source.batches(_BATCH, start=start, workers=self.workers, chosen=chosen)

        def compute(index: int, image: Tensor) -> T:
            return each(self._checked(index, image))

        with _threads(1 if self.device.type != "cpu" else _BATCH, half=self.workers > 0) as pool:
            while True:
                with self.timed("decode"):
                    batch = next(batches, None)
                if batch is None:
                    return
                with self.timed(name):
                    made: list[tuple[int, T | Unreadable]] = self._unreadable(batch)
                    made += zip(batch.indices, pool.map(compute, batch.indices, batch.images), strict=True)
                yield from sorted(made, key=lambda item: item[0])

    def _checked(self, index: int, image: Tensor) -> Tensor:
        features = self._features(image)
        if not torch.isfinite(features.sum()):
            raise DataError(
                f"NaN or infinity in the patches of image {index} of {self.source.source}; "
                "are the model's weights finite?"
            )
        return features

    @torch.inference_mode()
    def _features(self, image: Tensor) -> Tensor:
        """Features (N, D) float32 of an image (C, H, W) uint8."""
        images = normalise(image[None].to(self.device), self.mean, self.std)
        if self.space == "pixel":
            return patchify(images, self.spec.patch_size)[0]
        return self.family.project(images.to(self.family.projection.weight.dtype))[0].float()

    def _unreadable(self, batch: Batch) -> list[tuple[int, Any]]:
        for index, name, reason in batch.skipped:
            if self.strict:
                raise DataError(f"cannot read {name}: {reason} (image {index}; without --strict it is skipped)")
        return [(index, Unreadable(name, reason)) for index, name, reason in batch.skipped]


@contextmanager
def _threads(most: int, *, half: bool) -> Iterator[ThreadPoolExecutor]:
    """Threads that each compute alone, on all processors, or on half of them where the others decode images."""
    threads = torch.get_num_threads()
    count = max(1, min(most, threads // 2 if half else threads))
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)
