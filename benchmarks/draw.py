"""The plot of a benchmark, drawn again from what it wrote with --results-file.

    python benchmarks/draw.py results/fidelity.json fidelity.svg

It takes results of `fidelity.py`, `latency.py` and `energy.py`.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import energy
import fidelity
import latency
from results import plot

from vwt.cli import run_script
from vwt.errors import ArgumentError
from vwt.pictures.figures import check_picture

PANELS = {"latency": [latency.PANEL], "energy": [energy.PANEL]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("results", type=Path, help="NAME.json of a benchmark")
    parser.add_argument("plot", type=Path, help="the picture: NAME.svg, NAME.png or NAME.pdf")


def run(arguments: argparse.Namespace) -> None:
    """What the options ask for."""
    check_picture(arguments.plot)
    caption, tables = read_results(arguments.results)
    if "fidelity" in tables:
        fidelity.plot_fronts(arguments.plot, tables["fidelity"], caption)
        return
    name = next((name for name in PANELS if name in tables), None)
    if name is None:
        known = ", ".join(["fidelity", *PANELS])
        raise ArgumentError(f"{arguments.results} has the tables {', '.join(tables)}; expected one of {known}")
    plot(arguments.plot, tables[name], PANELS[name], caption)


def read_results(path: Path) -> tuple[str, dict[str, Any]]:
    """What was measured on which machine, and the tables.

    Raises:
        ArgumentError: if the file cannot be read, or was written by no benchmark.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model, images = content["arguments"]["model"], content.get("images") or content["arguments"]["images"]
        return f"{model}, {images} images\n{content['hardware']}", dict(content["tables"])
    except OSError as error:
        raise ArgumentError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(f"{path} holds no results of a benchmark; give what --results-file wrote") from error


main = partial(run_script, "draw", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
