"""Images from folders, archives, object storage and hubs, through timm's readers."""

import hashlib
import itertools
import numbers
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from vwt.errors import DataError, first_line
from vwt.models.spec import family_of
from vwt.progress import progress_bar
from vwt.remote import RemoteReader, is_url, stays_here

# Prefixes by which timm's factory knows a data set that is no folder and no tar file.
_NAMED = ("hfds/", "hfids/", "tfds/", "wds/", "torch/")


_NOT_IMAGES = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Batch:
    """Images that were read together: a run of consecutive ones, or a draw.

    Attributes:
        start: least index in the data set of an image that was tried.
        stop: index after the greatest.
        images: (B, C, H, W) uint8, those that could be read.
        indices: (B,) their indices in the data set.
        skipped: (index, name, reason) of each image that could not be read.
        labels: (B,) the data set's own, -1 where it has none.
    """

    start: int
    stop: int
    images: Tensor
    indices: list[int]
    skipped: list[tuple[int, str, str]]
    labels: list[int]


class ImageSource:
    """Anything that timm's dataset factory reads, as a stream of uint8 images through the model's own data config.

    Args:
        source: a folder or a tar file, or the URL of one; or a name such as `hfds/…`, `torch/…`, `tfds/…`, `wds/…`.
        model: the model whose size, crop and interpolation the images get.
        split: of data sets that have splits, and of folders that have a sub-folder of that name.
        root: where named data sets are cached.
        class_map: file that gives the label of each class (one name a line), as timm takes it; images of other classes
            are left out.

    Raises:
        DataError: if there is no such data set, or no image in it.
    """

    def __init__(
        self,
        source: str,
        model: nn.Module,
        *,
        split: str = "train",
        root: str | None = None,
        class_map: str | os.PathLike[str] | None = None,
    ) -> None:
        self.source = str(source)
        self.dataset = _open(self.source, split, root, "" if class_map is None else os.fspath(class_map))
        self.transform, self.mode, self.input_size = _make_transform(model)

    def __len__(self) -> int:
        """Number of images, 0 of a stream: even one that knows it has no image of a given index."""
        return 0 if isinstance(self.dataset, IterableDataset) else len(self.dataset)

    @property
    def name(self) -> str:
        """The data set's name, without the folders above it, which stay private."""
        if self.source.lower().startswith(_NAMED):
            return self.source
        return self.source.rstrip("/").rpartition("/")[2] if is_url(self.source) else Path(self.source).resolve().name

    @property
    def classes(self) -> dict[str, int]:
        """Label of each class name, if the data set has them; those of a folder are its sub-folders in sorted order."""
        reader = getattr(self.dataset, "reader", self.dataset)
        names = ("class_to_idx", "class_name_to_idx")
        return dict(next((found for name in names if (found := getattr(reader, name, None))), {}))

    @property
    def has_names(self) -> bool:
        """Whether names of images cost nothing: in folders and tar files."""
        return hasattr(getattr(self.dataset, "reader", None), "samples")

    def key(self, index: int) -> str:
        """What an image is known by, wherever it comes in the order: its path in the data set, or its index."""
        return str(self.dataset.reader.filename(index)).replace(os.sep, "/") if self.has_names else str(index)

    def fingerprint(self) -> str:
        """Checksum of the images' names in order, which identifies the data set to a resumed build; not of pixels."""
        digest = hashlib.sha256(f"{self.name}\n{len(self)}".encode())
        if self.has_names:
            for filename in self.dataset.reader.filenames():
                digest.update(f"\n{filename}".encode())
        return digest.hexdigest()

    def batches(
        self, batch_size: int, *, start: int = 0, workers: int = 0, chosen: Iterable[int] | None = None
    ) -> Iterator[Batch]:
        """Yield images in order, decoded in `workers` processes.

        Args:
            batch_size: images at a time.
            start: index of the first.
            workers: number of processes, 0 for none.
            chosen: ascending indices, instead of all from `start` on; of a stream, as many images from there on.
        """
        if isinstance(self.dataset, IterableDataset):
            yield from self._stream(batch_size, start, None if chosen is None else start + len(list(chosen)))
            return
        loader: Iterable[Batch | DataError] = DataLoader(
            _Decoded(self.dataset, self.transform, self.mode),
            batch_size=batch_size,
            sampler=range(start, len(self)) if chosen is None else chosen,
            num_workers=0 if stays_here(self.source) else workers,
            collate_fn=self._collate,
        )
        for batch in loader:
            if isinstance(batch, DataError):  # raised in a worker, it would come with that one's traceback
                raise batch
            yield batch

    def sample(self, count: int, *, seed: int = 0, progress: bool = False) -> Tensor:
        """Images (count, C, H, W) uint8 drawn at random, fewer if fewer can be read.

        Of a stream, which has no length, the first ones.
        """
        return self.draw(count, seed=seed, progress=progress).images

    def draw(self, count: int, *, seed: int = 0, progress: bool = False) -> Batch:
        """The same with their indices, in the order in which they were drawn, and what could not be read."""
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        batches = (next(self.batches(1, start=index)) for index in order) if order else self.batches(1)
        drawn: list[Batch] = []
        found = 0
        with progress_bar(total=count, desc="reading", unit="image", show=progress) as bar:
            for batch in batches:
                if found == count:
                    break
                drawn.append(batch)
                found += len(batch.images)
                bar.update(len(batch.images))
        images = [image for batch in drawn for image in batch.images]
        return Batch(
            start=min((batch.start for batch in drawn), default=0),
            stop=max((batch.stop for batch in drawn), default=0),
            images=torch.stack(images) if images else torch.empty(0, *self.input_size).byte(),
            indices=[index for batch in drawn for index in batch.indices],
            skipped=[what for batch in drawn for what in batch.skipped],
            labels=[label for batch in drawn for label in batch.labels],
        )

    def _stream(self, batch_size: int, start: int, stop: int | None) -> Iterator[Batch]:
        items = itertools.islice(enumerate(iter(self.dataset)), start, stop)
        while chunk := list(itertools.islice(items, batch_size)):
            yield self._put_together([(index, *_decode_item(item, self.transform, self.mode)) for index, item in chunk])

    def _collate(self, items: list[tuple[int, Tensor | str, int] | DataError]) -> Batch | DataError:
        failed = next((item for item in items if isinstance(item, DataError)), None)
        return failed or self._put_together([item for item in items if not isinstance(item, DataError)])

    def _put_together(self, items: list[tuple[int, Tensor | str, int]]) -> Batch:
        good = [(index, image, label) for index, image, label in items if isinstance(image, Tensor)]
        images = torch.stack([image for _, image, _ in good]) if good else torch.empty(0, *self.input_size).byte()
        return Batch(
            start=items[0][0],
            stop=items[-1][0] + 1,
            images=images,
            indices=[index for index, _, _ in good],
            skipped=[(index, self.filename(index), reason) for index, reason, _ in items if isinstance(reason, str)],
            labels=[label for _, _, label in good],
        )

    def filename(self, index: int) -> str:
        """What an image is called in its data set."""
        reader = getattr(self.dataset, "reader", None)
        if reader is None or isinstance(self.dataset, IterableDataset):
            return f"image {index}"
        return str(reader.filename(index))


