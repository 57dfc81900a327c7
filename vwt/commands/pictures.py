"""`vwt report` and `vwt show`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from vwt.codebook.codebook import Codebook
from vwt.commands.options import add_draw, add_model, finish, open_model
from vwt.datasets import ImageSource, check_source, read_image
from vwt.errors import ArgumentError
from vwt.pictures.figures import check_picture
from vwt.pictures.report.front import Row, read_peers
from vwt.pictures.report.report import check_report, write_report
from vwt.pictures.show import save_stages
from vwt.progress import say
from vwt.strategies.inter_image import InterImage
from vwt.strategies.intra_image import IntraImage
from vwt.strategies.neighbours import Neighbours
from vwt.strategies.strategy import Strategy
from vwt.tokenizer import VWTokenizer
from vwt.tuning.plan import Plan
from vwt.tuning.schedule import PruningSchedule


def add_report(report: argparse.ArgumentParser) -> None:
    """The options of `vwt report`."""
    add_model(report)
    report.add_argument("--plan", required=True, help="of vwt tune")
    report.add_argument("--images", required=True, help="a folder of images to show, or hfds/…, torch/…")
    report.add_argument("--peers", metavar="FILE", help="of benchmarks/fidelity.py, to be drawn beside the plan")
    report.add_argument("--force", action="store_true", help="apply a plan of another model or device too")
    report.add_argument("--seed", type=int, default=0, help="of the draw of images")
    report.add_argument("--out", required=True, help="where to write the report: NAME.html")
    report.set_defaults(run=_report, if_interrupted="; nothing was written")


def _report(arguments: argparse.Namespace) -> int:
    check_report(arguments.out)
    check_source(arguments.images)
    plan = Plan.load(arguments.plan)
    others = [] if arguments.peers is None else read_peers(arguments.peers, plan)
    save_report(arguments.out, plan, open_model(arguments), arguments, others=others, force=arguments.force)
    return finish(arguments, arguments.out, f"open {arguments.out} in a browser")


def save_report(
    path: str,
    plan: Plan,
    model: nn.Module,
    arguments: argparse.Namespace,
    *,
    others: Sequence[Row] = (),
    force: bool = False,
) -> None:
    """Write a report, with other methods beside the plan, and say which images were left out."""
    skipped = write_report(
        path,
        plan,
        model,
        arguments.images,
        others=others,
        command=arguments.command_line,
        force=force,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    if skipped:
        print(f"vwt: left out {len(skipped)} images that cannot be read: {', '.join(skipped)}", file=sys.stderr)


def add_show(show: argparse.ArgumentParser) -> None:
    """The options of `vwt show`."""
    show.add_argument("image", help="file of an image")
    add_model(show)
    show.add_argument("--plan", help="of vwt tune, or hf-hub:USER/NAME")
    show.add_argument("--force", action="store_true", help="apply a plan of another model or device too")
    show.add_argument("--strategy", help="neighbours:SHARE, intra:SHARE or inter:CODEBOOK[:THRESHOLD]")
    show.add_argument("--schedule", help="of vwt schedule")
    show.add_argument("--images", help="where to look for patches like the words; by default in the image alone")
    add_draw(show, 64)
    show.add_argument("--out", required=True, help="the picture: NAME.png")
    show.set_defaults(run=_show, if_interrupted="; nothing was written")


def _show(arguments: argparse.Namespace) -> int:
    check_picture(arguments.out)
    if arguments.count < 1:
        raise ArgumentError(f"--count is {arguments.count}; expected at least 1")
    strategy = None if arguments.strategy is None else read_strategy(arguments.strategy)
    schedule = None if arguments.schedule is None else PruningSchedule.load(arguments.schedule)
    plan = None if arguments.plan is None else Plan.load(arguments.plan)
    if plan is not None and (strategy is not None or schedule is not None):
        raise ArgumentError("a plan has its strategy and schedule; leave out --strategy and --schedule, or --plan")
    if plan is None and strategy is None and not schedule:
        raise ArgumentError("nothing is reduced; give --plan, --strategy, or a --schedule that is not empty")
    model = open_model(arguments)
    image, images = read_image(arguments.image, model), None
    fast = VWTokenizer(model, strategy, schedule) if plan is None else plan.apply(model, force=arguments.force)
    codebook = getattr(fast.strategy, "codebook", None)
    if arguments.images is not None and codebook is not None:
        source = ImageSource(arguments.images, model)
        images = source.sample(arguments.count, seed=arguments.seed, progress=not arguments.quiet)
    say("drawing", not arguments.quiet)
    save_stages(
        arguments.out, image, fast, codebook, images, heading=f"{Path(arguments.image).name}, {arguments.model}"
    )
    return finish(arguments, arguments.out, f"open {arguments.out}")


def read_strategy(text: str) -> Strategy:
    """`neighbours:0.22`, `intra:0.5` or `inter:CODEBOOK[:THRESHOLD]` as a strategy.

    Raises:
        ArgumentError: for anything else, or an argument out of its range.
        CodebookError: if the codebook cannot be read.
    """
    kind, _, rest = text.partition(":")
    path, _, last = rest.rpartition(":")
    share, threshold = _number(rest), _number(last)
    if kind in ("neighbours", "intra") and share is not None:
        return Neighbours(share) if kind == "neighbours" else IntraImage(share)
    if kind == "inter" and rest:
        if path and threshold is not None:
            return InterImage(Codebook.load(path), threshold)
        return InterImage(Codebook.load(rest))
    raise ArgumentError(f"no strategy {text!r}; expected neighbours:SHARE, intra:SHARE or inter:CODEBOOK[:THRESHOLD]")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
