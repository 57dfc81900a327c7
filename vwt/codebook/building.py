"""A stream of images to a Codebook: sample, cluster, count.

Two passes over the data set. The first draws a uniform sample of patches, which is clustered; the second counts the
patches and images of each word. A build lives in a folder beside its codebook (`OUT.building`) until it is complete,
so that an interrupted one can go on: the sample is a memory-mapped file in which repeating an image changes nothing,
clustering is saved after each iteration, and counts are saved together with the place that they have reached.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vwt.codebook.clustering import StreamingKMeans, kmeans, reservoir_slots
from vwt.codebook.codebook import Codebook, check_free
from vwt.codebook.features import FeatureStream
from vwt.codebook.matching import check_threshold, nearest_words, within
from vwt.codebook.resuming import SavedTensors, check_begun, open_sample, read_json, work_folder
from vwt.datasets import ImageSource
from vwt.documents import write_json
from vwt.errors import ArgumentError, CodebookError, DataError
from vwt.models.spec import PatchSpec
from vwt.tokens.patches import SPACES, Space

Backend = Literal["faiss", "sklearn"]


BACKENDS: tuple[Backend, ...] = ("faiss", "sklearn")


# faiss asks for at least 40 points a centre, and takes up to 256; little is gained above 200 ...
_PATCHES_PER_WORD = (40, 200)


# ... of which as many are taken as fit into this, in bytes.
_SAMPLE_BYTES = 256 << 20


_SAVE_EVERY = 1.0  # seconds


# Cosine distance. faiss makes two words of one by 1 ± 1/1024 on each channel, which puts them 2e-6 apart, and rounding
# decides which of them a patch is nearer to.
_DUPLICATE = 1e-5


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
    """

    words: int = 1000
    space: Space = "embedding"
    backend: Backend = "faiss"
    spherical: bool = True
    iterations: int = 9
    seed: int = 0
    threshold: float = 0.1
    split: str = "train"

    def __post_init__(self) -> None:
        for name, least, most in (("words", 1, 2**31), ("iterations", 1, 2**31), ("seed", 0, 2**31)):
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value < most:
                raise ArgumentError(f"{name} is {value!r}; expected an integer of at least {least}, below 2**31")
        for name, choices in (("space", SPACES), ("backend", BACKENDS)):
            if getattr(self, name) not in choices:
                raise ArgumentError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        check_threshold(self.threshold)


