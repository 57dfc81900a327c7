import json
from pathlib import Path

import draw
import pytest
import results
from variants import OURS, PEERS

from tests.pictures.test_charts import check
from vwt.pictures.palette import OTHER, look

RECORDED = Path(__file__).parents[2] / "docs" / "fidelity.json"


def test_recorded_figures_are_drawn(run, monkeypatch):
    saved = []
    monkeypatch.setattr(results, "save_figure", lambda figure, path, **options: saved.append(figure))
    assert run(draw.main, [str(RECORDED), "fidelity.svg"]) == (0, "", "")
    texts = check(saved[0])
    rows = json.loads(RECORDED.read_text())["tables"]["fidelity"]
    assert {row["group"] for row in rows} <= texts


@pytest.mark.parametrize("table", ["latency", "energy"])
def test_other_benchmarks(run, table):
    row = {"name": "one", "group": "ToMe", "tokens": 9, "ms": 2.0, "agreement": 0.9, "joules_per_image": 0.5}
    content = {"hardware": "abacus", "arguments": {"model": "test_vit", "images": 3}, "tables": {table: [row]}}
    Path("results.json").write_text(json.dumps(content))
    assert run(draw.main, ["results.json", "plot.pdf"]) == (0, "", "")
    assert Path("plot.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("content", "plot", "message"),
    [
        (None, "plot.svg", "cannot read results.json: No such file"),
        ("[", "plot.svg", "results.json holds no results of a benchmark"),
        ("[]", "plot.svg", "results.json holds no results of a benchmark"),
        ('{"arguments": {"model": "m", "images": 1}, "hardware": "h", "tables": {"parts": []}}', "plot.svg", "parts"),
        ("{}", "plot.txt", r"expected a .png, .svg or .pdf"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(run, content, plot, message):
    if content is not None:
        Path("results.json").write_text(content)
    status, out, err = run(draw.main, ["results.json", plot])
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_every_method_has_a_look_of_its_own():
    assert all(look(group) != OTHER for group in OURS + PEERS)
