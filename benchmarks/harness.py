"""What the benchmarks share: options, how a run begins and ends, model, images, codebooks, interleaved timing."""

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from results import Row, results_paths
from torch import Tensor, nn

from vwt.codebook.building import run_build
from vwt.codebook.codebook import Codebook
from vwt.codebook.config import BuildConfig
from vwt.datasets import ImageSource
from vwt.errors import ArgumentError, DataError, ModelError, first_line
from vwt.measure.environment import hardware
from vwt.measure.timing import Calls, Seconds, interleave
from vwt.models.create import create_model
from vwt.models.spec import PatchSpec
from vwt.pictures.figures import check_picture
from vwt.tokens.patches import SPACES, Space, normalise

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "amp_bfloat16": torch.float32,  # and autocast
}
WORDS: list[tuple[Space, int]] = [("embedding", 1000)]

# -- options -----------------------------------------------------------------------------------------------------------


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options on model, images, variants and results that all benchmarks have; timm's names where timm has them."""
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
    parser.add_argument("--torchcompile", action="store_true", help="compile everything that is timed")
    parser.add_argument("--codebook", action="append", metavar="ZARR", help="can be repeated; by default, see --words")
    parser.add_argument(
        "--words", nargs="+", type=space_and_words, metavar="[SPACE:]K", help="codebooks to build: pixel:10000"
    )
    parser.add_argument("--words-data", default="../shared/data/words", help="images to build codebooks from")
    parser.add_argument("--threshold", nargs="+", type=float, default=[0.1, 0.2], help="cosine distances of InterImage")
    parser.add_argument("--topk", nargs="+", type=positive, default=[84, 112], help="patches that top-k keeps")
    parser.add_argument("--schedule", action="append", type=Path, metavar="JSON", help="of vwt schedule; repeatable")
    parser.add_argument("--plan", action="append", type=Path, metavar="JSON", help="of vwt tune; repeatable")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="variants with one of these in name, or as group")
    parser.add_argument("--cache", type=Path, default=Path("results"), help="folder that keeps codebooks and scores")
    parser.add_argument("--runs", type=positive, default=10, metavar="N", help="how often each is measured")
    parser.add_argument("--seed", type=int, default=0, help="of sampled images, subsets, codebooks and order")
    parser.add_argument("--results-file", type=Path, metavar="NAME", help="writes NAME.json and NAME.csv")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the table")
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


@dataclass
class Bench:
    """A model, placed where it is measured, and how.

    Attributes:
        arguments: the options.
        device: where it runs.
        model: the full one.
        codebooks: of InterImage.
        paths: of the results.
    """

    arguments: argparse.Namespace
    device: torch.device
    model: nn.Module
    codebooks: list[Codebook] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)

    @classmethod
    def open(cls, arguments: argparse.Namespace, words: Sequence[tuple[Space, int]] = WORDS) -> "Bench":
        """What the options ask for, with codebooks of `words` (space and K) unless they name others.

        Raises:
            VWTError: if it cannot be had, or results or a plot cannot be written.
        """
        check_picture(arguments.plot)
        paths, device = results_paths(arguments.results_file), open_device(arguments)
        try:
            arguments.cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(
                f"cannot write to {arguments.cache}: {error.strerror}; choose another --cache"
            ) from error
        model = load_model(arguments)
        codebooks = load_codebooks(arguments, model, words)
        return cls(arguments, device, place(model, device, arguments.precision), codebooks, paths)

    @property
    def header(self) -> Row:
        """What is written above all tables."""
        return {"hardware": hardware(self.device, self.arguments.precision), "arguments": vars(self.arguments)}

    @cached_property
    def images(self) -> Tensor:
        """Images (n, C, H, W) uint8, drawn at random with the seed; those that cannot be read are left out.

        Raises:
            DataError: if there are fewer than --images.
        """
        options = self.arguments
        source = ImageSource(options.data, self.model, split=options.split)
        images = source.sample(options.images, seed=options.seed, progress=not options.quiet)
        if len(images) < options.images:
            raise DataError(
                f"{options.data} has {len(images)} images that can be read, {options.images} were asked for with "
                "--images"
            )
        return images

    def batches(self, size: int | None = None) -> list[Tensor]:
        """The images as full batches for the model; a last one that is not full is left out.

        Raises:
            ArgumentError: if they do not fill one.
        """
        size = size or self.arguments.batch_size
        if self.arguments.images < size:
            raise ArgumentError(f"--images {self.arguments.images} do not fill a batch of --batch-size {size}")
        return [self.prepare(batch) for batch in self.images.split(size) if len(batch) == size]

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) uint8, normalised in the model's dtype."""
        spec = PatchSpec.of(self.model)
        return normalise(images.to(self.device), spec.mean, spec.std).to(next(self.model.parameters()).dtype)

    def autocast(self) -> AbstractContextManager[Any]:
        """What the measured calls run within."""
        low = self.arguments.precision.startswith("amp_")
        return torch.autocast(self.device.type, torch.bfloat16) if low else nullcontext()

    def compiled(self, module: Callable[..., Any]) -> Callable[..., Any]:
        """A module as it is timed."""
        return torch.compile(module) if self.arguments.torchcompile else module

    def time(self, groups: Sequence[Calls], items: int) -> list[Seconds]:
        """See `interleave`; what is compiled is warmed up on all items."""
        options = self.arguments
        warmup = {"warmup": items} if options.torchcompile else {}
        with self.autocast():
            return interleave(
                groups, items, options.runs, device=self.device, seed=options.seed, progress=not options.quiet, **warmup
            )


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
