"""Where the time and memory of a codebook build go, and how its clustering compares with scikit-learn's.

    python benchmarks/building.py ../shared/data/words --model MODEL [--checkpoint FILE] [--space pixel] [--memory]

Three tables:

1. Parts of a build: the whole build, and what decoding and clustering alone take; what is left is hidden or small.
2. Clustering of all patches in memory: faiss as `vwt build` uses it against `MiniBatchKMeans.fit` with its defaults,
   on the same patches in turn, by Euclidean and by cosine distance.
3. With --memory: peak resident memory of the build on the data set, and on the data set read ten times over.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans
from torch import nn

from vwt.cli import Parser
from vwt.codebook.building import BuildConfig, run_build
from vwt.codebook.clustering import kmeans
from vwt.codebook.features import FeatureStream
from vwt.codebook.matching import nearest_words
from vwt.datasets import ImageSource
from vwt.errors import VWTError
from vwt.measure.environment import hardware
from vwt.models.create import create_model
from vwt.models.spec import PatchSpec
from vwt.tokens.patches import Space

RUNS = 3


def main() -> int:
    """Print the tables; returns the exit status."""
    parser = Parser(prog="building", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of images")
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkpoint")
    parser.add_argument("--words", type=int, default=1000)
    parser.add_argument("--space", choices=("embedding", "pixel"), default="embedding")
    parser.add_argument("--memory", action="store_true", help="measure peak memory at 1 and 10 times the images")
    parser.add_argument("--results-file", type=Path, help="JSON")
    parser.add_argument("--peak-of", nargs=2, metavar=("COPIES", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        model = create_model(arguments.model, arguments.checkpoint)
        if arguments.peak_of:
            return print_peak(arguments, model)
        results = {
            "hardware": f"{hardware(torch.device('cpu'), 'float32')}, faiss {faiss.__version__}",
            "parts": measure_parts(arguments, model),
            "clustering": measure_clustering(arguments, model),
        }
        if arguments.memory:
            results["memory"] = [measure_memory(arguments, copies) for copies in (1, 10)]
        if arguments.results_file:
            arguments.results_file.write_text(json.dumps(results, indent=2) + "\n")
    except VWTError as error:
        print(f"building: {error}", file=sys.stderr)
        return 2
    return 0


def measure_parts(arguments: argparse.Namespace, model: nn.Module) -> dict[str, float]:
    """Seconds of decoding alone (two passes), clustering, and the whole build; medians, in turn."""
    source = ImageSource(arguments.data, model)
    workers = max(1, (os.cpu_count() or 1) // 2)
    config = BuildConfig(words=arguments.words, space=arguments.space)
    runs: dict[str, list[float]] = {"decode": [], "cluster": [], "build": []}
    for _ in range(RUNS):
        begin = time.perf_counter()
        for _ in range(2):
            for _ in source.batches(4, workers=workers):
                pass
        runs["decode"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        _, report = run_build(arguments.data, model, config, workers=workers, progress=False)
        runs["build"].append(time.perf_counter() - begin)
        runs["cluster"].append(report.seconds["cluster"])
    parts = {name: statistics.median(seconds) for name, seconds in runs.items()}
    parts["share"] = (parts["decode"] + parts["cluster"]) / parts["build"]
    print(f"Build of {arguments.words} words in {arguments.space} space, {len(source)} images; median of {RUNS} runs")
    print(f"  decoding alone, two passes  {parts['decode']:6.2f} s")
    print(f"  clustering alone            {parts['cluster']:6.2f} s")
    print(
        f"  whole build                 {parts['build']:6.2f} s; the two above are {100 * parts['share']:.0f} % of it"
    )
    return parts


def measure_clustering(arguments: argparse.Namespace, model: nn.Module) -> list[dict[str, Any]]:
    """Seconds and mean distance of both clusterings, on all patches in memory."""
    patches = all_patches(arguments.data, model, arguments.space)
    default = BuildConfig(words=arguments.words)
    print(f"Clustering of {len(patches)} patches to {arguments.words} words; median of {RUNS} runs, in turn")
    rows = []
    for metric in ("euclidean", "cosine"):
        spherical = metric == "cosine"
        sample = F.normalize(torch.from_numpy(patches), dim=-1).numpy() if spherical else patches
        seconds: dict[str, list[float]] = {"faiss": [], "sklearn": []}
        distances: dict[str, list[float]] = {"faiss": [], "sklearn": []}
        for seed in range(RUNS):
            begin = time.perf_counter()
            centres = kmeans(sample, arguments.words, iterations=default.iterations, spherical=spherical, seed=seed)
            seconds["faiss"].append(time.perf_counter() - begin)
            distances["faiss"].append(mean_distance(sample, centres, spherical))
            begin = time.perf_counter()
            peer = MiniBatchKMeans(arguments.words, random_state=seed).fit(sample)
            seconds["sklearn"].append(time.perf_counter() - begin)
            distances["sklearn"].append(mean_distance(sample, peer.cluster_centers_.astype(np.float32), spherical))
        for name in ("sklearn", "faiss"):
            row: dict[str, Any] = {
                "metric": metric,
                "backend": name,
                "seconds": statistics.median(seconds[name]),
                "distance": statistics.median(distances[name]),
            }
            row["time ratio"] = row["seconds"] / statistics.median(seconds["sklearn"])
            row["distance change"] = row["distance"] / statistics.median(distances["sklearn"]) - 1
            print(
                f"  {metric:10} {name:8} {row['seconds']:6.2f} s ({row['time ratio']:.2f})   mean distance "
                f"{row['distance']:8.4f} ({100 * row['distance change']:+.2f} %)"
            )
            rows.append(row)
    return rows


def all_patches(data: str, model: nn.Module, space: Space) -> np.ndarray:
    """Features (n, D) of all patches of a data set."""
    stream = FeatureStream(
        ImageSource(data, model), model, PatchSpec.of(model), space, workers=1, strict=False, progress=False
    )
    return torch.cat([features.flatten(0, 1) for _, features in stream.batches("", 0)]).numpy()


def mean_distance(sample: np.ndarray, centres: np.ndarray, spherical: bool) -> float:
    """Mean distance of patches to their nearest centre: cosine, or squared Euclidean as faiss and the inertia count."""
    if spherical:
        similarity, _ = nearest_words(torch.from_numpy(sample), F.normalize(torch.from_numpy(centres), dim=-1))
        return float(1 - similarity.double().mean())
    index = faiss.IndexFlatL2(centres.shape[1])
    index.add(centres)
    return float(index.search(sample, 1)[0].mean(dtype=np.float64))


def measure_memory(arguments: argparse.Namespace, copies: int) -> dict[str, float]:
    """Peak resident memory of a build in a process of its own, in gigabytes."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", str(copies), f"{scratch}/peak.zarr"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    row = json.loads(output.splitlines()[-1])
    print(
        f"Peak memory with {row['images']} images: {row['gigabytes']:.2f} GB "
        f"(imports and model before the build: {row['before']:.2f} GB)"
    )
    return row


def print_peak(arguments: argparse.Namespace, model: nn.Module) -> int:
    """Build from a folder that holds the data set so many times over; prints JSON."""
    copies, out = int(arguments.peak_of[0]), Path(arguments.peak_of[1])
    folder = out.parent / "images"
    folder.mkdir()
    for copy in range(copies):
        (folder / str(copy)).symlink_to(Path(arguments.data).resolve())
    before = peak_kilobytes()
    _, report = run_build(
        str(folder), model, BuildConfig(words=arguments.words, space=arguments.space), out=out, progress=False
    )
    peak = peak_kilobytes()
    kilobytes = {"gigabytes": peak, "before": before}
    print(json.dumps({"images": report.images, **{name: 1024 * kb / 1e9 for name, kb in kilobytes.items()}}))
    return 0


def peak_kilobytes() -> int:
    """Peak resident memory of this process; getrusage counts what the parent had before it started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.exit(main())
