"""Mixed calls for an hour, as in a service: every answer is checked, and memory, page faults and latency are watched.

    make soak [MINUTES=60] [SOAK="--callers 8 --threads 1"]
    python benchmarks/soak.py --minutes 60 [--checkpoint FILE] [--results-file NAME]

Several threads call several wrappers of one model at once, each with a batch of 1 to 32 images of one of several sizes,
while another thread builds the same codebook again and again. Each row of each answer is compared with what the same
wrapper gave for that image alone before the run, and each codebook with the first. Latency depends on the wrapper, the
size and the number of images; a percentile is taken of the ratio of each call to the median of its like.
"""

import argparse
import ctypes
import os
import random
import resource
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from harness import positive
from PIL import Image
from results import Row, print_table, results_paths, save_results
from torch import Tensor, nn

from vwt import Absorb, Codebook, InterImage, Merge, Neighbours, Prune, PruningSchedule, VWTokenizer, build_codebook
from vwt.cli import run_script
from vwt.datasets import ImageSource
from vwt.errors import ArgumentError, VWTError
from vwt.measure.environment import hardware
from vwt.models.backbone import Backbone
from vwt.models.create import create_model
from vwt.models.spec import prepare
from vwt.progress import progress_bar

IMAGES, WORDS = 32, 100
SIZES = (224, 160, 288)  # pixels
BATCHES = (1, 2, 4, 8, 16, 32)
TOLERANCE = 1e-3  # of logits: a batch of other images is multiplied in another order
EVERY = 5.0  # seconds between samples of memory
SETTLED = 5.0  # minutes after which memory must not grow, or a half of a run that is shorter than twice that
GROWTH = 0.02  # of resident memory that is none
COLUMNS = {"name": "", "calls": "d", "images": "d", "wrong": "d", "p50": ".3f", "p99": ".3f", "slowest": ".2f"}


