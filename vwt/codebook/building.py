"""A stream of images to a Codebook: sample, cluster, count.

Two passes over the data set. The first draws a uniform sample of patches, which is clustered in this process; the
second counts the patches and images of each word. Both go shard by shard (`vwt.codebook.passes`), in this process or
in others (`vwt.codebook.engine`), which changes nothing about the codebook. A build lives in a folder beside its
codebook (`OUT.building`) until it is complete, so that an interrupted one can go on: every shard's result is kept, and
the centres after each iteration of the clustering.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vwt.codebook.clustering import StreamingKMeans, kmeans, sample_dtype
from vwt.codebook.codebook import Codebook
from vwt.codebook.config import BuildConfig, BuildReport
from vwt.codebook.engine import Engine
from vwt.codebook.features import FeatureStream, Unreadable
from vwt.codebook.files import check_free
from vwt.codebook.finishing import along_patches, fill_report, first_of_twins, make_provenance
from vwt.codebook.passes import (
    SHARD_IMAGES,
    SHARDS,
    CountPass,
    Pass,
    SamplePass,
    gather_sample,
    sum_counts,
)
from vwt.codebook.resuming import SavedTensors, begin, open_matrix, read_json, work_folder
from vwt.codebook.sampling import HIGHEST, hash_limit, image_hash
from vwt.codebook.store import ShardStore
from vwt.datasets import ImageSource
from vwt.documents import write_json
from vwt.errors import ArgumentError, DataError
from vwt.measure.timing import Stopwatch
from vwt.models.spec import PatchSpec
from vwt.progress import Steps, progress_bar
from vwt.remote import stays_here
from vwt.tokens.patches import Space

# faiss asks for at least 40 points a centre, and takes up to 256; little is gained above 200 ...
_PATCHES_PER_WORD = (40, 200)


# ... of which as many are taken as fit into this, in bytes.
_SAMPLE_BYTES = 256 << 20


# The first draw expects this share of the images to be readable; if fewer are, it is made again with more.
_READABLE = 0.95


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
    if config.count_images is not None and not len(stream):
        raise ArgumentError(f"{stream.source} is a stream, of which no images can be drawn; leave count_images out")
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
        # Builds of equal codebooks into different places have results of their own, which each removes in the end.
        own = json.dumps([self.what, str(folder.resolve())], sort_keys=True)
        digest = hashlib.sha256(own.encode()).hexdigest()[:16]
        self.results = ShardStore(f"{work.rstrip('/')}/{digest}" if work else str(folder / "shards"))
        self.shard_images = max(SHARD_IMAGES, -(-len(self.stream) // SHARDS))
        self.patches, self.width = features.shape()

    def run(self) -> Codebook:
        self.date, self.shard_images = begin(self.folder, self.what, self.shard_images)
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
        self.step(f"sampling patches of {self._images()} images")
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
        """A uniform sample of patches (n, D) in random order, unit rows if spherical; all if there are few."""
        path, note = self.folder / "sample.raw", self.folder / "sample.json"
        if not note.exists():
            size = self._draw(path)
            write_json(note, {"shape": [size, self.width]})
            self.results.remove()
        size, width = read_json(note)["shape"]
        self.report.sampled = size
        return open_matrix(path, (size, width), sample_dtype(self.config.words))

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
                drawn = gather_sample(self.results, work.name, shards, size, path, sample_dtype(self.config.words))
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
        self.step(f"clustering the patches of {self._images()} images into {config.words} words")
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

    def _images(self) -> int | str:
        return len(self.stream) or "all"

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
            seed=self.config.seed,
            limit=self._count_limit(),
        )
        self.step(f"counting each word in {self.config.count_images or self._images()} images")
        shards = self._run_pass(work)
        with self.timed("finish"):
            arrays, values = sum_counts(self.results, work.name, shards)
            sums = {name: torch.from_numpy(array) for name, array in arrays.items()}
            fill_report(self.report, values, sums["counts"], first)
            if not self.report.patches:
                raise DataError("none of the images that were drawn to be counted can be read; count more images")
            return Codebook(
                words=along_patches(directions, sums) if self.config.spherical else centres,
                counts=sums["counts"],
                document_counts=sums["document_counts"],
                space=self.config.space,
                patch_size=self.spec.patch_size,
                mean=self.spec.mean,
                std=self.spec.std,
                projection=self.spec.projection if self.config.space == "embedding" else {},
                provenance=make_provenance(self.config, self.stream, self.spec, self.report, self.date),
            )

    def _count_limit(self) -> int:
        """Highest hash of an image that is counted."""
        most = self.config.count_images
        if most is None or most >= len(self.stream):
            return HIGHEST
        hashes = [image_hash(self.config.seed, self.stream.key(index)) for index in range(len(self.stream))]
        return int(np.partition(np.array(hashes, np.uint64), most - 1)[most - 1])
