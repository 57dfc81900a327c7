"""Names beside the points of a chart, where they cover least."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

SIZE = 10  # of the text, in points
AWAY = 7  # of a text from its point, in points
ROOM = 4  # that a marker takes on each side, in points
SIDES = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]  # of a point, the best first


class Label(NamedTuple):
    """A name, and the points beside one of which it may stand.

    Attributes:
        text: the name.
        colour: of the text.
        points: (x, y) of the chart, the best first.
    """

    text: str
    colour: str
    points: Sequence[tuple[float, float]]


def place_labels(axes: Any, labels: Sequence[Label], others: Sequence[tuple[float, float]] = ()) -> None:
    """Write each label beside one of its points, where it covers least of all points and of the labels before it.

    To be called when everything else is drawn, as later changes of the axes' limits would move points.

    Args:
        axes: of matplotlib.
        labels: the most important first.
        others: points (x, y) without a label that are not to be covered either.
    """
    figure = axes.figure
    figure.draw_without_rendering()  # only now are sizes known
    renderer, pixels = figure.canvas.get_renderer(), figure.dpi / 72
    every = [point for label in labels for point in label.points] + list(others)
    places = axes.transData.transform(np.array(every, dtype=float).reshape(-1, 2))
    taken = [(x - ROOM * pixels, y - ROOM * pixels, x + ROOM * pixels, y + ROOM * pixels) for x, y in places]
    frame = axes.get_window_extent(renderer).extents
    for label in labels:
        best: tuple[float, Any, Any] | None = None
        for point in label.points:
            for right, up in SIDES:
                text = _write(axes, label, point, right, up)
                box = text.get_window_extent(renderer).extents
                covered = sum(_overlap(box, other) for other in taken) + _area(box) - _overlap(box, frame)
                if best is None or covered < best[0]:
                    if best is not None:
                        best[1].remove()
                    best = covered, text, box
                else:
                    text.remove()
            if best is not None and best[0] == 0:
                break
        if best is not None:
            taken.append(best[2])


def _write(axes: Any, label: Label, point: tuple[float, float], right: int, up: int) -> Any:
    from matplotlib.patheffects import withStroke

    text = axes.annotate(
        label.text,
        point,
        xytext=(AWAY * right, AWAY * up),
        textcoords="offset points",
        ha={1: "left", 0: "center", -1: "right"}[right],
        va={1: "bottom", 0: "center", -1: "top"}[up],
        fontsize=SIZE,
        color=label.colour,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],  # to be read on a line
    )
    text.set_in_layout(False)
    return text


def _area(box: Sequence[float]) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Area that two boxes (left, bottom, right, top) have in common."""
    wide, high = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    return float(wide * high) if wide > 0 and high > 0 else 0.0
