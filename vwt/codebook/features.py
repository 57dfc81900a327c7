"""A stream of images to a stream of features, in pixel or embedding space."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vwt.datasets import Batch, ImageSource
from vwt.errors import DataError
from vwt.measure.timing import Stopwatch
from vwt.models.spec import PatchSpec, family_of
from vwt.tokens.patches import Space, normalise, patchify

_BATCH = 4  # images; larger ones are no faster, and leave holes in the heap that make memory grow


class FeatureStream:
    """The features of a data set's patches, batch by batch.

    Args:
        source: the images.
        model: the model whose projection is used, on its own device.
        spec: of the model.
        space: "pixel" or "embedding".
        workers: processes that decode images.
        strict: stop at the first image that cannot be read, instead of skipping it.
        progress: show a progress bar for each pass.

    Attributes:
        skipped: (name, reason) of the images that could not be read so far, by index.
        timed: a stopwatch; "decode" is the time spent waiting for images.
    """

    def __init__(
        self,
        source: ImageSource,
        model: nn.Module,
        spec: PatchSpec,
        space: Space,
        *,
        workers: int,
        strict: bool,
        progress: bool,
    ) -> None:
        self.source, self.spec, self.space = source, spec, space
        self.workers, self.strict, self.progress = workers, strict, progress
        self.skipped: dict[int, tuple[str, str]] = {}
        self.timed = Stopwatch()
        self.family = family_of(model)
        self.mean, self.std = spec.normalisation
        self.device = self.family.projection.weight.device

    def batches(self, name: str, start: int) -> Iterator[tuple[Batch, Tensor]]:
        """Batches from image `start` on, with their features (B, N, D) float32; `name` stands at the progress bar."""
        total = len(self.source) or None
        bar = tqdm(desc=name, total=total, initial=start, unit="img", disable=not self.progress)
        batches = self.source.batches(_BATCH, start=start, workers=self.workers)
        with bar, _half_threads():
            while True:
                with self.timed("decode"):
                    batch = next(batches, None)
                if batch is None:
                    return
                self._note_skipped(batch)
                if len(batch.images):
                    with self.timed("features"):
                        features = self._features(batch)
                    yield batch, features
                bar.update(batch.stop - batch.start)

    @torch.inference_mode()
    def _features(self, batch: Batch) -> Tensor:
        images = normalise(batch.images.to(self.device), self.mean, self.std)
        if self.space == "embedding":
            features = self.family.project(images.to(self.family.projection.weight.dtype)).float()
        else:
            features = patchify(images, self.spec.patch_size)
        finite = torch.isfinite(features.sum(dim=(1, 2)))
        if not finite.all():
            bad = batch.indices[int(finite.int().argmin())]
            raise DataError(
                f"NaN or infinity in the patches of image {bad} of {self.source.source}; "
                "are the model's weights finite?"
            )
        return features

    def _note_skipped(self, batch: Batch) -> None:
        for index, name, reason in batch.skipped:
            if self.strict:
                raise DataError(f"cannot read {name}: {reason} (image {index}; without --strict it is skipped)")
            self.skipped[index] = (name, reason)


@contextmanager
def _half_threads() -> Iterator[None]:
    """Leave half of the processors to the decoding of images; torch waits for its slowest thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
