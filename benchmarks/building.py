"""Where the time and memory of a codebook build go, and how its clustering compares with scikit-learn's.

    python benchmarks/building.py ../shared/data/words --model MODEL [--checkpoint FILE] [--space pixel] [--memory]
        [--engines] [--many WORDS [--iterations N]]

Five tables, the first four of medians over runs in turn:

1. Parts of a build: the whole build, and what decoding and clustering alone take; what is left is hidden or small.
2. Clustering of all patches in memory: faiss as `vwt build` uses it against `MiniBatchKMeans.fit` with its defaults,
   on the same patches, by Euclidean and by cosine distance; `time_ratio` and `distance_change` are to scikit-learn's.
3. With --memory: peak resident memory of the build on the data set, and on the data set read ten times over.
4. With --engines: images a second of one and two workers, in processes and on Ray, each image counted in both passes;
   from what two more times the data set take longer than it alone, so that the start of workers does not count.
5. With --many: seconds and peak memory of each iteration of clustering so many words, from 26 synthetic patches a word,
   192 wide, in a file as a build has it. All else is left out.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from harness import positive
from results import Row, print_table, results_paths, save_results
from sklearn.cluster import MiniBatchKMeans
from torch import nn

from vwt.cli import run_script
from vwt.codebook.building import run_build
from vwt.codebook.clustering import kmeans, sample_dtype, subset_sizes
from vwt.codebook.config import BuildConfig
from vwt.codebook.engine import Engine
from vwt.codebook.features import FeatureStream, Unreadable
from vwt.codebook.matching import nearest_words
from vwt.codebook.resuming import make_matrix, open_matrix
from vwt.datasets import ImageSource
from vwt.measure.environment import hardware
from vwt.models.create import create_model
from vwt.models.spec import PatchSpec
from vwt.tokens.patches import SPACES

RUNS = 3
PARTS = {"part": "", "seconds": ".2f", "share": ".2f"}
CLUSTERING = {
    "metric": "", "backend": "", "seconds": ".2f", "distance": ".4f", "time_ratio": ".2f", "distance_change": "+.4f",
}  # fmt: skip
ENGINES = [Engine("local", 1), Engine("local", 2), Engine("ray", 1), Engine("ray", 2)]
RATES = {"engine": "", "workers": "d", "images_per_second": ".1f", "start": ".1f"}
MANY = {"iteration": "d", "patches": "d", "seconds": ".1f", "distance": ".4f", "gigabytes": ".2f"}
PATCHES_PER_WORD, WIDTH = 26, 192  # of --many
MEMORY = {"images": "d", "gigabytes": ".2f", "before": ".2f"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("data", help="folder of images")
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkpoint")
    parser.add_argument("--random-weights", action="store_true", help="no weights")
    parser.add_argument("--words", type=positive, default=1000)
    parser.add_argument("--space", choices=SPACES, default="embedding")
    parser.add_argument("--memory", action="store_true", help="measure peak memory at 1 and 10 times the images")
    parser.add_argument("--engines", action="store_true", help="measure images a second of one and two workers")
    parser.add_argument("--many", type=positive, metavar="WORDS", help="measure the clustering of so many words alone")
    parser.add_argument("--iterations", type=positive, default=BuildConfig().iterations, help="of --many")
    parser.add_argument("--results-file", type=Path, metavar="NAME", help="writes NAME.json and NAME.csv")
    parser.add_argument("--peak-of", nargs=2, metavar=("COPIES", "OUT"), help=argparse.SUPPRESS)


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> None:
    """What the options ask for."""
    model = create_model(arguments.model, arguments.checkpoint, weights=not arguments.random_weights)
    if arguments.peak_of:
        return print_peak(arguments, model)
    paths = results_paths(arguments.results_file)
    line = f"{hardware(torch.device('cpu'), 'float32')}, faiss {faiss.__version__}"
    if arguments.many:
        print(line)
        rows = measure_many(arguments.many, arguments.iterations)
        print_table(f"Clustering of {arguments.many} words", rows, MANY)
        return save_results(paths, {"hardware": line, "arguments": vars(arguments)}, {"many": rows})
    print(f"{line}\n{arguments.model}, {arguments.words} words in {arguments.space} space of {arguments.data}")
    tables = {"parts": measure_parts(arguments, model), "clustering": measure_clustering(arguments, model)}
    print_table("Parts of a build", tables["parts"], PARTS)
    print_table("Clustering", tables["clustering"], CLUSTERING)
    if arguments.memory:
        tables["memory"] = [measure_memory(arguments, copies) for copies in (1, 10)]
        print_table("Peak memory, and that before the build", tables["memory"], MEMORY)
    if arguments.engines:
        tables["engines"] = measure_engines(arguments, model)
        print_table("Images a second, and seconds that do not grow with images", tables["engines"], RATES)
    save_results(paths, {"hardware": line, "arguments": vars(arguments)}, tables)


def measure_parts(arguments: argparse.Namespace, model: nn.Module) -> list[Row]:
    """Seconds of decoding alone (two passes), clustering, and the whole build, and their share of it."""
    source, workers = ImageSource(arguments.data, model), max(1, (os.cpu_count() or 1) // 2)
    config = BuildConfig(words=arguments.words, space=arguments.space)
    runs: dict[str, list[float]] = {"decoding, two passes": [], "clustering": [], "whole build": []}
    for _ in range(RUNS):
        decoding, _ = timed(lambda: [None for _ in range(2) for _ in source.batches(4, workers=workers)])
        whole, (_, report) = timed(partial(run_build, arguments.data, model, config, workers=workers, progress=False))
        for part, seconds in zip(runs, (decoding, report.seconds["cluster"], whole), strict=True):
            runs[part].append(seconds)
    medians = {part: float(np.median(seconds)) for part, seconds in runs.items()}
    return [{"part": part, "seconds": own, "share": own / medians["whole build"]} for part, own in medians.items()]


def measure_clustering(arguments: argparse.Namespace, model: nn.Module) -> list[Row]:
    """Seconds and mean distance of both clusterings, on all patches in memory."""
    source, words = ImageSource(arguments.data, model), arguments.words
    spec, iterations = PatchSpec.of(model), BuildConfig(words=words).iterations
    stream = FeatureStream(source, model, spec, arguments.space, workers=1, strict=False)
    parts = [made for _, made in stream.images("features", torch.clone) if not isinstance(made, Unreadable)]
    patches = torch.cat(parts)
    patches = patches[torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))]
    rows: list[Row] = []
    for metric in ("euclidean", "cosine"):
        spherical = metric == "cosine"
        sample = (F.normalize(patches, dim=-1) if spherical else patches).numpy()
        found: dict[str, list[tuple[float, float]]] = {"sklearn": [], "faiss": []}
        for seed in range(RUNS):
            ours = partial(kmeans, sample, words, iterations=iterations, spherical=spherical, seed=seed)
            seconds, centres = timed(ours)
            found["faiss"].append((seconds, mean_distance(sample, centres, spherical)))
            seconds, peer = timed(partial(MiniBatchKMeans(words, random_state=seed).fit, sample))
            centres = peer.cluster_centers_.astype(np.float32)
            found["sklearn"].append((seconds, mean_distance(sample, centres, spherical)))
        medians = {backend: np.median(runs, axis=0) for backend, runs in found.items()}
        for backend, (seconds, distance) in medians.items():
            time_ratio, distance_ratio = medians[backend] / medians["sklearn"]
            row = {"metric": metric, "backend": backend, "seconds": float(seconds), "distance": float(distance)}
            rows.append(row | {"time_ratio": float(time_ratio), "distance_change": float(distance_ratio) - 1})
    return rows


def measure_engines(arguments: argparse.Namespace, model: nn.Module) -> list[Row]:
    """Images a second of each of `ENGINES`, and the seconds that a build of no images would take."""
    config = BuildConfig(words=arguments.words, space=arguments.space)
    found: dict[Engine, list[tuple[float, float]]] = {engine: [] for engine in ENGINES}
    with tempfile.TemporaryDirectory() as scratch:
        folders = [link_copies(arguments.data, Path(scratch, str(copies)), copies) for copies in (1, 3)]
        for _ in range(RUNS):
            for engine, runs in found.items():
                build = partial(run_build, model=model, config=config, workers=0, progress=False, engine=engine)
                (few, (_, report)), (many, _) = [timed(partial(build, folder)) for folder in folders]
                rate = 4 * report.images / (many - few)
                runs.append((rate, few - 2 * report.images / rate))
    medians = {engine: np.median(runs, axis=0) for engine, runs in found.items()}
    return [
        {"engine": engine.kind, "workers": engine.workers, "images_per_second": float(rate), "start": float(start)}
        for engine, (rate, start) in medians.items()
    ]


def measure_many(words: int, iterations: int) -> list[Row]:
    """Seconds of each iteration, the mean distance of some patches after it, and peak memory so far."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        sample = make_patches(Path(scratch, "sample.raw"), words)
        some = sample[:: max(1, len(sample) // 1000)].astype(np.float32)
        sizes, begun = subset_sizes(len(sample), words, iterations), time.perf_counter()

        def after(done: int, centres: np.ndarray) -> None:
            nonlocal begun
            seconds = time.perf_counter() - begun
            row = {"iteration": done, "patches": sizes[done - 1], "seconds": seconds}
            rows.append(row | {"distance": mean_distance(some, centres, True), "gigabytes": peak_gigabytes()})
            begun = time.perf_counter()

        kmeans(sample, words, iterations=iterations, spherical=True, seed=0, after=after)
    return rows


def make_patches(path: Path, words: int) -> np.ndarray:
    """Unit rows around as many directions as there are words, in a file that is mapped into memory."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((words, WIDTH), np.float32)
    sample = make_matrix(path, (PATCHES_PER_WORD * words, WIDTH), sample_dtype(words))
    for start in range(0, len(sample), words):
        rows = directions[rng.integers(words, size=words)] + 0.7 * rng.standard_normal((words, WIDTH), np.float32)
        sample[start : start + words] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    sample.flush()
    del sample  # its pages count to this process
    return open_matrix(path, (PATCHES_PER_WORD * words, WIDTH), sample_dtype(words))


def link_copies(data: str, folder: Path, copies: int) -> str:
    """Make a folder that holds the data set so many times over."""
    folder.mkdir()
    for copy in range(copies):
        (folder / str(copy)).symlink_to(Path(data).resolve())
    return str(folder)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and its answer."""
    begin = time.perf_counter()
    answer = call()
    return time.perf_counter() - begin, answer


def mean_distance(sample: np.ndarray, centres: np.ndarray, spherical: bool) -> float:
    """Mean distance of patches to their nearest centre: cosine, or squared Euclidean as faiss and the inertia count."""
    if spherical:
        similarity, _ = nearest_words(torch.from_numpy(sample), F.normalize(torch.from_numpy(centres), dim=-1))
        return float(1 - similarity.double().mean())
    index = faiss.IndexFlatL2(centres.shape[1])
    index.add(centres)
    return float(index.search(sample, 1)[0].mean(dtype=np.float64))


def measure_memory(arguments: argparse.Namespace, copies: int) -> Row:
    """Peak resident memory of a build in a process of its own, in gigabytes."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, arguments.data, "--model", arguments.model, "--space", arguments.space]
        command += ["--words", str(arguments.words), *(["--random-weights"] if arguments.random_weights else [])]
        command += ["--checkpoint", arguments.checkpoint] if arguments.checkpoint else []
        command += ["--peak-of", str(copies), f"{scratch}/peak.zarr"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def print_peak(arguments: argparse.Namespace, model: nn.Module) -> None:
    """Build from a folder that holds the data set so many times over; prints JSON."""
    copies, out = int(arguments.peak_of[0]), Path(arguments.peak_of[1])
    folder = link_copies(arguments.data, out.parent / "images", copies)
    before, config = peak_gigabytes(), BuildConfig(words=arguments.words, space=arguments.space)
    _, report = run_build(folder, model, config, out=out, progress=False)
    print(json.dumps({"images": report.images, "gigabytes": peak_gigabytes(), "before": before}))


def peak_gigabytes() -> float:
    """Peak resident memory of this process; getrusage counts what the parent had before it started this one."""
    status = Path("/proc/self/status")
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if status.exists():
        kilobytes = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * kilobytes / 1e9


main = partial(run_script, "building", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
