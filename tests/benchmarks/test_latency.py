"""The benchmark of latency: its arithmetic, its tables on a small random model, and its errors; no time is asserted."""

import csv
import json
import re
from pathlib import Path

import latency
import matching
import numpy as np
import pytest
import scaling
import torch
import torch.nn.functional as F
import training
from variants import Variant

from tests.matrix import matrix
from vwt import Neighbours, PruningSchedule, VWTokenizer
from vwt.errors import ArgumentError

TINY = ["--model", "test_vit", "--random-weights", "--data", "images", "--words-data", "images", "--quiet"]
QUICK = [*TINY, "--images", "4", "--runs", "1", "--words", "20", "--threshold", "0.1"]


def results(name="out"):
    return json.loads(Path(f"{name}.json").read_text())


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no_such_model"], "no model 'no_such_model'"),
        (["--data", "missing"], "no such folder or file: missing"),
        (["--data", "empty"], "no image|Found 0 images"),
        (["--images", "9"], "has 7 images that can be read, 9 were asked for"),
        (["--images", "2", "--batch-size", "3"], "do not fill a batch"),
        (["--batch-size", "0"], "'0' is not a whole number of at least 1"),
        (["--runs", "many"], "'many' is not a whole number"),
        (["--words", "colour:100"], "'colour:100' is neither K nor SPACE:K"),
        (["--words", "pixel:0"], "'0' is not a whole number"),
        (["--words", "701"], "701 words"),
        (["--threshold", "3"], "threshold is 3.0"),
        (["--precision", "int8"], "invalid choice: 'int8'"),
        (["--device", "nowhere"], "no device 'nowhere'"),
        (["--img-size", "33"], "33 pixels are no multiple of the patch, 16"),
        (["--codebook", "missing.zarr"], "missing.zarr"),
        (["--checkpoint", "file"], "exclude each other"),
        (["--results-file", "file/out"], "--results-file"),
        (["--results-file", "empty"], "cannot write empty.json"),
        (["--plot", "plot.txt"], r"expected a \.png"),
        (["--plot", "nowhere/plot.png"], "a folder that exists"),
        (["--plot", "plot.png", "--matching"], "leave out --matching"),
        (["--only", "magic"], "no variant has magic in its name; there are full, "),
        (["--schedule", "file"], "file is damaged or no schedule"),
        (["--colour", "red"], "unrecognized arguments"),
    ],
)
def test_errors_are_one_line(run, options, message):
    status, _, err = run(latency.main, [*QUICK, *options])
    assert status == 2
    assert err.startswith("latency: ")
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert re.search(message, err), err


