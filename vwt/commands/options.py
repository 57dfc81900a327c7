"""Options that several commands have, and what they open."""

import argparse

import timm
import torch
from torch import nn

from vwt.errors import ArgumentError, ModelError, first_line
from vwt.models.create import create_model
from vwt.models.support import find_support
from vwt.progress import say


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that run a model."""
    parser.add_argument("--model", required=True, help="timm model")
    parser.add_argument("--checkpoint", help="file of weights; by default the pretrained ones from the hub")
    parser.add_argument("--device", default="cpu", help="where the model runs")
    parser.add_argument("--threads", type=int, help="of the CPU; by default as many as torch takes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    parser.add_argument("--quiet", action="store_true", help="results only: no progress, no advice")


def add_draw(parser: argparse.ArgumentParser, count: int) -> None:
    """Options of the commands that draw images, by default so many."""
    parser.add_argument("--count", type=int, default=count, help="images to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")


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
    if timm.is_model(arguments.model.split(".")[0]):  # before weights are fetched
        support = find_support(arguments.model)
        if support.reason is not None:
            raise ModelError(str(support))
    say(f"opening {arguments.model}", not arguments.quiet)
    model = create_model(arguments.model, arguments.checkpoint)
    return model.to(device=arguments.device, dtype=getattr(torch, arguments.dtype))


def finish(arguments: argparse.Namespace, path: str, advice: str) -> int:
    """Print where the result is as the last line of stdout, then on stderr what to do next; returns the exit status."""
    print(path)
    say(f"next: {advice}", not arguments.quiet)
    return 0