@dataclass
class Counts:
    """What threads report, under one lock.

    Attributes:
        seconds: of each call, by wrapper, pixels and images.
        wrong: lines on answers that differ.
        memory: (minutes, bytes) that were resident.
        faults: (minor, major) page faults at each of these times.
        builds: codebooks that were built beside.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    seconds: dict[tuple[str, int, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    wrong: list[tuple[str, str]] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    faults: list[tuple[int, int]] = field(default_factory=list)
    builds: int = 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="timm model that takes dynamic_img_size")
    parser.add_argument("--checkpoint", help="file of weights; by default they are random")
    parser.add_argument("--data", default="../shared/data/eval", help="folder of images")
    parser.add_argument("--callers", type=positive, default=8, metavar="N", help="threads that call")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="of torch, in each of them")
    parser.add_argument("--seed", type=int, default=0, help="of images and calls")
    parser.add_argument("--results-file", type=Path, metavar="NAME", help="writes NAME.json and NAME.csv")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> None:
    """What the options ask for.

    Raises:
        VWTError: for wrong answers, or memory that grows.
    """
    if not arguments.minutes > 0:
        raise ArgumentError(f"--minutes is {arguments.minutes}; expected a positive number")
    paths = results_paths(arguments.results_file)
    torch.set_num_threads(arguments.threads)
    model = create(arguments)
    images = read(arguments, model)
    pixels = {size: resize(images, model, size) for size in SIZES}
    with tempfile.TemporaryDirectory() as folder:
        source = write_pictures(Path(folder), images)
        codebook = build(source, model)
        wrappers = wrap(model, codebook)
        table = {
            (name, size): torch.cat([wrapper(one[None]) for one in pixels[size]])
            for name, wrapper in wrappers.items()
            for size in SIZES
        }
        counts = Counts()
        soak(arguments, counts, wrappers, pixels, table, partial(check_build, source, model, codebook, counts))
    report(arguments, counts, paths)


def create(arguments: argparse.Namespace) -> nn.Module:
    """The model, for images of any size."""
    torch.manual_seed(arguments.seed)
    weights = create_model(arguments.model, arguments.checkpoint, weights=False).state_dict()
    model = timm.create_model(arguments.model, dynamic_img_size=True).eval()
    model.load_state_dict(weights)
    return model


def read(arguments: argparse.Namespace, model: nn.Module) -> Tensor:
    """The first images (n, C, H, W) uint8."""
    return next(iter(ImageSource(arguments.data, model).batches(IMAGES))).images


def resize(images: Tensor, model: nn.Module, size: int) -> Tensor:
    """Images (n, C, H, W) uint8 to (n, C, size, size), normalised for the model."""
    pixels = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
    return prepare(pixels.round().byte(), model)


def wrap(model: nn.Module, codebook: Codebook) -> dict[str, VWTokenizer]:
    """Wrappers of one model, by name: dense and ragged, before the blocks and inside them."""
    depth = Backbone(model).depth
    early, late = depth // 4, depth // 2
    return {
        "full": VWTokenizer(model),
        "Neighbours(0.25)": VWTokenizer(model, Neighbours(0.25)),
        "Neighbours, ragged": VWTokenizer(model, Neighbours(threshold=0.1)),
        "InterImage, ragged": VWTokenizer(model, InterImage(codebook, 0.2)),
        "Absorb": VWTokenizer(model, schedule=PruningSchedule({early: Absorb(0.3)})),
        "Prune, Merge": VWTokenizer(model, schedule=PruningSchedule({early: Prune(0.25), late: Merge(0.25)})),
        "InterImage, Absorb": VWTokenizer(model, InterImage(codebook, 0.2), PruningSchedule({late: Absorb(0.3)})),
    }


# -- a codebook, built beside ------------------------------------------------------------------------------------------


def write_pictures(folder: Path, images: Tensor) -> str:
    """A folder of a few of the images."""
    (folder / "a").mkdir()
    for number, image in enumerate(images[:8]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "a" / f"{number}.png")
    return str(folder)


def build(source: str, model: nn.Module) -> Codebook:
    """A small codebook."""
    return build_codebook(source, model, words=WORDS, iterations=3, workers=0, progress=False)


def check_build(source: str, model: nn.Module, expected: Codebook, counts: Counts) -> None:
    """Build it once more."""
    same = torch.equal(build(source, model).words, expected.words)
    with counts.lock:
        counts.builds += 1
        if not same:
            counts.wrong.append(("build", f"the words of build {counts.builds} differ"))


# -- the run -----------------------------------------------------------------------------------------------------------


def soak(
    arguments: argparse.Namespace,
    counts: Counts,
    wrappers: dict[str, VWTokenizer],
    pixels: dict[int, Tensor],
    table: dict[tuple[str, int], Tensor],
    build_once: "partial[None]",
) -> None:
    """Call until the time is over; what a thread raises ends all of them, and is raised."""
    end = time.monotonic() + 60 * arguments.minutes
    failures: list[BaseException] = []

    def loop(once: "partial[None]") -> None:
        try:
            while time.monotonic() < end and not failures:
                once()
        except BaseException as error:
            failures.append(error)

    callers = [
        partial(call, random.Random(f"{arguments.seed} {index}"), counts, wrappers, pixels, table)
        for index in range(arguments.callers)
    ]
    threads = [threading.Thread(target=loop, args=(once,), daemon=True) for once in (*callers, build_once)]
    for thread in threads:
        thread.start()
    try:
        samples, show = minutes_until(end, failures), not arguments.quiet
        for minutes in progress_bar(samples, desc="calling", unit="sample", show=show):
            usage = resource.getrusage(resource.RUSAGE_SELF)
            counts.memory.append((minutes, resident()))
            counts.faults.append((usage.ru_minflt, usage.ru_majflt))
    except BaseException as error:
        failures.append(error)
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def minutes_until(end: float, failures: list[BaseException]) -> Iterator[float]:
    """Minutes since the begin, every few seconds."""
    begun = time.monotonic()
    while (now := time.monotonic()) < end and not failures:
        yield (now - begun) / 60
        time.sleep(max(0.0, min(EVERY, end - now)))


def resident() -> int:
    """Bytes of this process in memory, without those that are free and that glibc keeps for later calls.

    It keeps them for each thread, and more of them the more large calls ever met, so that they would hide what grows.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def call(
    chance: random.Random,
    counts: Counts,
    wrappers: dict[str, VWTokenizer],
    pixels: dict[int, Tensor],
    table: dict[tuple[str, int], Tensor],
) -> None:
    """One call of one wrapper, timed and checked."""
    name, size, count = chance.choice(list(wrappers)), chance.choice(list(pixels)), chance.choice(BATCHES)
    chosen = torch.tensor([chance.randrange(len(pixels[size])) for _ in range(count)])
    images = pixels[size][chosen]
    with torch.inference_mode() if chance.random() < 0.5 else torch.no_grad():
        begun = time.perf_counter()
        answer = wrappers[name](images)
        seconds = time.perf_counter() - begun
    error = float((answer - table[name, size][chosen]).abs().max())
    with counts.lock:
        counts.seconds[name, size, count].append(seconds)
        if not error <= TOLERANCE:
            counts.wrong.append((name, f"{name}, {size} px, {count} images: off by {error:.2g}"))