def test_plot_without_matplotlib(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err = run(latency.main, [*QUICK, "--plot", "plot.png"])
    assert (status, err.count("\n")) == (2, 1)
    assert "pip install 'vwt[plots]'" in err


# -- arithmetic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_exponent(power):
    sizes = [1, 2, 8, 32]
    assert scaling.exponent(sizes, [3.0 * size**power for size in sizes]) == pytest.approx(power, abs=1e-9)


@pytest.mark.parametrize(("counts", "mean"), [([5], 5), ([5, 6], 6), ([5, 5, 6], 5), ([1, 9, 4], 5)])
def test_mean_count(counts, mean):
    assert latency.mean_count(torch.tensor(counts)) == mean


def test_rows():
    seconds = {
        "full": {"actual": np.full((2, 3), 0.010)},
        "fast": {"actual": np.full((2, 3), 0.005), "ideal": np.full((2, 3), 0.004)},
        "peer": {"actual": np.full((2, 3), 0.020)},
    }
    tokens = {"full": 9.0, "fast": 4.0, "peer": 5.0}
    full, fast, peer, other = (
        latency.make_row(Variant(name, "", list, **options), tokens, seconds, 8)
        for name, options in (("full", {}), ("fast", {}), ("peer", {"same_as": "fast"}), ("fast", {"baseline": "peer"}))
    )
    assert full["ratio"] == 1
    assert "efficiency" not in full
    assert fast["ms"] == fast["ms_q1"] == fast["ms_q3"] == pytest.approx(5)
    assert [fast[k] for k in ("tokens", "ratio", "efficiency", "ideal_ms")] == pytest.approx([4, 0.5, 0.8, 4])
    assert fast["images_per_second"] == pytest.approx(8 / 0.005)
    assert "vs_vwt" not in fast
    assert (peer["ratio"], peer["vs_vwt"]) == pytest.approx((2, 4))
    assert other["ratio"] == pytest.approx(0.25)


def test_growth():
    rows = [{"name": n, "x": x, "ms": x**p} for n, p in (("a", 1), ("b", 2)) for x in (1, 4)]
    slopes = scaling.growth([*rows, {"name": "c", "x": 1, "ms": 1}], "x", ("name",), ("ms",))
    assert [(row["name"], round(row["exponent"], 9)) for row in slopes] == [("a", 1), ("b", 2)]


def test_free_tokens(small_vit):
    backbone = VWTokenizer(small_vit).backbone
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        _, tokens, _ = backbone.embed(images)
        subset = latency.free_tokens(backbone, images, 30, torch.Generator().manual_seed(0))
        every = latency.free_tokens(backbone, images, 101, torch.Generator())
        logits, _ = latency.Ideal(small_vit)(images, every)
        torch.testing.assert_close(logits, small_vit(images))
    assert subset.shape == (2, 30, tokens.shape[2])
    torch.testing.assert_close(every, tokens)
    for image, some in zip(tokens, subset, strict=True):
        places = [int((image == token).all(1).nonzero()[0]) for token in some]
        assert places[0] == 0
        assert places == sorted(set(places))


def test_compare_answers():
    directions = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1e-9], [0.0, 1.0]]), dim=-1)
    features = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]])
    expected = matching.brute_force(features, directions, 0.1)
    assert expected.tolist() == [[0, 2, -1]]
    for own, checks in {(0, 2, -1): [3, 2, 0, 0], (1, 2, -1): [3, 2, 1, 0], (0, -1, 2): [3, 2, 2, 2]}.items():
        assert matching.compare(features, directions, 0.1, torch.tensor([own]), expected).tolist() == checks


# -- runs --------------------------------------------------------------------------------------------------------------


