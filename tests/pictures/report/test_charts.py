import pytest

from tests.pictures.report.conftest import OTHERS
from vwt.pictures.palette import LOOKS, OTHER, look
from vwt.pictures.report.charts import front_chart, parts_chart, profile_chart, words_chart
from vwt.pictures.report.costs import Costs, Part
from vwt.pictures.report.front import Row

ROWS = [Row("the model itself", "full", 10, 1, 0.0, 1, 101), Row("chosen", "plan", 8, 0.8, 0.05, 0.9, 70), *OTHERS]


def values(chart):
    """The rows of the data that the layers of a chart share, or have of their own."""
    found = [own["data"]["values"] for own in [chart, *chart.get("layer", [])] if "data" in own]
    assert all(own == found[0] for own in found)
    return found[0]


@pytest.mark.parametrize(("scale", "names"), [("linear", 4), ("log", 3)])
def test_front_over_latency(scale, names):
    chart = front_chart(ROWS, "milliseconds", scale, 2)
    rows = values(chart)
    assert len(rows) == names
    assert ("the model itself" in [row["name"] for row in rows]) == (scale == "linear")
    points = next(layer for layer in chart["layer"] if "color" in layer["encoding"])
    assert points["encoding"]["y"]["scale"]["type"] == scale
    assert points["encoding"]["x"]["title"] == "milliseconds a batch of 2"
    assert {field["field"] for field in points["encoding"]["tooltip"]} >= {"name", "KL, nats", "agreement"}
    scales = points["encoding"]["color"]["scale"]
    assert dict(zip(scales["domain"], scales["range"], strict=True))["ToMe"] == LOOKS["ToMe"].colour


def test_front_over_tokens_leaves_out_what_is_unknown():
    names = [row["name"] for row in values(front_chart(ROWS, "tokens", "linear", 1))]
    assert names == ["the model itself", "chosen", "ToMe r 8"]


def test_every_method_has_a_look_of_its_own():
    drawn_together = [LOOKS[name] for name in ("full", "plan", "front", "ToMe", "POMT", "top-k", "random drop")]
    assert len({own.colour for own in drawn_together}) == len(drawn_together)
    assert look("unheard of") == OTHER


COSTS = Costs(10, 8, 101, [Part("patches", 1, 1.2, 81), Part("block 0", 2, 1.5, 71)], {2: 1.0, 101: 9.0})


def test_parts():
    rows = values(parts_chart(COSTS))
    assert [(row["part"], row["run"], row["ms"], row["tokens that leave it"]) for row in rows] == [
        ("patches", "the model itself", 1, "101"),
        ("patches", "the plan", 1.2, "81"),
        ("block 0", "the model itself", 2, "101"),
        ("block 0", "the plan", 1.5, "71"),
    ]


def test_profile():
    rules, curve = profile_chart(COSTS)["layer"]
    assert [row["tokens"] for row in rules["data"]["values"]] == [71, 81]
    assert [(row["tokens"], row["ms"]) for row in curve["data"]["values"]] == [(2, 1.0), (101, 9.0)]


def test_words():
    rows = values(words_chart([7, 3], [0.5, 0.25], [0.125, 0.0]))
    assert [(row["word"], row["share"]) for row in rows] == [("7", 0.5), ("3", 0.25), ("7", 0.125), ("3", 0.0)]
