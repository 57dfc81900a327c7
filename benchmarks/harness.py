"""What the benchmarks share: the hardware line, models, images and codebooks, interleaved timing, tables and plots."""

import argparse
import csv
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vwt.codebook.building import BuildConfig, run_build
from vwt.codebook.codebook import Codebook
from vwt.datasets import ImageSource
from vwt.errors import ArgumentError, DataError, ModelError, first_line
from vwt.measure.timing import Calls, Seconds, interleave
from vwt.models.create import create_model
from vwt.models.spec import PatchSpec
from vwt.reductions.reduction import patches_entering
from vwt.tokenizer import VWTokenizer
from vwt.tokens.patches import SPACES, Space, normalise
from vwt.tuning.schedule import PruningSchedule

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "amp_bfloat16": torch.float32,  # and autocast
}

Row = dict[str, Any]


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options on model, images, codebooks and results that all benchmarks have; timm's names where timm has them."""
    parser.add_argument("--model", required=True, help="name of a timm model")
    parser.add_argument("--checkpoint", help="file of weights; by default the pretrained ones from the hub")
    parser.add_argument("--random-weights", action="store_true", help="no weights; latency is the same")
    parser.add_argument("--img-size", type=positive, metavar="PX", help="by default the model's own")
    parser.add_argument("--data", default="../shared/data/eval", help="images to measure on")
    parser.add_argument("--split", default="validation", help="of them, where there are several")
    parser.add_argument("--images", type=positive, default=32, metavar="N", help="how many of them, drawn at random")
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=positive, metavar="N", help="by default as many as torch takes")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--codebook", action="append", metavar="ZARR", help="can be repeated; by default, see --words")
    parser.add_argument(
        "--words", nargs="+", type=space_and_words, metavar="[SPACE:]K", help="codebooks to build: pixel:10000"
    )
    parser.add_argument("--words-data", default="../shared/data/words", help="images to build codebooks from")
    parser.add_argument("--cache", type=Path, default=Path("results"), help="folder that keeps built codebooks")
    parser.add_argument("--runs", type=positive, default=10, metavar="N", help="runs on each batch")
    parser.add_argument("--seed", type=int, default=0, help="of sampled images, subsets, codebooks and order")
    parser.add_argument("--results-file", type=Path, metavar="NAME", help="writes NAME.json and NAME.csv")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def space_and_words(text: str) -> tuple[Space, int]:
    """`pixel:10000` or `1000` (embedding space), for argparse."""
    name, _, count = text.rpartition(":")
    for space in SPACES:
        if space == (name or "embedding"):
            return space, positive(count)
    raise argparse.ArgumentTypeError(f"{text!r} is neither K nor SPACE:K, with SPACE one of {', '.join(SPACES)}")


# -- what is measured --------------------------------------------------------------------------------------------------


def open_device(arguments: argparse.Namespace) -> torch.device:
    """The device of the options, with as many threads as they ask for.

    Raises:
        ArgumentError: if there is no such device.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        device = torch.device(arguments.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"no device {arguments.device!r}: {first_line(error)}") from error
    return device


def load_model(arguments: argparse.Namespace, size: int | None = None) -> nn.Module:
    """The model of the options on the CPU in float32, for images of `size` pixels, or of --img-size.

    Raises:
        ModelError: if there is none, or it cannot take that size.
    """
    if arguments.random_weights and arguments.checkpoint:
        raise ArgumentError("--random-weights and --checkpoint exclude each other; leave one out")
    torch.manual_seed(arguments.seed)
    model = create_model(arguments.model, arguments.checkpoint, weights=not arguments.random_weights)
    size = size or arguments.img_size
    if size is None:
        return model
    if not hasattr(model, "set_input_size"):
        raise ModelError(f"{arguments.model} takes one image size only; leave --img-size out")
    patch = max(PatchSpec.of(model).patch_size)
    if size % patch:
        raise ArgumentError(f"images of {size} pixels are no multiple of the patch, {patch}; choose another size")
    model.set_input_size(img_size=(size, size))  # type: ignore[operator]
    return model


def place(model: nn.Module, device: torch.device, precision: str) -> nn.Module:
    """The model on a device in a precision."""
    return model.to(device=device, dtype=PRECISIONS[precision]).eval()


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """What the measured calls run within."""
    return torch.autocast(device.type, torch.bfloat16) if precision.startswith("amp_") else nullcontext()


def sample_images(arguments: argparse.Namespace, model: nn.Module, count: int) -> Tensor:
    """Images (count, C, H, W) uint8, drawn at random with the seed; those that cannot be read are left out.

    Raises:
        DataError: if there are too few.
    """
    source = ImageSource(arguments.data, model, split=arguments.split)
    images = source.sample(count, seed=arguments.seed, progress=not arguments.quiet)
    if len(images) < count:
        raise DataError(
            f"{arguments.data} has {len(images)} images that can be read, {count} were asked for with --images"
        )
    return images


def load_codebooks(
    arguments: argparse.Namespace, model: nn.Module, default: Sequence[tuple[Space, int]]
) -> list[Codebook]:
    """The codebooks of --codebook and --words; without either, those of `default`. What is built is kept in --cache.

    Args:
        arguments: the options.
        model: on the CPU in float32.
        default: space and K.
    """
    codebooks = [Codebook.load(path) for path in arguments.codebook or []]
    wanted = arguments.words or ([] if codebooks else default)
    if not wanted:
        return codebooks
    source, spec = ImageSource(arguments.words_data, model), PatchSpec.of(model)
    for space, count in wanted:
        origin = f"patch{spec.patch_size[0]}x{spec.patch_size[1]}"
        if space == "embedding":
            origin = f"{spec.model}-{next(iter(spec.projection.values()))[:8]}"
        name = f"{space}-{count}-{origin}-{source.input_size[-1]}px-{source.fingerprint()[:8]}-{arguments.seed}.zarr"
        path = arguments.cache / name
        if not path.exists():
            begun = path.with_name(path.name + ".building").exists()
            config = BuildConfig(words=count, space=space, seed=arguments.seed)
            run_build(arguments.words_data, model, config, out=path, resume=begun, progress=not arguments.quiet)
        codebooks.append(Codebook.load(path))
    return codebooks


def weights_checksum(model: nn.Module) -> str:
    """sha256 of a model's state."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def mean_tokens(module: Any, full: int, images: Tensor) -> Tensor:
    """Tokens of images (B, C, H, W), prefix included, mean over the blocks that they enter: (B,) float64.

    Args:
        module: a VWTokenizer, a peer that says its `lengths`, or the full model.
        full: tokens of the full model.
        images: normalised for the model.
    """
    if isinstance(module, VWTokenizer):
        depth, prefix = module.backbone.depth, module.backbone.prefix
        counts = module.tokenize(images).counts.tolist()
        entering = [patches_entering(module.schedule, depth, count)[:-1] for count in counts]
        return prefix + torch.tensor(entering, dtype=torch.float64).mean(dim=1)
    own: list[int] = module.lengths(full) if hasattr(module, "lengths") else [full]
    return torch.full((len(images),), float(np.mean(own)), dtype=torch.float64)


