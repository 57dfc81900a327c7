"""The images that fidelity is measured on: which of a data set, and whether their labels are the model's classes."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
from harness import Bench
from torch import Tensor

from vwt.datasets import Batch, ImageSource
from vwt.errors import ArgumentError, DataError

SYNSETS = Path(timm.__file__).parent / "data" / "_info" / "imagenet_synsets.txt"


@dataclass(frozen=True)
class Images:
    """What fidelity is measured on.

    Attributes:
        source: the data set.
        chosen: ascending indices; empty for a stream without a limit.
        labelled: whether its labels are the model's classes.
        remark: what is to be said of them, for the first lines.
    """

    source: ImageSource
    chosen: Sequence[int]
    labelled: bool
    remark: str

    def first(self) -> Tensor:
        """One that can be read, (1, C, H, W) uint8.

        Raises:
            DataError: if there is none.
        """
        found = self.source.sample(1)
        if not len(found):
            raise DataError(f"{self.source.source} has no image that can be read")
        return found

    def batches(self, size: int, workers: int) -> Iterator[Batch]:
        """All of them, in order."""
        return self.source.batches(size, workers=workers, chosen=self.chosen or None)


def open_images(bench: Bench) -> Images:
    """The images of the options, and whether they have labels.

    Raises:
        DataError: if there are fewer than --limit.
    """
    options, remark = bench.arguments, ""
    classes = int(getattr(bench.model, "num_classes", 0))
    source = ImageSource(options.data, bench.model, split=options.split)
    class_map = options.class_map or find_class_map(source, classes)
    if class_map is not None:
        every = len(source)
        source = ImageSource(options.data, bench.model, split=options.split, class_map=class_map)
        if len(source) < every:
            remark = f" ({every - len(source)} of classes that {class_map.name} does not have left out)"
    labelled = has_labels(source, classes, class_map)
    if not labelled:
        remark += "; no top-1, its classes are not known to be the model's (--class-map)"
    count = options.limit or len(source)
    if len(source) and count > len(source):
        raise DataError(f"{options.data} has {len(source)} images, {count} were asked for with --limit")
    chosen: Sequence[int] = range(count)
    if len(source):
        chosen = sorted(random.Random(options.seed).sample(range(len(source)), count))
    return Images(source, chosen, labelled, remark)


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
