"""The command `vwt`: a thin layer over the library. Errors are one line on stderr and exit status 2.

What commands need is imported when one is called, so that help is there at once.
"""

import argparse
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from vwt.errors import VWTError

# By name, what a command does in short, and in full.
COMMANDS = {
    "build": (
        "cluster the patches of a data set into a codebook",
        "Cluster the patches of a data set into a codebook of visual words.",
    ),
    "profile": (
        "measure what tokens cost on this device",
        "Measure the latency of a model's parts over token counts, on this device.",
    ),
    "schedule": (
        "choose which blocks prune or merge how many tokens",
        "Choose which blocks prune or merge how many tokens: within a budget, or by the paper's utility.",
    ),
    "tune": (
        "find the best plan for a model on this device",
        "Find what changes a model's answers least within a budget, or the fastest that keeps enough.",
    ),
    "report": (
        "write what is known of a plan as one HTML file",
        "Write one HTML file on a plan: its front, where the time goes, images with their answers, and what made it.",
    ),
    "export": (
        "write a model as planned for onnxruntime, OpenVINO or AOTInductor",
        "Write a model as planned as ONNX, OpenVINO IR or AOTInductor package, and check it on real images.",
    ),
    "show": (
        "draw what is done to an image",
        "Draw an image, its words, what each reduction leaves of it, and the codebook's frequent words.",
    ),
    "env": ("print devices, energy sensors, threads and versions", None),
    "models": ("list the families of models, or say whether a model is supported", None),
}


class Parser(argparse.ArgumentParser):
    """argparse, except that a wrong call is one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Command(Parser):
    """A command, which gets its options when it is called."""

    name = ""

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:
        """See argparse."""
        from vwt.commands import OPTIONS  # torch, timm and faiss take seconds

        OPTIONS[self.name](self)
        return super().parse_known_args(*arguments, **options)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.default is False or action.default == []
        return action.help if none else super()._get_help_string(action)


class _ScriptFormatter(_Formatter, argparse.RawDescriptionHelpFormatter):
    """The same; the description keeps its lines."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    given = sys.argv[1:] if argv is None else argv
    arguments = argparse.Namespace(if_interrupted="", command_line=shlex.join(["vwt", *given]))

    def run() -> int:
        _parser().parse_args(given, arguments)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *where: print(f"vwt: {message}", file=sys.stderr)
            return int(arguments.run(arguments))

    return _status("vwt", run, lambda: arguments.if_interrupted)


def run_script(
    name: str,
    description: str | None,
    add_options: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None = None,
    if_interrupted: str = "nothing was written",
) -> int:
    """Parse the options of a script or benchmark and run it; what goes wrong is one line. Returns its exit status."""
    parser = Parser(prog=name, description=description, formatter_class=_ScriptFormatter)
    add_options(parser)
    arguments = parser.parse_args(argv)
    return _status(name, lambda: run(arguments), lambda: f"; {if_interrupted}")


def _status(name: str, run: Callable[[], int | None], if_interrupted: Callable[[], str]) -> int:
    """The exit status of what is run; its errors, and interrupts, are one line."""
    try:
        return run() or 0
    except (Exception, KeyboardInterrupt) as error:
        if _is_interrupt(error):
            print(f"\n{name}: interrupted{if_interrupted()}", file=sys.stderr)
            return 130
        if not isinstance(error, VWTError):
            raise
        print(f"{name}: {error}", file=sys.stderr)
        return 2


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether an error is an interrupt, or came of one: what is left half done fails in ways of its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vwt", description="Visual words for Vision Transformers.")
    commands = parser.add_subparsers(title="commands", required=True, parser_class=_Command)
    for name, (short, full) in COMMANDS.items():
        command = commands.add_parser(name, help=short, description=full, formatter_class=_Formatter)
        command.name = name
    return parser


if __name__ == "__main__":
    sys.exit(main())