def test_table_at_batch_1(run):
    PruningSchedule({2: 50}).save("mine.json")
    options = ["--results-file", "out.json", "--plot", "plot.png", "--topk", "50", "--schedule", "mine.json"]
    status, out, err = run(latency.main, [*QUICK, *options])
    assert (status, err) == (0, "")
    assert re.search("threads, torch .* float32", out.splitlines()[0])
    rows = {row["name"]: row for row in results()["tables"]["latency"]}
    expected = {
        "full": 101, "bfloat16": 101, "random drop 0.4": 61, "IntraImage 0.5": 51, "Neighbours 0.225": 79,
        "Prune(84) in block 3": 101 - 28, "POMT R 84 in block 3": 101 - 28, "Absorb(98) in block 4": 101 - 98 / 6,
        "Neighbours 0.4 + Absorb(0.5) in block 3": 1 + (4 * 60 + 2 * 30) / 6, "schedule mine.json": 76,
        "ToMe r 8": sum(101 - 8 * block for block in range(6)) / 6,
        "top-k, 50 kept in block 3": (4 * 101 + 2 * 51) / 6,
    }  # fmt: skip
    assert {name: rows[name]["tokens"] for name in expected} == pytest.approx(expected)
    for name in (
        "Merge(60) in block 3", "Absorb(120) in block 3", "Absorb(60) in block 3, Absorb(54) in block 6",
    ):  # fmt: skip
        assert rows[name]["note"].startswith("not measured: ")
    assert {row["group"] for row in rows.values() if "vs_vwt" in row} == {"POMT", "padded"}
    assert {row["group"] for row in rows.values() if "ideal_ms" in row} == {"random drop", "VWT paper", "Neighbours"}
    assert all(row["ms_q1"] <= row["ms"] <= row["ms_q3"] for row in rows.values() if "ms" in row)
    assert Path("plot.png").stat().st_size > 1000
    with open("out.csv", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(rows)
    (cached,) = Path("results").glob("embedding-20-*.zarr")
    before = cached.stat().st_mtime_ns
    assert run(latency.main, [*QUICK, "--only", "full"])[0] == 0
    assert cached.stat().st_mtime_ns == before


def test_table_of_ragged_batches(run):
    options = ["--batch-size", "2", "--words", "pixel:20", "--threshold", "0.1", "0.3", "--results-file", "out"]
    status, out, err = run(latency.main, [*QUICK, *options, "--only", "InterImage"])
    assert (status, err) == (0, "")
    rows = {row["name"]: row for row in results()["tables"]["latency"]}
    for name in ("InterImage pixel 20, 0.1", "InterImage pixel 20, 0.3"):
        assert rows[f"{name}, padded and masked"]["tokens"] == rows[name]["tokens"]
        assert rows[f"{name}, padded and masked"]["vs_vwt"] > 0
    assert "vs_vwt" in out


@pytest.mark.parametrize("precision", matrix(["bfloat16", "float16", "amp_bfloat16"], "amp_bfloat16"))
def test_precisions(run, precision):
    options = ["--precision", precision, "--img-size", "96", "--batch-size", "2"]
    status, out, err = run(latency.main, [*QUICK, *options, "--only", "InterImage", "Neighbours 0.4", "top-k"])
    assert (status, err) == (0, "")
    assert precision in out.splitlines()[0]


def test_matching(run):
    options = ["--matching", "--words", "20", "pixel:30", "--threshold", "0.1", "0.2", "--results-file", "out"]
    status, out, err = run(latency.main, [*QUICK, *options])
    assert (status, err) == (0, "")
    rows = results()["tables"]["matching"]
    assert [(row["space"], row["words"], row["threshold"]) for row in rows] == [
        (space, words, threshold) for space, words in (("embedding", 20), ("pixel", 30)) for threshold in (0.1, 0.2)
    ]
    assert all(row["patches"] == 400 and row["beyond_rounding"] == 0 for row in rows)
    assert "speed_up" in out


def test_scaling(run):
    options = ["--scaling", "--sizes", "64", "96", "--words", "20", "40", "--results-file", "out"]
    status, out, err = run(latency.main, [*QUICK, *options])
    assert (status, err) == (0, "")
    tables = results()["tables"]
    assert list(tables) == ["images", "words", "resolution", "exponents"]
    assert sorted({row["images"] for row in tables["images"]}) == [1, 2, 4]
    assert sorted({row["patches"] for row in tables["resolution"]}) == [16, 36]
    assert {(row["of"], row["x"]) for row in tables["exponents"]} == {
        ("ms", "images"),
        ("brute_ms", "words"),
        ("own_ms", "words"),
        ("ms", "patches"),
    }
    assert "Exponents" in out


# -- training steps ----------------------------------------------------------------------------------------------------


def test_a_step_trains_the_full_model_and_leaves_its_weights(small_vit):
    before = {name: value.clone() for name, value in small_vit.state_dict().items()}
    step = training.Step(VWTokenizer(small_vit, Neighbours(0.25)))
    trained = []
    hook = small_vit.blocks[0].attn.qkv.weight.register_post_accumulate_grad_hook(
        lambda w: trained.append(w.grad.any())
    )
    images = torch.randn(3, 3, 160, 160)
    assert step(images) == step(images) > 0
    hook.remove()
    assert trained == [True, True]
    assert all(torch.equal(value, before[name]) for name, value in small_vit.state_dict().items())
    assert small_vit.training


@pytest.mark.parametrize("module", [len, torch.nn.ReLU(), torch.nn.Linear(2, 2).requires_grad_(False)])
def test_what_has_no_weights_is_not_trained(module):
    with pytest.raises(ArgumentError, match="no weights to train"):
        training.Step(module)


def test_a_table_of_training_steps(run):
    options = [*QUICK, "--batch-size", "2", "--training"]
    status, out, err = run(latency.main, [*options, "--only", "Neighbours 0.225", "int8"])
    assert status == 0, err
    assert "Training steps, milliseconds" in out
    for name in ("full", "int8 (torchao, dynamic)", "Neighbours 0.225"):
        assert re.search(rf"^\| {re.escape(name)} +\|", out, re.MULTILINE), out
    status, _, err = run(latency.main, [*options, "--scaling"])
    assert (status, err.count("\n")) == (2, 1)
    assert "--training is another table" in err
