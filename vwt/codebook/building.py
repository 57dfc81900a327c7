"""A stream of images to a Codebook: sample, cluster, count.

Two passes over the data set. The first draws a uniform sample of patches, which is clustered in this process; the
second counts the patches and images of each word. Both go shard by shard (`vwt.codebook.passes`), in this process or
in others (`vwt.codebook.engine`), which changes nothing about the codebook. A build lives in a folder beside its
codebook (`OUT.building`) until it is complete, so that an interrupted one can go on: every shard's result is kept, and
the centres after each iteration of the clustering.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vwt.codebook.clustering import StreamingKMeans, kmeans
from vwt.codebook.codebook import Codebook, check_free
from vwt.codebook.config import BuildConfig, BuildReport
from vwt.codebook.engine import Engine
from vwt.codebook.features import FeatureStream, Unreadable
from vwt.codebook.passes import (
    RESOLUTION,
    SHARD_IMAGES,
    SHARDS,
    CountPass,
    Pass,
    SamplePass,
    gather_sample,
    sum_counts,
)
from vwt.codebook.resuming import SavedTensors, check_begun, open_matrix, read_json, work_folder
from vwt.codebook.sampling import HIGHEST, hash_limit
from vwt.codebook.store import ShardStore
from vwt.datasets import ImageSource
from vwt.documents import write_json
from vwt.errors import ArgumentError, CodebookError, DataError
from vwt.measure.timing import Stopwatch
from vwt.models.spec import PatchSpec
from vwt.progress import Steps, progress_bar
from vwt.remote import stays_here
from vwt.tokens.patches import Space

# faiss asks for at least 40 points a centre, and takes up to 256; little is gained above 200 ...
_PATCHES_PER_WORD = (40, 200)


# ... of which as many are taken as fit into this, in bytes.
_SAMPLE_BYTES = 256 << 20


# Of the folder of a build.
_VERSION = 2


# The first draw expects this share of the images to be readable; if fewer are, it is made again with more.
_READABLE = 0.95


# Cosine distance. faiss makes two words of one by 1 ± 1/1024 on each channel, which puts them 2e-6 apart, and rounding
# decides which of them a patch is nearer to.
_DUPLICATE = 1e-5


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
        source: a folder or a tar file, here or at a URL (`s3://bucket/folder`), or `hfds/…`, `torch/…`; see
            `vwt.datasets.ImageSource`.
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
    engine: Engine | None = None,
    work: str | None = None,
) -> tuple[Codebook, BuildReport]:
    """Build a codebook and say how it went; see `build_codebook`.

    Args:
        source: as there.
        model: as there.
        config: what decides the codebook.
        out: as there.
        root: where named data sets are cached.
        workers: processes that decode images; by default as many as half the processors, at most 8, and none where
            the engine has workers of its own.
        strict: stop at the first image that cannot be read, instead of skipping it.
        resume: go on with an interrupted build of the same codebook; ends with the bytes that it would have written.
        overwrite: replace an existing codebook, and drop an interrupted build unless `resume`.
        progress: show progress bars.
        engine: who works on shards; by default this process.
        work: URL of a folder for the results of shards, of any file system that fsspec knows and all workers reach;
            by default beside the codebook.
    """
    engine = engine or Engine()
    spec = PatchSpec.of(model)
    stream = ImageSource(source, model, split=config.split, root=root)
    target = Path(out) if out is not None else None
    if target is not None:
        check_free(target, overwrite=overwrite)
    if workers is None:
        workers = max(1, min(8, (os.cpu_count() or 1) // 2)) if engine.alone else 0
    if workers < 0:
        raise ArgumentError(f"workers is {workers}; expected 0 (decode in this process) or more")
    _check_divisible(stream, config, engine, work)
    with work_folder(target, resume=resume, overwrite=overwrite) as folder:
        features = FeatureStream(stream, model, spec, config.space, workers=workers, strict=strict)
        build = _Build(features, config, engine, folder, work, progress)
        if not resume:
            build.results.remove()
        codebook = build.run()
        if target is not None:
            codebook.save(target, overwrite=overwrite)
        build.results.remove()
    return codebook, build.report


def _check_divisible(stream: ImageSource, config: BuildConfig, engine: Engine, work: str | None) -> None:
    """Raise ArgumentError if several workers cannot share the data set, or the folder for results."""
    for url in (stream.source, work or ""):
        if not engine.alone and stays_here(url):
            raise ArgumentError(
                f"{url} is in the memory of this process, which workers do not see; take one process, or another place"
            )
    if not engine.alone and not len(stream):
        raise ArgumentError(
            f"{stream.source} is a stream, which workers cannot share; read it in one process, or give it as a folder, "
            "a tar file or hfds/…"
        )
    if not engine.alone and config.backend == "sklearn":
        raise ArgumentError(
            "MiniBatchKMeans sees the stream in its order; take the backend faiss to share a build among workers"
        )


class _Build:
    """One build; its steps in the order of `run`."""

    def __init__(
        self,
        features: FeatureStream,
        config: BuildConfig,
        engine: Engine,
        folder: Path,
        work: str | None,
        progress: bool,
    ) -> None:
        self.stream, self.features, self.spec = features.source, features, features.spec
        self.config, self.engine, self.folder, self.progress = config, engine, folder, progress
        self.step = Steps(2 if config.backend == "sklearn" else 3, progress)
        self.timed = Stopwatch()
        self.report = BuildReport(seconds=self.timed.seconds)
        self.what = self._describe()
        digest = hashlib.sha256(json.dumps(self.what, sort_keys=True).encode()).hexdigest()[:16]
        self.results = ShardStore(f"{work.rstrip('/')}/{digest}" if work else str(folder / "shards"))
        self.shard_images = max(SHARD_IMAGES, -(-len(self.stream) // SHARDS))
        self.patches, self.width = features.shape()

    def run(self) -> Codebook:
        self.date = self._open_folder()
        centres = self._cluster_stream() if self.config.backend == "sklearn" else self._cluster_sample()
        return self._count(torch.from_numpy(np.array(centres, dtype=np.float32)))

    def _describe(self) -> dict[str, Any]:
        """What decides the codebook."""
        what = {
            **dataclasses.asdict(self.config),
            "data set": self.stream.fingerprint(),
            "model": self.spec.model,
            "projection": self.spec.projection if self.config.space == "embedding" else {},
            "image size": list(self.stream.input_size),
        }
        return dict(json.loads(json.dumps(what)))

    def _open_folder(self) -> str:
        """Record what is built, or check that an interrupted build was of the same; returns the day it began."""
        path = self.folder / "build.json"
        check_begun(path)
        if path.exists():
            begun = read_json(path)
            if begun.get("version") != _VERSION:
                raise CodebookError(
                    f"{self.folder} holds an interrupted build of another version of vwt, whose sample is drawn in "
                    "another way; begin anew with --overwrite"
                )
            differing = sorted(key for key in self.what if self.what[key] != begun["what"].get(key))
            if differing:
                raise CodebookError(
                    f"{self.folder} holds an interrupted build with another {', '.join(differing)}; "
                    "resume it with the same, or drop it with --overwrite"
                )
            self.shard_images = begun["shard images"]
            return str(begun["date"])
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        now = datetime.datetime.fromtimestamp(float(epoch) if epoch else time.time(), datetime.UTC)
        begun = {"version": _VERSION, "what": self.what, "date": now.date().isoformat()}
        write_json(path, begun | {"shard images": self.shard_images})
        return now.date().isoformat()

    def _run_pass(self, work: Pass) -> list[int]:
        """Work on the shards that have no result yet; returns the numbers of all."""
        images, done = len(self.stream), self.results.shards(work.name)
        every = list(range(-(-images // self.shard_images)))
        left = [shard for shard in every if shard not in done] if images else [len(done)]
        bar = progress_bar(desc="reading", total=images or None, unit="image", show=self.progress)
        with bar:
            bar.update(min(self.shard_images * len(done), images or self.shard_images * len(done)))
            for shard in self.engine.run(work, left) if left else []:
                bar.update(shard.images)
                for part, seconds in shard.seconds.items():
                    self.timed.seconds[part] = self.timed.seconds.get(part, 0.0) + seconds
        return every or sorted(self.results.shards(work.name))

    # -- first pass ------------------------------------------------------------------------------------------------

    def _cluster_sample(self) -> np.ndarray:
        self.step(f"sampling patches of {self._images()}")
        sample = self._sample()
        self.step(f"clustering {len(sample)} patches into {self.config.words} words")
        state = SavedTensors(self.folder / "centres.safetensors")
        done = int(state.meta.get("iterations", 0))
        centres = state.tensors["centres"].numpy() if done else None
        bar = progress_bar(
            desc="clustering", total=self.config.iterations, initial=done, unit="iteration", show=self.progress
        )

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
        """A uniform sample of patches (n, D) float32 in random order, unit rows if spherical; all if there are few."""
        path, note = self.folder / "sample.f32", self.folder / "sample.json"
        if not note.exists():
            size = self._draw(path)
            write_json(note, {"shape": [size, self.width]})
            self.results.remove()
        size, width = read_json(note)["shape"]
        self.report.sampled = size
        return open_matrix(path, (size, width))

    def _draw(self, path: Path) -> int:
        """Write the sample; returns its size."""
        least, most = _PATCHES_PER_WORD
        size = self.config.words * max(least, min(most, _SAMPLE_BYTES // (4 * self.width * self.config.words)))
        patches, readable = len(self.stream) * self.patches, _READABLE
        for attempt in itertools.count():
            limit = hash_limit(size, patches, readable=readable)
            work = SamplePass(
                "sample" if not attempt else f"sample-{attempt}",
                self.features,
                self.results,
                self.shard_images,
                self.patches,
                seed=self.config.seed,
                size=size,
                limit=limit,
                spherical=self.config.spherical,
            )
            shards = self._run_pass(work)
            with self.timed("sample"):
                drawn = gather_sample(self.results, work.name, shards, size, path)
            if drawn == size or limit == HIGHEST:
                break
            readable /= 2
        self._check_enough(drawn, lambda: self.results.read(work.name, shards[0])[1]["skipped"])
        return drawn

    def _cluster_stream(self) -> np.ndarray:
        """Centres by MiniBatchKMeans; its state is private to scikit-learn, so an interrupted pass begins again."""
        state = SavedTensors(self.folder / "centres.safetensors")
        if state.tensors:
            self.report.sampled = int(state.meta["sampled"])
            return state.tensors["centres"].numpy()
        config = self.config
        self.step(f"clustering the patches of {self._images()} into {config.words} words")
        clusters = StreamingKMeans(config.words, spherical=config.spherical, seed=config.seed)
        seen, skipped = 0, []
        bar = progress_bar(desc="clustering", total=len(self.stream) or None, unit="image", show=self.progress)
        with bar:
            for index, patches in self.features.images("features", self._for_clustering):
                bar.update()
                if isinstance(patches, Unreadable):
                    skipped.append((index, *patches))
                    continue
                with self.timed("cluster"):
                    clusters.add(patches)
                seen += len(patches)
        self._check_enough(seen, lambda: skipped)
        with self.timed("cluster"):
            centres = clusters.centres()
        self.report.sampled = seen
        state.save({"centres": torch.from_numpy(centres)}, {"sampled": str(seen)})
        return centres

    def _images(self) -> str:
        return f"{len(self.stream) or 'all'} images"

    def _for_clustering(self, features: Tensor) -> Tensor:
        return (F.normalize(features, dim=-1) if self.config.spherical else features).cpu()

    def _check_enough(self, patches: int, skipped: Callable[[], list[tuple[int, str, str]]]) -> None:
        if patches >= self.config.words:
            return
        first = next(iter(skipped()), None)
        self.results.remove()
        shutil.rmtree(self.folder)  # nothing to resume
        if patches == 0:
            raise DataError(
                f"no readable image in {self.stream.source}" + (f" (first: {first[1]}: {first[2]})" if first else "")
            )
        raise DataError(
            f"{patches} patches are fewer than {self.config.words} words; give more images or ask for fewer words"
        )

    # -- second pass -----------------------------------------------------------------------------------------------

    def _count(self, centres: Tensor) -> Codebook:
        """Count patches and images of each word, and put words together with where they come from."""
        directions = F.normalize(centres, dim=-1)
        first = first_of_twins(directions)
        work = CountPass(
            "count",
            self.features,
            self.results,
            self.shard_images,
            self.patches,
            directions=directions,
            counted_as=first,
            threshold=self.config.threshold,
        )
        self.step(f"counting each word in {self._images()}")
        shards = self._run_pass(work)
        with self.timed("finish"):
            arrays, values = sum_counts(self.results, work.name, shards)
            sums = {name: torch.from_numpy(array) for name, array in arrays.items()}
            self._finish_report(values, sums["counts"], first)
            return self._codebook(centres, directions, sums)

    def _codebook(self, centres: Tensor, directions: Tensor, sums: dict[str, Tensor]) -> Codebook:
        config, counts = self.config, sums["counts"]
        if config.spherical:
            # A centre on the sphere has a direction only; its length is that of its patches along it, so that pixel
            # words look like patches and can be expressed in another normalisation. An empty word takes the mean.
            projections = sums["projections"].double() * RESOLUTION
            along = projections / counts.clamp(min=1)
            along[counts == 0] = projections.sum() / counts.sum()
            centres = directions * along[:, None].float()
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

    def _finish_report(self, values: dict[str, Any], counts: Tensor, first: Tensor) -> None:
        report, is_first = self.report, first == torch.arange(len(first))
        report.images = values["images"]
        report.skipped = {name: reason for _, name, reason in sorted(values["skipped"])}
        report.patches = int(counts.sum())
        report.empty, report.duplicate = int((is_first & (counts == 0)).sum()), int((~is_first).sum())
        report.effective = len(counts) - report.empty - report.duplicate
        report.distance = values["distance"] * RESOLUTION / report.patches
        report.matched = values["matched"] / report.patches


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
