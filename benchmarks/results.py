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
from vwt.pictures.figures import subplots
from vwt.tuning.plan import pareto_front

Row = dict[str, Any]

LEVEL = 0.95
RESAMPLES = 2000
HELD = 1 << 22  # numbers that one step of the bootstrap holds
MARKERS = "osD^vP*X<"  # as many as differ from the ten colours in number

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
    """Write the header and all tables as JSON, and the rows of all tables as CSV; each file whole or not at all."""
    if not paths:
        return
    rows = [{"table": name, **row} for name, table in tables.items() for row in table]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(column for row in rows for column in row)))
    writer.writeheader()
    writer.writerows(rows)
    content = json.dumps({**header, "tables": tables}, indent=2, default=str) + "\n"
    for path, new in zip(paths, (content, text.getvalue()), strict=True):
        with replacing(path) as draft:
            draft.write_text(new, newline="")


# -- plots -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One plot of a figure.

    Attributes:
        x: column.
        y: column.
        ends: columns with the ends of y's error bars; None where a row has none.
        labels: of the two axes.
        front: the rows that no other beats in x and y are joined, and alone are named.
        limit: column of a dashed line over x.
    """

    x: str
    y: str
    ends: tuple[str, str]
    labels: tuple[str, str]
    front: bool = False
    limit: str | None = None


def plot(path: Path, rows: Sequence[Row], panels: Sequence[Panel], title: str) -> None:
    """Draw panels side by side, a colour and a marker for each group of rows.

    Args:
        path: .png, .svg or .pdf.
        rows: with name and group; those without the columns of a panel are left out of it.
        panels: what to draw.
        title: of the figure.
    """
    figure, (row_of_axes,) = subplots(1, len(panels), size=(8, 6.5))
    groups = list(dict.fromkeys(row["group"] for row in rows))
    for axes, panel in zip(row_of_axes, panels, strict=True):
        known = [row for row in rows if row.get(panel.x) is not None and row.get(panel.y) is not None]
        for index, group in enumerate(groups):
            own = [row for row in known if row["group"] == group]
            if not own:
                continue
            x, y = ([row[name] for row in own] for name in (panel.x, panel.y))
            low, high = ([row[panel.y] if row[end] is None else row[end] for row in own] for end in panel.ends)
            error = np.maximum(0, [np.subtract(y, low), np.subtract(high, y)])
            marker = MARKERS[index % len(MARKERS)]
            axes.errorbar(x, y, error, fmt=marker, color=f"C{index % 10}", label=group, elinewidth=0.8, alpha=0.9)
        if panel.limit:
            points = sorted((row[panel.x], row[panel.limit]) for row in known if row.get(panel.limit) is not None)
            axes.plot(*np.array(points).reshape(-1, 2).T, color="0.6", linestyle="--", label="ideal")
        named = known
        if panel.front:
            named = pareto(known, panel.x, panel.y)
            axes.plot([row[panel.x] for row in named], [row[panel.y] for row in named], color="0.3", label="front")
        for row in named:
            place = {"xytext": (-5, -5), "textcoords": "offset points", "ha": "right", "va": "top"}
            at = (row[panel.x], row[panel.y])
            axes.annotate(row["name"], at, rotation=30, rotation_mode="anchor", fontsize=6, **place)
        axes.margins(x=0.25, y=0.12)  # room for the names
        axes.set(xlabel=panel.labels[0], ylabel=panel.labels[1], yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=120)
