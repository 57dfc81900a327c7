"""The demo, with a model so small that its figures mean nothing."""

import re

import demo
import pytest
import timm
import torch

from vwt.errors import ModelError
from vwt.pictures.report.front import Row


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A working folder, and few images, tries and runs of a small model; no photographs, and no hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VWT_SHARED", str(tmp_path / "absent"))
    few = {
        "TUNED": 16,
        "TRIED": 16,
        "TRIES": 2,
        "FINALISTS": 1,
        "TIMED": 1,
        "RUNS": 1,
        "FEW_RUNS": 1,
        "DROPS": (0.2,),
        "BUDGETS": (0.95, 0.9),
    }
    for name, value in few.items():
        monkeypatch.setattr(demo, name, value)

    def create_model(name, checkpoint=None, *, weights=True):
        if weights and checkpoint is None:
            raise ModelError("the hub is out of reach")
        return timm.create_model("vit_tiny_patch16_224", depth=6).eval()

    monkeypatch.setattr(demo, "create_model", create_model)
    return tmp_path


@pytest.mark.slow
def test_without_photographs_and_weights(small, capsys):
    assert demo.main() == 0
    out, err = capsys.readouterr()
    assert "no photographs at VWT_SHARED; these are crops of scikit-learn's two photographs" in err
    assert "the hub is out of reach" in err
    assert "same class" not in out
    assert "best" not in out
    assert "The weights are RANDOM" in out
    for name in ("vwt: ", "ToMe, r = ", "POMT, R = ", "VWT intra-image", "random dropping"):
        assert len(re.findall(rf"^ +[\d.]+ +[\d.]+  {name}", out, re.MULTILINE)) == 2, name
    assert out.splitlines()[-1] == str(small / "demo" / "report.html")
    assert err.splitlines()[-1] == "next: open it in a browser"
    assert "ToMe, r = " in (small / "demo" / "report.html").read_text(encoding="utf-8")


def test_crops(tmp_path):
    files = sorted(path.relative_to(tmp_path).as_posix() for path in demo.make_crops(tmp_path).rglob("*.png"))
    assert len(files) == 30
    assert files[0] == "china/0-0.png"


def test_the_best_of_each_budget_is_marked(capsys):
    def entry(name, budget):
        return demo.Entry(name, "ToMe", budget, None)

    entries = [entry("worse", 0.8), entry("better", 0.8), entry("alone", 0.7)]
    rows = [Row("the model itself", "full", 10.0, 1.0, 0.0, 1.0)]
    rows += [Row(one.name, "ToMe", 8.0, 0.8, kl, 0.9) for one, kl in zip(entries, (0.2, 0.1, 0.3), strict=True)]
    demo.print_table(entries, rows, trained=True)
    lines = capsys.readouterr().out.strip("\n").splitlines()
    assert [line.split("  ")[-1] for line in lines[1:]] == [
        "the model itself", "at about 0.8 of its latency", "better", "worse", "at about 0.7 of its latency", "alone",
    ]  # fmt: skip
    assert [line.startswith("best ->") for line in lines[1:]] == [False, False, True, False, False, True]
    assert lines[0].split() == ["same", "class", "KL,", "nats", "ms", "of", "the", "model"]


def test_amounts_are_those_nearest_to_the_budgets(monkeypatch):
    methods = {"ToMe": [("few", 1), ("more", 2), ("most", 3)], "POMT": [("one", 4)]}
    monkeypatch.setattr(demo, "all_others", lambda model: methods)
    monkeypatch.setattr(demo, "time_in_turn", lambda modules, images, runs: [10.0, 9.0, 7.9, 6.8, 5.0])
    found = demo.find_others(None, torch.zeros(1))
    assert [(one.name, one.budget, one.module) for one in found] == [
        ("more", 0.8, 2), ("most", 0.7, 3), ("one", 0.8, 4), ("one", 0.7, 4),
    ]  # fmt: skip
