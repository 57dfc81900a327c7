"""Charts of profiles and utilities. Needs matplotlib: `pip install vwt[plots]`."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vwt.pictures.figures import SLIDE, save_figure, subplots
from vwt.pictures.labels import Label, place_labels
from vwt.pictures.palette import FRONT, MODEL, PLAN, ink, look
from vwt.tuning.profile import LatencyProfile
from vwt.tuning.schedule import down_to, utility


class Curve(NamedTuple):
    """What is drawn over tokens.

    Attributes:
        name: beside it.
        values: of each token count.
        method: whose colour it has.
        line: of matplotlib.
    """

    name: str
    values: Sequence[float]
    method: str
    line: str = "-"


def plot_profile(path: str | os.PathLike[str], profile: LatencyProfile) -> None:
    """Draw the latency of a block over tokens, its knees, and predicted against measured forwards.

    Raises:
        ArgumentError: if matplotlib is not installed.
        DocumentError: if the file cannot be written.
    """
    figure, axes = subplots(1, 2, size=(SLIDE / 2, 5.5))
    left, right = axes[0]
    measured, predicted = ([check[name] for check in profile.checks] for name in ("measured", "predicted"))
    right.plot([0, max(measured, default=1)], [0, max(measured, default=1)], color=look(MODEL).colour, linewidth=1)
    right.plot(measured, predicted, "o", color=look(FRONT).colour)
    error = f"Predictions of whole forwards err by {100 * profile.error:.1f} % (median)"
    _entitle(right, error, "measured, ms a batch", "predicted, ms a batch")
    for count in profile.knees():
        left.axvline(count, color="0.8", linestyle="--", linewidth=1, zorder=0)
    _entitle(left, "What tokens cost; dashed: where the cost of a token changes", "tokens an image", "ms a batch")
    machine = profile.machine
    figure.supxlabel(
        f"{profile.model}, batch {profile.batch_size}, {profile.precision}, {profile.runtime}\n{machine['cpu']}, "
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}",
        fontsize=9,
        color="0.35",
    )
    curves = [
        Curve("a block", profile.block, FRONT),
        Curve("of it, up to its attention", profile.attention, MODEL),
        Curve("a block after a merge", profile.counting, FRONT, ":"),
    ]
    _draw_curves(left, profile.counts, curves)
    save_figure(figure, path, dpi=120)


def plot_utility(
    path: str | os.PathLike[str], profile: LatencyProfile, accuracy: Mapping[int, float], alpha: float, block: int
) -> None:
    """Draw latency, accuracy and utility over the tokens that are left, and the choice.

    Raises:
        ArgumentError: if matplotlib is not installed.
        DocumentError: if the file cannot be written.
    """
    curve = utility(profile, accuracy, alpha, block)
    counts = list(curve)
    latency = [profile.predict(down_to(profile, block, n)) / profile.predict() for n in counts]
    figure, axes = subplots(1, 1, size=(8, 5.5))
    axes = axes[0][0]
    best = max(curve, key=lambda n: (curve[n], n))
    axes.axvline(best, color=look(MODEL).colour, linestyle="--", linewidth=1, zorder=0)
    _entitle(axes, f"The utility is highest at {best} tokens", f"tokens left after block {block}", "share, or utility")
    figure.supxlabel(profile.model, fontsize=9, color="0.35")
    curves = [
        Curve("latency, ratio to the full model", latency, MODEL),
        Curve("accuracy under random removal", [accuracy[n] for n in counts], FRONT),
        Curve(f"utility, alpha {alpha:g}", [curve[n] for n in counts], PLAN),
    ]
    _draw_curves(axes, counts, curves)
    save_figure(figure, path, dpi=120)


def _entitle(axes: Any, title: str, x: str, y: str) -> None:
    """Titles of a chart and its axes, as large as a slide needs."""
    axes.set_title(title, fontsize=12, loc="left")
    axes.set_xlabel(x, fontsize=11)
    axes.set_ylabel(y, fontsize=11)
    axes.tick_params(labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_curves(axes: Any, counts: Sequence[int], curves: Sequence[Curve]) -> None:
    """Curves over token counts, each with its name; what else is in the figure must be drawn before."""
    for curve in curves:
        own = look(curve.method)
        axes.plot(counts, curve.values, curve.line, marker=own.marker, markersize=4, color=own.colour)
    axes.set_ylim(0, 1.15 * max(max(curve.values) for curve in curves))
    points = [list(zip(counts, curve.values, strict=True))[::-1] for curve in curves]
    place_labels(axes, [Label(c.name, ink(c.method), own) for c, own in zip(curves, points, strict=True)])
