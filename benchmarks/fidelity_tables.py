"""What the fidelity benchmark makes of its figures: bootstrap intervals, Pareto fronts, tables and the plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import Row, ratio

from vwt.pictures.figures import subplots

RESAMPLES = 2000
LEVEL = 0.95
CHUNK = 1 << 22  # numbers that one step of the bootstrap holds

COLUMNS = {
    "name": "", "tokens": ".1f", "agreement": ".3f", "agreement_low": ".3f", "agreement_high": ".3f", "kl": ".4f",
    "kl_low": ".4f", "kl_high": ".4f", "top1": ".4f", "top1_change": "+.4f", "top1_change_low": "+.4f",
    "top1_change_high": "+.4f", "ms": ".2f", "ratio": ".3f", "ratio_low": ".3f", "ratio_high": ".3f", "front": "",
}  # fmt: skip
EQUAL_KL = {
    "peer": "", "kl": ".4f", "vwt": "", "vwt_kl": ".4f", "kl_change_low": "+.4f", "kl_change_high": "+.4f",
    "tokens": ".3f", "latency": ".3f", "latency_low": ".3f", "latency_high": ".3f",
}  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """What one variant does to each of n images.

    Attributes:
        kl: (n,) KL(full ‖ reduced), nats.
        agrees: (n,) 1.0 where the first class is the full model's, else 0.0.
        right: (n,) 1.0 where it is the label, else 0.0; None where there are no labels.
        tokens: (n,) prefix included, mean over the blocks that they enter.
    """

    kl: np.ndarray
    agrees: np.ndarray
    right: np.ndarray | None
    tokens: np.ndarray


# -- statistics --------------------------------------------------------------------------------------------------------


def bootstrap(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Means (resamples, k) of values (n, k) over n images drawn with replacement; the same images for all columns."""
    rng, count = np.random.default_rng(seed), len(values)
    even = np.full(count, 1 / count)
    step = max(1, CHUNK // count)
    sizes = [min(step, resamples - begin) for begin in range(0, resamples, step)]
    return np.concatenate([rng.multinomial(count, even, size) @ values for size in sizes]) / count


def interval(resampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the central 95 % of resampled figures (resamples, k), each (k,)."""
    low, high = np.quantile(resampled, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)
    return low, high


def ratio_interval(
    numerator: np.ndarray, denominator: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The ends of the 95 % interval of `harness.ratio` of seconds (items, runs), over items drawn with replacement."""
    each = np.median(numerator, axis=1) / np.median(denominator, axis=1)
    drawn = np.random.default_rng(seed).integers(len(each), size=(resamples, len(each)))
    low, high = interval(np.median(each[drawn], axis=1, keepdims=True))
    return float(low[0]), float(high[0])


def pareto(rows: Sequence[Row], cost: str) -> list[Row]:
    """The rows that no other one beats in both a cost and KL, by rising cost; rows without the cost are left out."""
    front: list[Row] = []
    for row in sorted((r for r in rows if r.get(cost) is not None), key=lambda r: (r[cost], r["kl"])):
        if not front or row["kl"] < front[-1]["kl"]:
            front.append(row)
    return front


# -- tables ------------------------------------------------------------------------------------------------------------


def fidelity_rows(scores: dict[str, Scores], families: dict[str, str], seed: int) -> list[Row]:
    """One row a variant; the first is the full model."""
    every = list(scores.values())
    labelled = every[0].right is not None
    kl, agrees = (np.stack([getattr(s, name) for s in every], axis=1) for name in ("kl", "agrees"))
    parts = [kl, agrees]
    if labelled:
        right = np.stack([s.right for s in every if s.right is not None], axis=1)
        parts.append(right - right[:, :1])
    low, high = (end.reshape(len(parts), -1) for end in interval(bootstrap(np.concatenate(parts, axis=1), seed)))
    rows: list[Row] = []
    for index, (name, own) in enumerate(scores.items()):
        row: Row = {"name": name, "family": families[name], "tokens": float(own.tokens.mean())}
        for part, (figure, values) in enumerate((("agreement", own.agrees), ("kl", own.kl))):
            ends = low[1 - part, index], high[1 - part, index]
            row |= {figure: float(values.mean()), f"{figure}_low": float(ends[0]), f"{figure}_high": float(ends[1])}
        if labelled:
            change = float(parts[2][:, index].mean())
            row |= {"top1": float(right[:, index].mean()), "top1_change": change}
            row |= {"top1_change_low": float(low[2, index]), "top1_change_high": float(high[2, index])}
        rows.append(row)
    return rows


def add_latency(rows: Sequence[Row], seconds: dict[str, np.ndarray], seed: int) -> None:
    """Give rows their latency: milliseconds, and the ratio to the first row's, of seconds (items, runs) by name."""
    full = seconds[rows[0]["name"]]
    for row in rows:
        own = seconds[row["name"]]
        low, high = ratio_interval(own, full, seed)
        row |= {"ms": 1e3 * float(np.median(own)), "ratio": ratio(own, full), "ratio_low": low, "ratio_high": high}


def mark_fronts(rows: Sequence[Row]) -> None:
    """Say of each row on which Pareto fronts it is: "tokens", "latency", both, or none."""
    fronts = {"tokens": pareto(rows, "tokens"), "latency": pareto(rows, "ratio")}
    for row in rows:
        row["front"] = " ".join(name for name, front in fronts.items() if any(row is other for other in front))


def equal_kl(
    rows: Sequence[Row], scores: dict[str, Scores], seconds: dict[str, np.ndarray], peers: Sequence[str], seed: int
) -> list[Row]:
    """For each comparator, the cheapest variant of vwt with at most its KL.

    Args:
        rows: of the table.
        scores: by name.
        seconds: (items, runs) by name; empty where latency was not measured, and tokens are the cost.
        peers: families that are comparators; all others but the full model are vwt's.
        seed: of the bootstrap.
    """
    cost = "ratio" if seconds else "tokens"
    own = [row for row in rows[1:] if row["family"] not in peers]
    found = []
    for peer in (row for row in rows[1:] if row["family"] in peers):
        best = min((row for row in own if row["kl"] <= peer["kl"]), key=lambda row: row[cost], default=None)
        if best is None:
            continue
        change = scores[best["name"]].kl - scores[peer["name"]].kl
        low, high = interval(bootstrap(change[:, None], seed))
        row: Row = {"peer": peer["name"], "kl": peer["kl"], "vwt": best["name"], "vwt_kl": best["kl"]}
        row |= {"kl_change_low": float(low[0]), "kl_change_high": float(high[0])}
        row["tokens"] = best["tokens"] / peer["tokens"]
        if seconds:
            pair = seconds[best["name"]], seconds[peer["name"]]
            row["latency"] = ratio(*pair)
            row["latency_low"], row["latency_high"] = ratio_interval(*pair, seed)
        found.append(row)
    return found


# -- the plot ----------------------------------------------------------------------------------------------------------

AXES = {"tokens": "tokens an image, mean over blocks", "ratio": "latency at batch 1, of the full model's"}
MARKERS = "osD^vP*X<>"


def plot_fidelity(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw KL with its intervals over tokens and, where it was measured, over latency; the Pareto fronts are joined.

    Args:
        path: .png, .svg or .pdf.
        rows: of the table; those without KL, as the full model, are left out.
        title: of the plot.
    """
    shown = [row for row in rows if row["kl"] > 0]
    costs = [cost for cost in AXES if any(cost in row for row in shown)]
    figure, (panels,) = subplots(1, len(costs), size=(8, 6.5))
    families = list(dict.fromkeys(row["family"] for row in shown))
    for axes, cost in zip(panels, costs, strict=True):
        for index, family in enumerate(families):
            own = [row for row in shown if row["family"] == family]
            x, y = ([row[name] for row in own] for name in (cost, "kl"))
            error = [[max(0.0, r["kl"] - r["kl_low"]) for r in own], [max(0.0, r["kl_high"] - r["kl"]) for r in own]]
            marker = MARKERS[index % len(MARKERS)]
            axes.errorbar(x, y, error, fmt=marker, color=f"C{index % 10}", label=family, elinewidth=0.8, alpha=0.9)
        front = pareto(shown, cost)
        axes.plot([row[cost] for row in front], [row["kl"] for row in front], color="0.3", zorder=0, label="front")
        for row in front:
            place = {"xytext": (-5, -5), "textcoords": "offset points", "ha": "right", "va": "top"}
            axes.annotate(row["name"], (row[cost], row["kl"]), rotation=30, rotation_mode="anchor", fontsize=6, **place)
        axes.margins(x=0.25, y=0.12)  # room for the names
        axes.set(xlabel=AXES[cost], ylabel="KL(full ‖ reduced), nats, mean and 95 % interval", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=120)