@dataclass
class BuildReport:
    """What a build did.

    Attributes:
        images: images read.
        skipped: name of each image that could not be read, with the reason.
        patches: patches seen.
        sampled: patches that the clustering worked on.
        empty: words that no patch is nearest to, duplicates not counted.
        duplicate: words that equal an earlier one, to which their patches count.
        effective: words that are neither.
        distance: mean cosine distance of all patches to their nearest word.
        matched: share of patches within the threshold.
        seconds: wall time by part of the build, of this run; "decode" is the time spent waiting for images.
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


def build_codebook(
    source: str | os.PathLike[str],
    model: nn.Module,
    words: int = 1000,
    space: Space = "embedding",
    *,
    out: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Codebook:
    """Cluster the patches of a data set into visual words (arXiv 2411.15397, section 3.2).

    Args:
        source: anything that timm's dataset factory reads: a folder, a tar file, `hfds/…`, `torch/…`.
        model: a timm Vision Transformer; images go through its own data config.
        words: K.
        space: "embedding" (words for this model) or "pixel" (for any model of its patch size).
        out: where to save the codebook; None keeps it in memory, and nothing to resume.
        options: further fields of `BuildConfig`, and arguments of `run_build`.

    Returns:
        The codebook.

    Raises:
        ArgumentError, DataError, ModelError, CodebookError: each with one line that says what to do.
    """
    known = {f.name for f in dataclasses.fields(BuildConfig)}
    config = BuildConfig(words=words, space=space, **{k: options.pop(k) for k in known & options.keys()})
    return run_build(os.fspath(source), model, config, out=out, **options)[0]


def run_build(
    source: str,
    model: nn.Module,
    config: BuildConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    root: str | None = None,
    workers: int | None = None,
    strict: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> tuple[Codebook, BuildReport]:
    """Build a codebook and say how it went; see `build_codebook`.

    Args:
        source: as there.
        model: as there.
        config: what decides the codebook.
        out: as there.
        root: where named data sets are cached.
        workers: processes that decode images; by default as many as half the processors, at most 8.
        strict: stop at the first image that cannot be read, instead of skipping it.
        resume: go on with an interrupted build of the same codebook; ends with the bytes that it would have written.
        overwrite: replace an existing codebook, and drop an interrupted build unless `resume`.
        progress: show progress bars.
    """
    spec = PatchSpec.of(model)
    stream = ImageSource(source, model, split=config.split, root=root)
    target = Path(out) if out is not None else None
    if target is not None:
        check_free(target, overwrite=overwrite)
    if workers is None:
        workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    if workers < 0:
        raise ArgumentError(f"workers is {workers}; expected 0 (decode in this process) or more")
    with work_folder(target, resume=resume, overwrite=overwrite) as folder:
        features = FeatureStream(stream, model, spec, config.space, workers=workers, strict=strict, progress=progress)
        build = _Build(stream, features, config, folder, progress)
        codebook = build.run()
        if target is not None:
            codebook.save(target, overwrite=overwrite)
    return codebook, build.report


class _Build:
    """One build; its steps in the order of `run`."""

    def __init__(
        self, stream: ImageSource, features: FeatureStream, config: BuildConfig, folder: Path, progress: bool
    ) -> None:
        self.stream, self.features, self.spec = stream, features, features.spec
        self.config, self.folder, self.progress = config, folder, progress
        self.timed = features.timed
        self.report = BuildReport(seconds=self.timed.seconds)

    def run(self) -> Codebook:
        self.date = self._open_folder()
        centres = self._cluster_stream() if self.config.backend == "sklearn" else self._cluster_sample()
        return self._count(torch.from_numpy(np.array(centres, dtype=np.float32)))

    def _open_folder(self) -> str:
        """Record what is built, or check that an interrupted build was of the same; returns the day it began."""
        path = self.folder / "build.json"
        what = {
            **dataclasses.asdict(self.config),
            "data set": self.stream.fingerprint(),
            "model": self.spec.model,
            "projection": self.spec.projection if self.config.space == "embedding" else {},
            "image size": list(self.stream.input_size),
        }
        what = json.loads(json.dumps(what))
        check_begun(path)
        if path.exists():
            begun = read_json(path)
            differing = sorted(key for key in what if what[key] != begun["what"].get(key))
            if differing:
                raise CodebookError(
                    f"{self.folder} holds an interrupted build with another {', '.join(differing)}; "
                    "resume it with the same, or drop it with --overwrite"
                )
            return str(begun["date"])
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        now = datetime.datetime.fromtimestamp(float(epoch) if epoch else time.time(), datetime.UTC)
        write_json(path, {"what": what, "date": now.date().isoformat()})
        return now.date().isoformat()

    # -- first pass ------------------------------------------------------------------------------------------------

    def _cluster_sample(self) -> np.ndarray:
        state = SavedTensors(self.folder / "centres.safetensors")
        if state.meta.get("iterations") == str(self.config.iterations):
            self._restore_first_pass()
            return state.tensors["centres"].numpy()
        sample = self._sample()
        done = int(state.meta.get("iterations", 0))
        centres = state.tensors["centres"].numpy() if done else None
        bar = tqdm(desc="cluster", total=self.config.iterations, initial=done, unit="it", disable=not self.progress)

        def after(iteration: int, centres: np.ndarray) -> None:
            state.save({"centres": torch.from_numpy(centres)}, {"iterations": str(iteration)})
            bar.update()

        with self.timed("cluster"), bar:
            return kmeans(
                sample,
                self.config.words,
                iterations=self.config.iterations,
                spherical=self.config.spherical,
                seed=self.config.seed,
                done=done,
                centres=centres,
                after=after,
            )

    def _sample(self) -> np.ndarray:
        """A uniform sample of patches (n, D) float32, unit rows if spherical; all of them if there are few."""
        first_pass = self._restore_first_pass()
        path, seen = self.folder / "sample.f32", first_pass["patches"]
        sample = open_sample(path, tuple(first_pass["shape"]), begun=True) if seen else None
        for batch, features in self.features.batches("sample", first_pass["next"]):
            with self.timed("sample"):
                patches = self._for_clustering(features)
                if sample is None:
                    sample = open_sample(path, self._sample_shape(*patches.shape[1:]))
                for index, rows in zip(batch.indices, patches.numpy(), strict=True):
                    rng = np.random.default_rng((self.config.seed, index))
                    slots = reservoir_slots(seen, len(rows), len(sample), rng)
                    sample[slots[slots >= 0]] = rows[slots >= 0]
                    seen += len(rows)
                self._save_first_pass({"next": batch.stop, "patches": seen, "shape": list(sample.shape)})
        self._check_enough(seen)
        assert sample is not None
        self.report.sampled = min(seen, len(sample))
        return np.asarray(sample[: self.report.sampled])

    def _sample_shape(self, patches: int, width: int) -> tuple[int, int]:
        least, most = _PATCHES_PER_WORD
        size = self.config.words * max(least, min(most, _SAMPLE_BYTES // (4 * width * self.config.words)))
        return (min(size, len(self.stream) * patches) if len(self.stream) else size), width

    def _for_clustering(self, features: Tensor) -> Tensor:
        return (F.normalize(features, dim=-1) if self.config.spherical else features).cpu()

    def _cluster_stream(self) -> np.ndarray:
        """Centres by MiniBatchKMeans; its state is private to scikit-learn, so an interrupted pass begins again."""
        state = SavedTensors(self.folder / "centres.safetensors")
        if state.tensors:
            self._restore_first_pass()
            return state.tensors["centres"].numpy()
        clusters = StreamingKMeans(self.config.words, spherical=self.config.spherical, seed=self.config.seed)
        seen = 0
        for _, features in self.features.batches("cluster", 0):
            with self.timed("cluster"):
                clusters.add(self._for_clustering(features).flatten(0, 1))
            seen += features.shape[0] * features.shape[1]
        self._check_enough(seen)
        with self.timed("cluster"):
            centres = clusters.centres()
        self.report.sampled = seen
        self._save_first_pass({"next": len(self.stream), "patches": seen, "shape": [seen, centres.shape[1]]})
        state.save({"centres": torch.from_numpy(centres)}, {})
        return centres

    def _save_first_pass(self, first_pass: dict[str, Any]) -> None:
        write_json(self.folder / "first_pass.json", first_pass | {"skipped": list(self.features.skipped.items())})

    def _restore_first_pass(self) -> dict[str, Any]:
        path = self.folder / "first_pass.json"
        if not path.exists():
            return {"next": 0, "patches": 0}
        first_pass = read_json(path)
        self.features.skipped = {index: (name, reason) for index, (name, reason) in first_pass.pop("skipped")}
        self.report.sampled = min(first_pass["patches"], first_pass["shape"][0])
        return first_pass

    def _check_enough(self, patches: int) -> None:
        if patches < self.config.words:
            shutil.rmtree(self.folder)  # nothing to resume
        if patches == 0:
            first = next(iter(self.features.skipped.values()), None)
            raise DataError(
                f"no readable image in {self.stream.source}" + (f" (first: {first[0]}: {first[1]})" if first else "")
            )
        if patches < self.config.words:
            raise DataError(
                f"{patches} patches are fewer than {self.config.words} words; give more images or ask for fewer words"
            )

    # -- second pass -----------------------------------------------------------------------------------------------

    def _count(self, centres: Tensor) -> Codebook:
        """Count patches and images of each word, and put words together with where they come from."""
        words, directions = len(centres), F.normalize(centres, dim=-1).to(self.features.device)
        first = first_of_twins(directions.cpu()).to(directions.device)
        state = SavedTensors(self.folder / "counts.safetensors")
        sums = state.tensors or {
            "counts": torch.zeros(words, dtype=torch.int64),
            "document_counts": torch.zeros(words, dtype=torch.int64),
            "projections": torch.zeros(words, dtype=torch.float64),
            "totals": torch.zeros(3, dtype=torch.float64),  # images, sum of distances, patches within the threshold
        }
        saved = time.monotonic()
        for batch, features in self.features.batches("count", int(state.meta.get("next", 0))):
            with self.timed("count"):
                _count_batch(features, directions, first, self.config.threshold, sums)
            if time.monotonic() - saved > _SAVE_EVERY:
                state.save(sums, {"next": str(batch.stop)})
                saved = time.monotonic()
        with self.timed("finish"):
            return self._codebook(centres, directions.cpu(), first.cpu(), sums)

    def _codebook(self, centres: Tensor, directions: Tensor, first: Tensor, sums: dict[str, Tensor]) -> Codebook:
        config, counts = self.config, sums["counts"]
        images, distance, matched = sums["totals"].tolist()
        if config.spherical:
            # A centre on the sphere has a direction only; its length is that of its patches along it, so that pixel
            # words look like patches and can be expressed in another normalisation. An empty word takes the mean.
            along = sums["projections"] / counts.clamp(min=1)
            along[counts == 0] = sums["projections"].sum() / counts.sum()
            centres = directions * along[:, None].float()
        self._finish_report(int(images), distance, matched, counts, first)
        packages = ["torch", "timm", "numpy", "faiss-cpu" if config.backend == "faiss" else "scikit-learn"]
        return Codebook(
            words=centres,
            counts=counts,
            document_counts=sums["document_counts"],
            space=config.space,
            patch_size=self.spec.patch_size,
            mean=self.spec.mean,
            std=self.spec.std,
            projection=self.spec.projection if config.space == "embedding" else {},
            provenance={
                "model": self.spec.model,
                "data set": {
                    "name": self.stream.name,
                    "split": config.split,
                    "fingerprint": self.stream.fingerprint(),
                    "images": self.report.images,
                    "skipped": len(self.report.skipped),
                    "patches": self.report.patches,
                    "image size": list(self.stream.input_size),
                },
                "clustering": {
                    "backend": config.backend,
                    "spherical": config.spherical,
                    "iterations": config.iterations if config.backend == "faiss" else 1,
                    "seed": config.seed,
                    "sampled": self.report.sampled,
                    "effective words": self.report.effective,
                    "mean cosine distance": round(self.report.distance, 6),
                    "mean": list(self.spec.mean),
                    "std": list(self.spec.std),
                },
                "versions": {name: importlib.metadata.version(name) for name in ["vwt", *packages]},
                "date": self.date,
            },
        )

    def _finish_report(self, images: int, distance: float, matched: float, counts: Tensor, first: Tensor) -> None:
        report, is_first = self.report, first == torch.arange(len(first))
        report.images = images
        report.skipped = {name: reason for _, (name, reason) in sorted(self.features.skipped.items())}
        report.patches = int(counts.sum())
        report.empty, report.duplicate = int((is_first & (counts == 0)).sum()), int((~is_first).sum())
        report.effective = len(counts) - report.empty - report.duplicate
        report.distance, report.matched = distance / report.patches, matched / report.patches


def _count_batch(
    features: Tensor, directions: Tensor, first: Tensor, threshold: float, sums: dict[str, Tensor]
) -> None:
    """Add patches (B, N, D) to counts, document counts, projections on their words, and totals.

    Patches of a word that equals an earlier one count to that; `first` as `first_of_twins` gives it.
    """
    words = len(directions)
    similarity, nearest = nearest_words(features, directions)
    nearest = first[nearest]
    flat = nearest.flatten()
    occurs = torch.zeros(len(features), words, dtype=torch.bool, device=features.device).scatter_(1, nearest, True)
    along = (similarity * features.norm(dim=-1)).flatten().double()
    matched = within(similarity, threshold).sum()
    sums["counts"] += torch.bincount(flat, minlength=words).cpu()
    sums["document_counts"] += occurs.sum(0).cpu()
    sums["projections"] += torch.bincount(flat.cpu(), along.cpu(), minlength=words)  # in order, whatever the device
    sums["totals"] += torch.tensor(
        [len(features), float((1.0 - similarity.double()).sum()), float(matched)], dtype=torch.float64
    )


def first_of_twins(directions: Tensor) -> Tensor:
    """Id (K,) int64 of the first word that each points the way of, within a cosine distance of 1e-5; else its own.

    Args:
        directions: (K, D) of unit length.
    """
    first = torch.arange(len(directions))
    for start in range(0, len(directions), 1024):
        block = directions[start : start + 1024]
        same = (block @ directions.T >= 1.0 - _DUPLICATE).tril(start)
        same[torch.arange(len(block)), torch.arange(start, start + len(block))] = True
        first[start : start + 1024] = same.int().argmax(dim=1)
    while not torch.equal(first, first[first]):  # the twin of a twin
        first = first[first]
    return first
