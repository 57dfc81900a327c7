"""What long work says on stderr: what it does, how far it is, and what it found.

Results are on stdout. Where stderr is no terminal, lines take the place of moving bars.
"""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

EVERY = 10.0  # seconds between the lines that take the place of a bar


def say(text: str, show: bool = True) -> None:
    """Print a line on stderr, after what was printed before."""
    if show:
        sys.stdout.flush()
        print(text, file=sys.stderr, flush=True)


class Steps:
    """Work in numbered steps.

    Args:
        total: number of steps.
        show: whether anything is said.
    """

    def __init__(self, total: int, show: bool = True) -> None:
        self.total, self.show, self.done = total, show, 0

    def __call__(self, what: str) -> None:
        """Say that the next step begins, and what it does."""
        self.done += 1
        say(f"step {self.done} of {self.total}: {what}", self.show)

    def found(self, what: str) -> None:
        """Say what the step found."""
        say(f"  {what}", self.show)


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    show: bool = True,
) -> "tqdm[Any]":
    """A bar of tqdm, which disappears when it is closed; lines where stderr is no terminal.

    Args:
        iterable: whose items are counted; without, `update` counts.
        desc: what is done.
        unit: of what is counted, in the singular.
        total: how many there are; None if that is unknown.
        initial: how many were done before.
        show: whether there is a bar.
    """
    options = {"desc": f"  {desc}", "unit": unit, "total": total, "initial": initial, "leave": False}
    if sys.stderr.isatty():
        return tqdm(iterable, disable=not show, dynamic_ncols=True, **options)
    form = "{desc}: {n_fmt} of {total_fmt} {unit}s ({elapsed}, {remaining} left)"
    return _Lines(iterable, disable=not show, mininterval=EVERY, delay=EVERY, bar_format=form, **options)


class _Lines(tqdm):
    """A line each time that a bar would be drawn."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Print what a bar would show; closing one clears it with an empty message, where there is nothing to clear."""
        if msg is None:
            say(str(self))
        return False
