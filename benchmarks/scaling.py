"""How latency grows with images in a batch, with words, and with resolution.

A part of `benchmarks/latency.py`, with --scaling.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import matching
import numpy as np
from harness import Bench, load_model, place
from results import Row, print_table
from torch import Tensor
from variants import FULL, Variant, registry

from vwt.models.backbone import Backbone
from vwt.tokens.patches import SPACES, Space

WORDS: list[tuple[Space, int]] = [(space, count) for space in SPACES for count in (100, 1000, 10000)]
EXPONENTS = {"of": "", "x": "", "name": "", "exponent": ".2f"}
FEW = 8  # batches of each size

Measure = Callable[[Bench, Sequence[Variant], list[Tensor]], list[Row]]


def measure(bench: Bench, measure_latency: Measure, columns: dict[str, str]) -> dict[str, list[Row]]:
    """Tables over images in a batch, words, and resolution, and the exponents of growth; printed as they come.

    Args:
        bench: with codebooks.
        measure_latency: rows of variants on batches.
        columns: of these rows.
    """
    tables: dict[str, list[Row]] = {"images": []}
    for size in (1, 2, 4, 8, 16, 32):
        if size <= bench.arguments.images:
            rows = measure_latency(bench, measured(bench), bench.batches(size)[:FEW])
            tables["images"] += [{"images": size, **row} for row in rows]
    print_table("Growth with images in a batch", tables["images"], {"images": "d", **columns})
    tables["words"] = matching.measure(bench)
    print_table("Growth with words: matching, milliseconds a batch", tables["words"], matching.COLUMNS)
    tables["resolution"] = []
    for pixels in bench.arguments.sizes:
        model = place(load_model(bench.arguments, pixels), bench.device, bench.arguments.precision)
        other = replace(bench, model=model)
        rows = measure_latency(other, measured(other), other.batches()[:FEW])
        tables["resolution"] += [{"pixels": pixels, "patches": Backbone(model).patches, **row} for row in rows]
    print_table("Growth with resolution", tables["resolution"], {"pixels": "d", "patches": "d", **columns})
    tables["exponents"] = [
        *growth(tables["images"], "images", ("name",), ("ms",)),
        *growth(tables["words"], "words", ("space", "threshold"), ("brute_ms", "own_ms")),
        *growth(tables["resolution"], "patches", ("name",), ("ms",)),
    ]
    print_table("Exponents: time grows as x to the power of", tables["exponents"], EXPONENTS)
    return tables


def measured(bench: Bench) -> list[Variant]:
    """The full model, and one of each of the paper's strategies, with 1000 words in embedding space if there are."""
    codebook = next((c for c in bench.codebooks if (c.space, len(c)) == ("embedding", 1000)), bench.codebooks[0])
    inter_image = f"InterImage {codebook.space} {len(codebook)}, {bench.arguments.threshold[0]:g}"
    return [variant for variant in registry(bench) if variant.name in (FULL, "IntraImage 0.5", inter_image)]


def growth(rows: Sequence[Row], size: str, names: Sequence[str], values: Sequence[str]) -> list[Row]:
    """Exponents of the growth of columns with the column `size`, where that varies, for each value of `names`."""
    found = []
    for name in dict.fromkeys(tuple(row[n] for n in names) for row in rows):
        own = [row for row in rows if tuple(row[n] for n in names) == name]
        for value in values if len({row[size] for row in own}) > 1 else ():
            slope = exponent([row[size] for row in own], [row[value] for row in own])
            found.append({"of": value, "x": size, "name": ", ".join(map(str, name)), "exponent": slope})
    return found


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """How values grow with at least two sizes: the slope of a line through their logarithms. 1 is linear."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
