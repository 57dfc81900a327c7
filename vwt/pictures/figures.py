"""Pictures of words, groups, profiles and schedules. Needs matplotlib: `pip install vwt[plots]`."""

import importlib.util
import os
from pathlib import Path
from typing import Any, Literal

from vwt.documents import check_folder, replacing
from vwt.errors import ArgumentError, DocumentError

SLIDE = 13.33  # inches, the width of a slide


def check_picture(path: str | os.PathLike[str] | None) -> None:
    """Raise, before anything is measured, if a picture is asked for that cannot be drawn.

    Raises:
        ArgumentError: without matplotlib, or for another name.
        DocumentError: for a folder that cannot be written.
    """
    if path is None:
        return
    path = Path(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise ArgumentError("pictures need matplotlib; pip install 'vwt[plots]'")
    if path.suffix.lower() not in (".png", ".svg", ".pdf") or not path.parent.is_dir():
        raise ArgumentError(f"cannot draw {path}; expected a .png, .svg or .pdf in a folder that exists")
    check_folder(path, str(path))


def subplots(rows: int, columns: int, size: tuple[float, float] = (2.4, 2.5)) -> tuple[Any, Any]:
    """A figure without pyplot, and its axes (rows, columns), each of a size in inches.

    Raises:
        ArgumentError: if matplotlib is not installed.
    """
    figure = new_figure(size[0] * columns, size[1] * rows)
    return figure, figure.subplots(rows, columns, squeeze=False)


def new_figure(width: float, height: float, layout: Literal["tight", "constrained"] = "tight") -> Any:
    """An empty figure without pyplot, of a size in inches, with one of matplotlib's layouts.

    Raises:
        ArgumentError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError("pictures need matplotlib; pip install 'vwt[plots]'") from error
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | os.PathLike[str], **options: Any) -> None:
    """Write a figure as a whole or not at all, with matplotlib's options.

    Raises:
        DocumentError: if the file cannot be written.
    """
    path = Path(path)
    try:
        with replacing(path) as fresh:
            figure.savefig(fresh, format=path.suffix[1:], **options)
    except OSError as error:
        raise DocumentError(f"cannot draw {path}: {error.strerror or error}; choose another file") from error
