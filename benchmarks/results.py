"""What becomes of measured figures: ratios and intervals, Pareto fronts, tables, files and plots."""

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from vwt.documents import replacing
from vwt.errors import ArgumentError
from vwt.pictures.figures import SLIDE, save_figure, subplots
from vwt.pictures.labels import Label, place_labels
from vwt.pictures.palette import ink, look
from vwt.tuning.plan import pareto_front

Row = dict[str, Any]

LEVEL = 0.95
RESAMPLES = 2000
HELD = 1 << 22  # numbers that one step of the bootstrap holds

# -- statistics --------------------------------------------------------------------------------------------------------


def spread(seconds: np.ndarray) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of all items and runs (items, runs), in milliseconds."""
    low, middle, high = np.quantile(1e3 * seconds, (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


def ratios(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Ratio of medians over runs, of seconds (items, runs): (items,)."""
    return np.median(numerator, axis=1) / np.median(denominator, axis=1)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> float:
    """Median over items of `ratios`."""
    return float(np.median(ratios(numerator, denominator)))


def bootstrap_interval(
    values: np.ndarray, seed: int, statistic: Callable[..., np.ndarray] = np.mean
) -> tuple[np.ndarray, np.ndarray]:
    """The ends, each (k,), of 95 % bootstrap intervals of columns (n, k): percentiles of n rows drawn again.

    Each resample draws the same rows for all columns. A single row is its own interval.
    """
    if len(values) < 2:
        return values[0], values[0]
    found = stats.bootstrap(
        (values.T,),
        statistic,
        axis=-1,
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        batch=max(1, HELD // values.size),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return found.confidence_interval.low, found.confidence_interval.high


def ratio_interval(numerator: np.ndarray, denominator: np.ndarray, seed: int) -> tuple[float, float]:
    """The ends of the 95 % bootstrap interval of `ratio`, over items."""
    low, high = bootstrap_interval(ratios(numerator, denominator)[:, None], seed, np.median)
    return float(low[0]), float(high[0])


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95 % confidence interval (Student's t); None of a single value."""
    if len(values) < 2:
        return float(values[0]), None
    return float(np.mean(values)), float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))


def pareto(rows: Sequence[Row], cost: str, loss: str) -> list[Row]:
    """The rows that no other beats in both a cost and a loss, by rising cost; rows without the cost are left out."""
    known = [row for row in rows if row.get(cost) is not None]
    return pareto_front(known, lambda row: (row[cost], row[loss]))


# -- tables ------------------------------------------------------------------------------------------------------------


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
    """Write the header and all tables as JSON, and the rows of all tables as CSV; each file whole or not at all.

    Raises:
        ArgumentError: if the disk refuses.
    """
    if not paths:
        return
    rows = [{"table": name, **row} for name, table in tables.items() for row in table]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(column for row in rows for column in row)))
    writer.writeheader()
    writer.writerows(rows)
    content = json.dumps({**header, "tables": tables}, indent=2, default=str) + "\n"
    for path, new in zip(paths, (content, text.getvalue()), strict=True):
        try:
            with replacing(path) as draft:
                draft.write_text(new, newline="")
        except OSError as error:
            raise ArgumentError(f"cannot write {path}: {error.strerror}; choose another --results-file") from error


# -- plots -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One plot of a figure.

    Attributes:
        title: what is to be seen.
        x: column.
        y: column.
        ends: columns with the ends of y's error bars; none where a row has none.
        labels: of the two axes.
        front: the rows that no other beats in x and y are joined.
        limit: column of a dashed line over x.
        log: whether y is logarithmic.
    """

    title: str
    x: str
    y: str
    ends: tuple[str, str]
    labels: tuple[str, str]
    front: bool = False
    limit: str | None = None
    log: bool = True


def plot(path: Path, rows: Sequence[Row], panels: Sequence[Panel], caption: str) -> None:
    """Draw panels, two side by side; each group of rows has a colour, a marker and its name beside one of its points.

    Args:
        path: .png, .svg or .pdf.
        rows: with name and group; those without the columns of a panel are left out of it.
        panels: what to draw.
        caption: below all, in small type.
    """
    figure, grid = subplots((len(panels) + 1) // 2, min(2, len(panels)), size=(SLIDE / 2, 6.2))
    figure.supxlabel(caption, fontsize=9, color="0.35")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    drawn = [(axes, panel, rows_of(rows, panel)) for axes, panel in zip(grid.flat, panels, strict=False)]
    for axes, panel, known in drawn:
        draw_panel(axes, panel, known)
    figure.draw_without_rendering()  # places of all axes
    for axes, panel, known in drawn:
        place_labels(axes, group_labels(known, panel))
    save_figure(figure, path, dpi=120)


def rows_of(rows: Sequence[Row], panel: Panel) -> list[Row]:
    """The rows that have the columns of a panel."""
    return [row for row in rows if row.get(panel.x) is not None and row.get(panel.y) is not None]


def draw_panel(axes: Any, panel: Panel, rows: Sequence[Row]) -> None:
    """All of a panel but the names of its groups."""
    if panel.front:
        named = pareto(rows, panel.x, panel.y)
        axes.plot([row[panel.x] for row in named], [row[panel.y] for row in named], color="0.75", linewidth=3, zorder=0)
    if panel.limit:
        points = sorted((row[panel.x], row[panel.limit]) for row in rows if row.get(panel.limit) is not None)
        axes.plot(*np.array(points).reshape(-1, 2).T, color="0.6", linestyle="--", zorder=0)
    for row in rows:
        low, high = (row[panel.y] if row.get(end) is None else row[end] for end in panel.ends)
        own = look(row["group"])
        axes.vlines(row[panel.x], low, high, color=own.colour, linewidth=1)
        axes.plot(row[panel.x], row[panel.y], own.marker, color=own.colour, markersize=8)
    axes.margins(0.08)
    axes.set(yscale="log" if panel.log else "linear")
    axes.set_xlabel(panel.labels[0], fontsize=12)
    axes.set_ylabel(panel.labels[1], fontsize=12)
    axes.set_title(panel.title, fontsize=13, loc="left")
    axes.tick_params(labelsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def group_labels(rows: Sequence[Row], panel: Panel) -> list[Label]:
    """A label for each group of rows."""
    groups = dict.fromkeys(row["group"] for row in rows)
    return [
        Label(group, ink(group), [(row[panel.x], row[panel.y]) for row in rows if row["group"] == group])
        for group in groups
    ]
