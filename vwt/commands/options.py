"""Options that several commands have, and what they open."""

import argparse
import ast
from typing import Any

import timm
import torch
from torch import nn

from vwt.errors import ArgumentError, ModelError, first_line
from vwt.export.runtimes import RUNTIMES, check_runtime
from vwt.models.create import create_model
from vwt.models.support import find_support
from vwt.progress import say


def add_named_model(parser: argparse.ArgumentParser, about: str = "timm model") -> None:
    """What says which model, and how it is created."""
    parser.add_argument("--model", required=True, help=about)
    parser.add_argument("--checkpoint", help="file of weights; by default the pretrained ones from the hub")
    parser.add_argument(
        "--model-kwargs",
        nargs="+",
        action="extend",
        default=[],
        type=_read_kwarg,
        metavar="NAME=VALUE",
        help="for timm.create_model, such as img_size=320",
    )


def _read_kwarg(text: str) -> tuple[str, Any]:
    """`img_size=320` as a name and a Python literal, or a string where the value is none."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return name, value


def create_named_model(arguments: argparse.Namespace, *, weights: bool = True) -> nn.Module:
    """The model that is asked for; one that is not supported is refused before its weights are fetched."""
    options = dict(arguments.model_kwargs)
    if timm.is_model(arguments.model.split(".")[0]):
        support = find_support(arguments.model, **options)
        if support.reason is not None:
            raise ModelError(str(support))
    say(f"opening {arguments.model}", not arguments.quiet)
    return create_model(arguments.model, arguments.checkpoint, weights=weights, **options)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that run a model."""
    add_named_model(parser)
    parser.add_argument("--device", default="cpu", help="where the model runs")
    parser.add_argument("--threads", type=int, help="of the CPU; by default as many as torch takes")
    precisions = ("float32", "bfloat16", "float16")
    parser.add_argument("--precision", choices=precisions, default="float32", help="of the weights")
    parser.add_argument("--quiet", action="store_true", help="results only: no progress, no advice")


def add_draw(parser: argparse.ArgumentParser, count: int) -> None:
    """Options of the commands that draw images, by default so many."""
    parser.add_argument("--count", type=int, default=count, help="images to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")


def add_runtime(parser: argparse.ArgumentParser, default: str | None = "torch") -> None:
    """The option of the commands that measure in a runtime."""
    known = "by default that of the profile" if default is None else "in which latency is measured"
    parser.add_argument("--runtime", choices=RUNTIMES, default=default, help=known)


def _set_threads(arguments: argparse.Namespace) -> None:
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ArgumentError(f"--threads is {arguments.threads}; expected at least 1")
        torch.set_num_threads(arguments.threads)


def open_model(arguments: argparse.Namespace) -> nn.Module:
    """The model that is asked for, where and as it will be used."""
    _set_threads(arguments)
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"no device {arguments.device!r}: {first_line(error)}") from error
    if getattr(arguments, "runtime", None):
        check_runtime(arguments.runtime, arguments.precision, torch.device(arguments.device))
    model = create_named_model(arguments)
    return model.to(device=arguments.device, dtype=getattr(torch, arguments.precision))


def finish(arguments: argparse.Namespace, path: str, advice: str) -> int:
    """Print where the result is as the last line of stdout, then on stderr what to do next; returns the exit status."""
    print(path)
    say(f"next: {advice}", not arguments.quiet)
    return 0
