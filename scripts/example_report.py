"""The example report of the docs: what docs/fidelity.json records of ViT-Tiny, and crops of scikit-learn's photographs.

The parts of a forward are timed when the report is made; all other latencies are the recorded ones.
"""

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from demo import MODEL, ROOT, make_crops

import vwt
from vwt.cli import run_script
from vwt.models.create import create_model
from vwt.pictures.report.front import read_peers
from vwt.pictures.report.report import check_report, write_report
from vwt.tuning.plan import Plan, Point, front_of
from vwt.tuning.profile import LatencyProfile

RECORDED = ROOT / "docs" / "fidelity.json"
CHOSEN, GOAL = "Absorb(98) in block 4", {"ratio": 0.85}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--checkpoint", help="file of weights; by default the pretrained ones from the hub")
    parser.add_argument("--out", default=str(ROOT / "docs" / "_static" / "example_report.html"), help="NAME.html")


def run(arguments: argparse.Namespace) -> None:
    """Write the report."""
    check_report(arguments.out)
    model = create_model(MODEL, arguments.checkpoint)
    plan = make_plan(LatencyProfile.identify(model))
    others = [row for row in read_peers(RECORDED, plan) if row.method != "schedule"]
    with TemporaryDirectory() as folder:
        crops = make_crops(Path(folder))
        write_report(arguments.out, plan, model, crops, others=others, command="python scripts/example_report.py")
    print(arguments.out)


def make_plan(own: dict[str, Any]) -> Plan:
    """The recorded schedules as a plan of a model, of which `LatencyProfile.identify` is given."""
    rows = json.loads(RECORDED.read_text(encoding="utf-8"))["tables"]["fidelity"]
    absorbing = (row for row in rows if row["group"] == "schedule" and row["name"].startswith("Absorb"))
    points = {row["name"]: make_point(row) for row in absorbing}
    chosen = points[CHOSEN]
    machine = {name: own[name] for name in ("device", "cpu", "threads", "torch", "timm")}
    itself = Point(None, vwt.PruningSchedule({}), chosen.milliseconds / chosen.ratio, 1.0, 0.0, 1.0)
    return Plan(own["model"], 1, own["precision"], machine, GOAL, chosen, front_of([itself, *points.values()]))


def make_point(row: dict[str, Any]) -> Point:
    """A row as a point; its name is that of its schedule, `Absorb(98) in block 3`."""
    reductions = re.findall(r"Absorb\((\d+)\) in block (\d+)", row["name"])
    schedule = vwt.PruningSchedule({int(block): vwt.Absorb(int(count)) for count, block in reductions})
    return Point(None, schedule, row["ms"], row["ratio"], row["kl"], row["agreement"])


main = partial(run_script, "example_report", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
