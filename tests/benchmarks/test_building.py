"""The benchmark of builds, on a few images."""

import json
from pathlib import Path

import building
import pytest

OPTIONS = ["images", "--model", "test_vit", "--checkpoint", "weights.safetensors", "--words", "20"]


def test_tables(run, monkeypatch):
    monkeypatch.setattr(building, "RUNS", 1)
    status, out, _ = run(building.main, [*OPTIONS, "--results-file", "out"])
    assert status == 0
    tables = json.loads(Path("out.json").read_text())["tables"]
    assert [row["part"] for row in tables["parts"]] == ["decoding, two passes", "clustering", "whole build"]
    assert tables["parts"][2]["share"] == 1
    rows = {(row["metric"], row["backend"]): row for row in tables["clustering"]}
    assert rows.keys() == {(metric, name) for metric in ("euclidean", "cosine") for name in ("sklearn", "faiss")}
    for (metric, backend), row in rows.items():
        assert row["distance_change"] == pytest.approx(row["distance"] / rows[metric, "sklearn"]["distance"] - 1)
        assert backend == "faiss" or row["time_ratio"] == 1
    assert "Parts of a build" in out


def test_memory_of_copies(run):
    Path("scratch").mkdir()
    status, out, _ = run(building.main, [*OPTIONS, "--space", "pixel", "--peak-of", "3", "scratch/peak.zarr"])
    assert status == 0
    row = json.loads(out.splitlines()[-1])
    assert row["images"] == 3 * 7
    assert 0 < row["before"] <= row["gigabytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no_such_model"], "no model 'no_such_model'"),
        (["--words", "0"], "'0' is not a whole number"),
        (["--results-file", "file/out"], "--results-file"),
    ],
)
def test_errors_are_one_line(run, options, message):
    status, _, err = run(building.main, [*OPTIONS, *options])
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("building: ")
    assert message in err
