"""The two passes over a data set, shard by shard: what a worker does, wherever it runs.

A shard is a run of consecutive images. Its result depends on nothing but its images, and results are put together
without regard to their order: the sample as the patches of lowest hash, the counts as sums of integers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vwt.codebook.features import FeatureStream, Unreadable
from vwt.codebook.matching import nearest_words, within
from vwt.codebook.resuming import make_matrix
from vwt.codebook.sampling import HIGHEST, image_hash, lowest, patch_hashes
from vwt.codebook.store import ShardStore
from vwt.documents import replacing

# A shard's images, where the data set is small, and the number of shards, where it is large.
SHARD_IMAGES, SHARDS = 32, 4096

# Sums of reals are those of integer multiples of this, which do not depend on their order. A billion images of 196
# patches overflow int64 if patches of one word are longer than 40 on average.
RESOLUTION = 2.0**-20


@dataclass
class Done:
    """A shard that was worked on.

    Attributes:
        shard: its number.
        images: in it.
        seconds: by part.
        restarted: whether its worker is one that took the place of a lost one.
    """

    shard: int
    images: int
    seconds: dict[str, float]
    restarted: bool = False


@dataclass
class Pass:
    """What both passes have in common.

    Attributes:
        name: of the results' folder.
        features: of the images.
        store: where results go.
        shard_images: images a shard.
        patches: N, an image.
    """

    name: str
    features: FeatureStream
    store: ShardStore
    shard_images: int
    patches: int

    def __call__(self, shards: Iterable[int]) -> Iterator[Done]:
        """Work on shards in ascending order, and write the result of each; on all to the end if this is a stream."""
        images = len(self.features.source)
        if images:
            numbers: Sequence[int] = list(shards)
            chosen = chain.from_iterable(map(self.chosen, numbers))
            stream = self.features.images(self.name, self.each, chosen)
        else:
            numbers = range(next(iter(shards)), 2**62)
            stream = self.features.images(self.name, self.each, start=self.first(numbers[0]))
        for shard in numbers:
            before = dict(self.features.timed.seconds)
            items = list(islice(stream, len(self.chosen(shard))))
            if not images and not items:
                return
            unreadable = [(index, *made) for index, made in items if isinstance(made, Unreadable)]
            arrays, values = self.result([(index, made) for index, made in items if not isinstance(made, Unreadable)])
            values |= {"images": len(items) - len(unreadable), "skipped": unreadable}
            self.store.write(self.name, shard, arrays, values)
            spent = {part: s - before.get(part, 0.0) for part, s in self.features.timed.seconds.items()}
            yield Done(shard, len(items) if not images else self.last(shard) - self.first(shard), spent)

    def first(self, shard: int) -> int:
        """Index of a shard's first image."""
        return shard * self.shard_images

    def last(self, shard: int) -> int:
        """Index after a shard's last image."""
        images = len(self.features.source)
        return min(self.first(shard + 1), images) if images else self.first(shard + 1)

    def chosen(self, shard: int) -> list[int]:
        """Indices of the images of a shard that are read."""
        return list(range(self.first(shard), self.last(shard)))

    def each(self, features: Tensor) -> Any:
        """What is made of an image's features (N, D), in a thread."""
        raise NotImplementedError

    def result(self, items: list[tuple[int, Any]]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays and values of a shard, from what `each` made of its images."""
        raise NotImplementedError


@dataclass
class SamplePass(Pass):
    """Draws the patches of lowest hash.

    An image none of whose patches has a hash up to the limit is not even read, so that the pass over a large data set
    costs no more than one over as many images as the sample has patches.

    Attributes:
        seed: of the hashes.
        size: of the sample.
        limit: highest hash that is taken; lowered as a stream goes on.
        spherical: whether patches are scaled to unit length.
    """

    seed: int
    size: int
    limit: int
    spherical: bool
    known: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    def chosen(self, shard: int) -> list[int]:
        """See `Pass`."""
        indices = super().chosen(shard)
        if self.limit == HIGHEST or not len(self.features.source):
            return indices
        return [index for index in indices if len(self._taken(index)[0])]

    def each(self, features: Tensor) -> Tensor:
        """See `Pass`."""
        return (F.normalize(features, dim=-1) if self.spherical else features).cpu()

    def result(self, items: list[tuple[int, Tensor]]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Hashes (n,) uint64, numbers (n,) int64 in the data set, and rows (n, D) float32 of the patches taken."""
        taken = [(index, *self._taken(index), rows) for index, rows in items]
        hashes = np.concatenate([np.empty(0, np.uint64), *(values for _, _, values, _ in taken)])
        numbers = [index * self.patches + places for index, places, _, _ in taken]
        rows = [rows.numpy()[places] for _, places, _, rows in taken]
        if not len(self.features.source):
            self._lower_limit(hashes)
        return {
            "hashes": hashes,
            "numbers": np.concatenate([np.empty(0, np.int64), *numbers]),
            "rows": np.concatenate(rows) if rows else np.empty((0, 0), np.float32),
        }, {}

    def _taken(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Places in the image of the patches that are taken, and their hashes."""
        hashes = patch_hashes(self.seed, self.features.source.key(index), self.patches)
        places = np.flatnonzero(hashes <= np.uint64(self.limit))
        return places, hashes[places]

    def _lower_limit(self, hashes: np.ndarray) -> None:
        self.known = np.sort(np.concatenate([self.known, hashes]))[: self.size]
        if len(self.known) == self.size:
            self.limit = int(self.known[-1])


COUNTS = ("counts", "document_counts", "projections")


@dataclass
class CountPass(Pass):
    """Counts the patches and images of each word.

    Attributes:
        directions: (K, D) float32 words of unit length.
        counted_as: (K,) int64, the word that the patches of each count to: an earlier one that equals it, or itself.
        threshold: cosine distance within which a patch counts as matched.
        seed: of the hashes of images.
        limit: highest hash of an image that is counted.
    """

    directions: Tensor
    counted_as: Tensor
    threshold: float
    seed: int = 0
    limit: int = HIGHEST

    def chosen(self, shard: int) -> list[int]:
        """See `Pass`."""
        indices = super().chosen(shard)
        if self.limit == HIGHEST:
            return indices
        return [index for index in indices if image_hash(self.seed, self.features.source.key(index)) <= self.limit]

    @torch.inference_mode()
    def each(self, features: Tensor) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Nearest words (N,), projections on them and sum of distances in units of `RESOLUTION`, patches matched."""
        self.directions = self.directions.to(features.device)
        similarity, nearest = nearest_words(features, self.directions)
        along = _fixed(similarity * features.norm(dim=-1))
        distance = int(_fixed(1.0 - similarity.double()).sum())
        matched = int(within(similarity, self.threshold).sum())
        return self.counted_as[nearest.cpu()].numpy(), along.cpu().numpy(), distance, matched

    def result(self, items: list[tuple[int, Any]]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Counts, document counts and projections (K,) int64; sums of distances and of patches matched."""
        arrays = {name: np.zeros(len(self.directions), np.int64) for name in COUNTS}
        values = {"distance": 0, "matched": 0}
        for _, (nearest, along, distance, matched) in items:
            np.add.at(arrays["counts"], nearest, 1)
            np.add.at(arrays["document_counts"], np.unique(nearest), 1)
            np.add.at(arrays["projections"], nearest, along)
            values["distance"] += distance
            values["matched"] += matched
        return arrays, values


def _fixed(values: Tensor) -> Tensor:
    """Reals in units of `RESOLUTION`, int64."""
    return (values.double() / RESOLUTION).round().long()


def gather_sample(
    results: ShardStore, name: str, shards: Sequence[int], size: int, path: Path, dtype: type[np.generic]
) -> int:
    """Write the patches of lowest hash of all shards to a file that holds a matrix (n, D), sorted by hash.

    Args:
        results: of a `SamplePass`; no more than one shard's rows are held in memory.
        name: of the pass.
        shards: their numbers.
        size: of the sample, at most.
        path: of the file; it is there when it is complete.
        dtype: of the matrix.

    Returns:
        n.
    """
    hashes, numbers, width = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], 0
    for shard in shards:
        arrays, _ = results.read(name, shard)
        hashes.append(arrays["hashes"])
        numbers.append(arrays["numbers"])
        width = max(width, arrays["rows"].shape[1])
    order = lowest(np.concatenate(hashes), np.concatenate(numbers), size)
    place = np.full(sum(map(len, hashes)), -1)
    place[order] = np.arange(len(order))
    if not len(order):
        return 0
    with replacing(path) as fresh:
        sample = make_matrix(fresh, (len(order), width), dtype)
        start = 0
        for shard in shards:
            rows = results.read(name, shard)[0]["rows"]
            places = place[start : start + len(rows)]
            if len(rows):  # the width of none is unknown
                sample[places[places >= 0]] = rows[places >= 0]
            start += len(rows)
    return len(order)


def sum_counts(results: ShardStore, name: str, shards: Sequence[int]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and values of all shards of a `CountPass` together; the images that were skipped in their order."""
    arrays, values = results.read(name, shards[0])
    for shard in shards[1:]:
        more, others = results.read(name, shard)
        for part in COUNTS:
            arrays[part] += more[part]
        for part in values:
            values[part] += others[part]
    return arrays, values