def read_image(path: str | os.PathLike[str], model: nn.Module) -> Tensor:
    """One image file through the transform of a model, (C, H, W) uint8.

    Raises:
        DataError: if there is no such file, or no image in it.
    """
    transform, mode, _ = _make_transform(model)
    try:
        decoded = _decode(open(path, "rb"), transform, mode)  # noqa: SIM115, it is closed there
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if isinstance(decoded, str):
        raise DataError(f"cannot read {path}: {decoded}; expected an image file")
    return decoded


def _make_transform(model: nn.Module) -> tuple[Callable[[Any], Any], str, tuple[int, ...]]:
    """The transform of a model's own data config, the mode of its images, and their size (C, H, W)."""
    config = resolve_data_config(pretrained_cfg=family_of(model).pretrained_cfg)
    channels = config["input_size"][0]
    transform = create_transform(**config, is_training=False, use_prefetcher=True)
    return transform, {1: "L", 3: "RGB"}.get(channels, "RGB"), tuple(config["input_size"])


class _Decoded(Dataset):
    """timm's data set, except that an unreadable image is reported (timm silently takes the next one instead)."""

    def __init__(self, dataset: Any, transform: Callable[[Any], Any], mode: str) -> None:
        self.dataset, self.transform, self.mode = dataset, transform, mode

    def __getitem__(self, index: int) -> tuple[int, Tensor | str, int] | DataError:
        reader = getattr(self.dataset, "reader", self.dataset)
        try:
            item = reader[index]
        except DataError as error:
            return error
        except _NOT_IMAGES as error:
            return index, _reason(error), -1
        return index, *_decode_item(item, self.transform, self.mode)


def _decode_item(item: Any, transform: Callable[[Any], Any], mode: str) -> tuple[Tensor | str, int]:
    """The image of an item, as `_decode` gives it, and its label, -1 where it has none."""
    label = item[1] if len(item) > 1 else None
    return _decode(item[0], transform, mode), int(label) if isinstance(label, numbers.Integral) else -1


def _decode(image: Any, transform: Callable[[Any], Any], mode: str) -> Tensor | str:
    """The transformed uint8 image (C, H, W), or why it cannot be read."""
    try:
        if isinstance(image, Image.Image):
            decoded = image.convert(mode)
        else:
            with image, Image.open(image) as opened:
                decoded = opened.convert(mode)
    except Exception as error:  # Pillow's decoders raise anything over damaged files
        return _reason(error)
    return torch.as_tensor(transform(decoded))


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or empty"
    return first_line(error)


def check_source(source: str) -> None:
    """Raise DataError if a source on this machine is missing; a remote one is found missing when it is opened."""
    remote = source.lower().startswith(_NAMED) or is_url(source)
    if not remote and not Path(source).exists():
        raise DataError(
            f"no such folder or file: {source}; expected a folder of images, a tar file, a URL, or a name that "
            f"begins with {', '.join(_NAMED)}"
        )
    if not remote and Path(source).is_file() and Path(source).suffix != ".tar":
        raise DataError(f"{source} is a file, but no tar file; give a folder of images or a .tar archive")


def _open(source: str, split: str, root: str | None, class_map: str) -> Any:
    check_source(source)
    named = source.lower().startswith(_NAMED)
    if class_map and not Path(class_map).is_file():
        raise DataError(f"no class map at {class_map}; expected a text file with the name of one class a line")
    if class_map and source.lower().startswith("torch/"):
        raise DataError(f"{source} takes no class map; leave it out, its labels are its own")
    try:
        if is_url(source):
            dataset = ImageDataset("", RemoteReader(source, split, class_map))
        else:
            dataset = create_dataset(
                source if named else "", root=root if named else source, split=split, class_map=class_map
            )
    except DataError:
        raise
    # The readers raise the errors of their libraries: assertion, import, network and value errors.
    except Exception as error:
        raise DataError(f"cannot read the data set {source}: {first_line(error)}") from error
    if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
        raise DataError(f"no image in {source}")
    return dataset