# -- the report --------------------------------------------------------------------------------------------------------


def report(arguments: argparse.Namespace, counts: Counts, paths: list[Path]) -> None:
    """Print and save the table, and refuse what must not be."""
    header = {"hardware": hardware(torch.device("cpu"), "float32"), "arguments": vars(arguments)}
    rows = make_rows(counts)
    memory = memory_row(counts, arguments.minutes)
    print(header["hardware"])
    print(f"{arguments.callers} callers, {arguments.minutes:g} minutes, {counts.builds} builds beside")
    print_table("Latency of calls, as a ratio to the median of calls alike", rows, COLUMNS)
    early, late, most = (memory[name] / 2**20 for name in ("early", "late", "most"))
    print(
        f"\nresident {early:.1f} MiB after minute {memory['minute']:.1f}, {late:.1f} MiB at the end "
        f"({100 * memory['growth']:+.1f} %), at most {most:.1f} MiB\n"
        f"page faults a second: {memory['minor']:.0f} minor, {memory['major']:.2f} major"
    )
    save_results(paths, header, {"calls": rows, "memory": [memory], "samples": samples(counts)})
    for _, line in counts.wrong[:20]:
        print(line)
    if counts.wrong:
        raise VWTError(f"{len(counts.wrong)} wrong answers; see above")
    if memory["growth"] > GROWTH:
        raise VWTError(f"resident memory grew by {100 * memory['growth']:.1f} % after minute {memory['minute']:.1f}")


def make_rows(counts: Counts) -> list[Row]:
    """A row for each wrapper, and one for all."""
    ratios: dict[str, list[np.ndarray]] = defaultdict(list)
    images: dict[str, int] = defaultdict(int)
    for (name, _, count), seconds in counts.seconds.items():
        for key in (name, "all"):
            ratios[key].append(np.array(seconds) / np.median(seconds))
            images[key] += count * len(seconds)
    rows = []
    for name in sorted(ratios, key=lambda name: (name == "all", name)):
        every = np.concatenate(ratios[name])
        wrong = sum(name in (own, "all") for own, _ in counts.wrong)
        p50, p99, slowest = (float(np.quantile(every, q)) for q in (0.5, 0.99, 1.0))
        row = {"name": name, "calls": len(every), "images": images[name], "wrong": wrong}
        rows.append(row | {"p50": p50, "p99": p99, "slowest": slowest})
    return rows


def memory_row(counts: Counts, minutes: float) -> Row:
    """Resident memory once settled and at the end, each the mean over a tenth of the run, and page faults a second."""
    settled = min(SETTLED, minutes / 2)
    times, sizes = (np.array(column) for column in zip(*counts.memory, strict=True))
    settled = min(settled, times[-1])
    early = sizes[(times >= settled) & (times <= settled + minutes / 10)].mean()
    late = sizes[times >= min(minutes * 0.9, times[-1])].mean()
    seconds = max(60 * float(times[-1] - times[0]), EVERY)
    minor, major = (np.subtract(counts.faults[-1], counts.faults[0]) / seconds).tolist()
    row: Row = {"minute": settled, "early": float(early), "late": float(late), "growth": float(late / early - 1)}
    return row | {"most": int(sizes.max()), "minor": minor, "major": major}


def samples(counts: Counts) -> list[Row]:
    """Memory and page faults over time."""
    return [
        {"minutes": minutes, "resident": size, "minor": minor, "major": major}
        for (minutes, size), (minor, major) in zip(counts.memory, counts.faults, strict=True)
    ]


main = partial(run_script, "soak", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