def schedule_name(schedule: PruningSchedule) -> str:
    """As rows are named: `Prune(56) in block 3`."""
    return ", ".join(f"{what!r} in block {block}" for block, what in schedule.items())


# -- timing ------------------------------------------------------------------------------------------------------------


def spread(seconds: np.ndarray) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of all items and runs (items, runs), in milliseconds."""
    low, middle, high = np.quantile(1e3 * seconds, (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> float:
    """Median over items of the ratio of medians over runs, of seconds (items, runs)."""
    return float(np.median(np.median(numerator, axis=1) / np.median(denominator, axis=1)))


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """How values grow with at least two sizes: the slope of a line through their logarithms. 1 is linear."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


@dataclass
class Bench:
    """A model, placed where it is measured, and how.

    Attributes:
        arguments: the options.
        device: where it runs.
        model: on the CPU in float32, until `images` are asked for.
        codebooks: of the strategies.
    """

    arguments: argparse.Namespace
    device: torch.device
    model: nn.Module
    codebooks: list[Codebook] = field(default_factory=list)

    @cached_property
    def images(self) -> Tensor:
        """The sampled images (n, C, H, W) uint8; the model is placed as it is measured."""
        images = sample_images(self.arguments, self.model, self.arguments.images)
        place(self.model, self.device, self.arguments.precision)
        return images

    def batches(self, images: Tensor, size: int | None = None) -> list[Tensor]:
        """Images (n, C, H, W) uint8 as full batches for the model; a last one that is not full is left out."""
        size = size or self.arguments.batch_size
        return [self.prepare(batch) for batch in images.split(size) if len(batch) == size]

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) uint8, normalised in the model's dtype."""
        spec = PatchSpec.of(self.model)
        return normalise(images.to(self.device), spec.mean, spec.std).to(next(self.model.parameters()).dtype)

    def compiled(self, module: nn.Module) -> Callable[..., Any]:
        """The module as it is measured."""
        return torch.compile(module) if self.arguments.torchcompile else module

    def time(self, groups: Sequence[Calls], items: int) -> list[Seconds]:
        """See `interleave`; what is compiled is warmed up on all items."""
        options = self.arguments
        warmup = {"warmup": items} if options.torchcompile else {}
        with autocast(self.device, options.precision):
            return interleave(
                groups, items, options.runs, device=self.device, seed=options.seed, progress=not options.quiet, **warmup
            )


# -- results -----------------------------------------------------------------------------------------------------------


def results_paths(name: Path | None) -> list[Path]:
    """NAME.json and NAME.csv, in a folder that is made; empty without a name.

    Raises:
        ArgumentError: if the folder cannot be made or written to.
    """
    if name is None:
        return []
    stem = name.with_suffix("") if name.suffix in (".json", ".csv") else name
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            f"cannot write to {stem.parent}: {error.strerror}; choose another --results-file"
        ) from error
    if stem.is_dir() or not os.access(stem.parent, os.W_OK):
        raise ArgumentError(f"cannot write {stem}.json; choose another --results-file")
    return [stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".csv")]


def save_results(paths: Sequence[Path], header: Row, tables: dict[str, list[Row]]) -> None:
    """Write the header and all tables as JSON, and the rows of all tables as CSV."""
    if not paths:
        return
    paths[0].write_text(json.dumps({**header, "tables": tables}, indent=2, default=str) + "\n")
    rows = [{"table": name, **row} for name, table in tables.items() for row in table]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def print_table(title: str, rows: Sequence[Row], columns: dict[str, str]) -> None:
    """Print rows as a table in Markdown, with a format for each column; columns that no row has are left out."""
    columns = {name: form for name, form in columns.items() if any(row.get(name) is not None for row in rows)}
    cells = [
        [format(row[name], form) if row.get(name) is not None else "" for name, form in columns.items()] for row in rows
    ]
    widths = [max(len(text) for text in column) for column in zip(columns, *cells, strict=True)]
    left = [form == "" for form in columns.values()]

    def line(texts: Sequence[str]) -> str:
        padded = (t.ljust(w) if at else t.rjust(w) for t, w, at in zip(texts, widths, left, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if at else "-" * (w - 1) + ":" for w, at in zip(widths, left, strict=True)]
    print("\n".join([f"\n{title}", line(list(columns)), line(rule), *map(line, cells)]))
