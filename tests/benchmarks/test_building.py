"""The benchmark of builds, on a few images."""

import json
from argparse import Namespace
from pathlib import Path

import building
import pytest

from vwt.codebook.building import run_build
from vwt.codebook.config import BuildReport
from vwt.codebook.engine import Engine
from vwt.models.create import create_model

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


def test_images_a_second_of_each_engine(run, monkeypatch):
    monkeypatch.setattr(building, "RUNS", 1)
    monkeypatch.setattr(building, "ENGINES", [Engine("local", 1)])
    built = []

    def count(*arguments, **options):
        built.append(run_build(*arguments, **options)[1].images)
        return None, BuildReport(images=7)

    monkeypatch.setattr(building, "run_build", count)
    monkeypatch.setattr(building, "timed", lambda call: (10.0 * (1 + len(built)), call()))
    arguments = Namespace(data="images", words=20, space="embedding")
    (row,) = building.measure_engines(arguments, create_model("test_vit", "weights.safetensors"))
    assert built == [7, 21]
    assert row == {"engine": "local", "workers": 1, "images_per_second": pytest.approx(2.8), "start": pytest.approx(5)}


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


def test_clustering_of_many_words(run, monkeypatch):
    monkeypatch.setattr("vwt.codebook.clustering.APPROXIMATE", 50)
    status, *_ = run(building.main, [*OPTIONS, "--many", "50", "--iterations", "3", "--results-file", "out"])
    assert status == 0
    tables = json.loads(Path("out.json").read_text())["tables"]
    assert [(row["iteration"], row["patches"]) for row in tables["many"]] == [(1, 800), (2, 800), (3, 1300)]
    distances = [row["distance"] for row in tables["many"]]
    assert distances == sorted(distances, reverse=True)
    assert list(tables) == ["many"]
