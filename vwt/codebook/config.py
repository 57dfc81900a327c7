"""What a build of a codebook is asked for, and what it reports."""

from dataclasses import dataclass, field
from typing import Literal

from vwt.codebook.matching import check_threshold
from vwt.errors import ArgumentError
from vwt.tokens.patches import SPACES, Space

Backend = Literal["faiss", "sklearn"]


BACKENDS: tuple[Backend, ...] = ("faiss", "sklearn")


@dataclass(frozen=True)
class BuildConfig:
    """What decides the bytes of a codebook, besides images and model.

    Attributes:
        words: K.
        space: "pixel" or "embedding".
        backend: "faiss" (k-means over a uniform sample) or "sklearn" (MiniBatchKMeans over the whole stream).
        spherical: cluster by cosine distance, as words are matched; False for Euclidean k-means as in the paper.
        iterations: of faiss's k-means, most of them on a part of the sample.
        seed: of the sample and of the clustering.
        threshold: cosine distance up to which the report counts a patch as matched.
        split: of the data set.
        count_images: read only so many images, drawn at random, in the second pass, which counts the words and measures
            the lengths of spherical ones; by default all.
    """

    words: int = 1000
    space: Space = "embedding"
    backend: Backend = "faiss"
    spherical: bool = True
    iterations: int = 9
    seed: int = 0
    threshold: float = 0.1
    split: str = "train"
    count_images: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("words", 1), ("iterations", 1), ("seed", 0), ("count_images", 1)):
            value = getattr(self, name)
            if value is None and name == "count_images":
                continue
            if not isinstance(value, int) or not least <= value < 2**31:
                raise ArgumentError(f"{name} is {value!r}; expected an integer of at least {least}, below 2**31")
        for name, choices in (("space", SPACES), ("backend", BACKENDS)):
            if getattr(self, name) not in choices:
                raise ArgumentError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        check_threshold(self.threshold)


@dataclass
class BuildReport:
    """What a build did.

    Attributes:
        images: images read in the second pass.
        skipped: name of each image that could not be read, with the reason.
        patches: patches seen.
        sampled: patches that the clustering worked on.
        empty: words that no patch is nearest to, duplicates not counted.
        duplicate: words that equal an earlier one, to which their patches count.
        effective: words that are neither.
        distance: mean cosine distance of all patches to their nearest word.
        matched: share of patches within the threshold.
        seconds: time by part of the build, of this run, of all workers together; "decode" is spent waiting for images.
    """

    images: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    patches: int = 0
    sampled: int = 0
    empty: int = 0
    duplicate: int = 0
    effective: int = 0
    distance: float = 0.0
    matched: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
