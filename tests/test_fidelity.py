"""The benchmark of fidelity: its statistics, its tables on a small random model, its cache, and its errors."""

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_datasets import write_images

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import answers
import fidelity
import fidelity_tables
from fidelity_tables import Scores, bootstrap, equal_kl, interval, pareto, ratio_interval
from peers import RandomDrop

import vwt
from vwt.backbones import create_model
from vwt.datasets import ImageSource
from vwt.patches import PatchSpec, normalise

SYNSETS = answers.SYNSETS.read_text().split()
CLASSES = (SYNSETS[3], SYNSETS[700])
MODEL = ["--model", "test_vit", "--checkpoint", "weights.safetensors"]
QUICK = [
    *MODEL,
    "--data",
    "images",
    "--words-data",
    "images",
    "--words",
    "20",
    "--images",
    "2",
    "--runs",
    "1",
    "--quiet",
]
SOME = [*QUICK, "--no-latency", "--only", "Neighbours 0.225", "random drop 0.4", "--results-file", "out"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with a few images of two of ImageNet's classes, and the weights of a model of all of them."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", 7, CLASSES)
    torch.manual_seed(0)
    model = timm.create_model("test_vit")
    model.head.weight.data *= 30  # answers that differ from image to image
    save_file(model.state_dict(), "weights.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("file")
    return tmp_path


def run(capsys, arguments):
    """Exit status, stdout and stderr, and nothing raised but what argparse raises."""
    try:
        status = fidelity.main(arguments)
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def rows(capsys, *options, table="fidelity"):
    """Rows by name of a run that succeeds."""
    status, _, err = run(capsys, [*SOME, *options])
    assert status == 0, err
    return {row.get("name", row.get("peer")): row for row in json.loads(Path("out.json").read_text())["tables"][table]}


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no_such_model"], "no model 'no_such_model'"),
        (["--data", "missing"], "no such folder or file: missing"),
        (["--data", "empty"], "no image|Found 0 images"),
        (["--limit", "8"], "images has 7 images, 8 were asked for with --limit"),
        (["--limit", "0"], "'0' is not a whole number of at least 1"),
        (["--batch-size", "many"], "'many' is not a whole number"),
        (["--class-map", "missing.txt"], "no class map at missing.txt"),
        (["--class-map", "file"], "cannot read the data set images"),
        (["--class-map", "long.txt"], "long.txt has 1001 classes, the model has 1000"),
        (["--workers", "-1"], "workers is -1"),
        (["--threshold", "3"], "threshold is 3.0"),
        (["--only", "magic"], "no variant has magic in its name; there are random drop 0.15, "),
        (["--schedule", "file"], "file is damaged or no schedule"),
        (["--schedule", "late.json"], "the schedule names block 9"),
        (["--cache", "file"], "cannot write to file: .*; choose another --cache"),
        (["--device", "nowhere"], "no device 'nowhere'"),
        (["--results-file", "file/out"], "--results-file"),
        (["--plot", "plot.txt"], r"expected a \.png"),
        (["--colour", "red"], "unrecognized arguments"),
    ],
)
def test_errors_are_one_line(capsys, options, message):
    Path("long.txt").write_text("\n".join([*CLASSES, *map(str, range(999))]))
    vwt.PruningSchedule({9: 1}).save("late.json")
    status, _, err = run(capsys, [*SOME, *options])
    assert status == 2
    assert err.startswith("fidelity: ")
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert re.search(message, err), err


def test_latency_needs_as_many_images_as_it_asks_for(capsys):
    status, _, err = run(capsys, [*QUICK, "--images", "8"])
    assert (status, err.count("\n")) == (2, 1)
    assert "images has 7 images that can be read, 8 were asked for with --images" in err


def test_models_that_peers_do_not_know(capsys):
    options = ["--model", "test_vit4", "--random-weights", "--data", "images", "--words-data", "images", "--quiet"]
    options += ["--words", "20", "--no-latency", "--only", "Neighbours 0.4"]
    status, _, err = run(capsys, options)
    assert (status, err.count("\n")) == (2, 1)
    assert "--no-peers" in err
    assert run(capsys, [*options, "--no-peers"])[0] == 0


# -- statistics --------------------------------------------------------------------------------------------------------


def test_bootstrap_has_the_spread_of_a_mean():
    values = np.random.default_rng(0).normal(3, 2, (400, 1))
    means = bootstrap(values, resamples=4000)
    assert means.shape == (4000, 1)
    assert means.mean() == pytest.approx(values.mean(), abs=0.01)
    assert means.std() == pytest.approx(values.std() / 20, rel=0.05)
    low, high = interval(means)
    assert (values.mean() - low[0], high[0] - values.mean()) == pytest.approx([1.96 * values.std() / 20] * 2, rel=0.1)


def test_bootstrap_is_paired_seeded_and_the_same_in_pieces(monkeypatch):
    values = np.random.default_rng(0).random((50, 1))
    pair = np.concatenate([values, values + 0.25], axis=1)
    means = bootstrap(pair, resamples=300)
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 0.25)
    assert means[:, 0].std() > 0.01
    assert not np.array_equal(means, bootstrap(pair, seed=1, resamples=300))
    monkeypatch.setattr(fidelity_tables, "CHUNK", 350)
    np.testing.assert_allclose(bootstrap(pair, resamples=300), means)


def test_interval():
    low, high = interval(np.stack([np.arange(1001.0), np.full(1001, 7.0)], axis=1))
    assert low.tolist() == pytest.approx([25, 7])
    assert high.tolist() == pytest.approx([975, 7])


def test_ratio_interval():
    full = np.full((30, 3), 2.0)
    assert ratio_interval(full / 2, full) == (0.5, 0.5)
    halves = np.where(np.arange(30)[:, None] % 2, 1.0, 3.0) * np.ones((1, 3))
    low, high = ratio_interval(halves, full)
    assert (low, high) == (0.5, 1.5)


def test_pareto():
    points = {"a": (1, 5.0), "b": (2, 6.0), "c": (3, 2.0), "d": (3, 4.0), "e": (9, 2.0), "f": (10, 1.0)}
    table = [{"name": name, "tokens": tokens, "kl": kl} for name, (tokens, kl) in points.items()]
    assert "".join(row["name"] for row in pareto([*table[::-1], {"name": "g", "kl": 0.0}], "tokens")) == "acf"


def test_equal_kl():
    def make(kl, tokens):
        return Scores(np.array(kl), np.ones(2), None, np.full(2, tokens))

    scores = {"full": make([0, 0], 10), "ours": make([0.1, 0.3], 6), "worse": make([0.4, 0.8], 3)}
    scores |= {"peer": make([0.2, 0.4], 8), "good peer": make([0.0, 0.1], 9)}
    families = {name: "ToMe" if "peer" in name else "own" for name in scores}
    table = fidelity_tables.fidelity_rows(scores, families, 0)
    (row,) = equal_kl(table, scores, {}, ["ToMe"], 0)
    assert (row["peer"], row["vwt"], row["kl"], row["vwt_kl"]) == (
        "peer",
        "ours",
        pytest.approx(0.3),
        pytest.approx(0.2),
    )
    assert (row["kl_change_low"], row["kl_change_high"]) == pytest.approx((-0.1, -0.1))
    assert row["tokens"] == 0.75
    assert "latency" not in row
    seconds = {name: np.full((2, 1), value) for name, value in zip(scores, (4.0, 3.0, 1.0, 2.0, 4.0), strict=True)}
    fidelity_tables.add_latency(table, seconds, 0)
    (row,) = equal_kl(table, scores, seconds, ["ToMe"], 0)
    assert (row["latency"], row["latency_low"], row["latency_high"]) == (1.5, 1.5, 1.5)


# -- random drop -------------------------------------------------------------------------------------------------------


def test_random_drop(small_vit):
    images = torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    fast = vwt.VWTokenizer(small_vit, RandomDrop(0.33))
    words = fast.tokenize(images)
    assert words.counts.tolist() == [67] * 3
    assert words.group.amax() == 66
    torch.testing.assert_close(words.weight.sum(dim=1), torch.full((3,), 67.0))
    alone = torch.cat([fast.tokenize(image[None]).kept for image in images])
    assert torch.equal(words.kept, alone)
    assert len({tuple(kept.tolist()) for kept in words.kept}) == 3
    other = vwt.VWTokenizer(small_vit, RandomDrop(0.33, seed=1)).tokenize(images).kept
    assert not any(torch.equal(one, two) for one, two in zip(words.kept, other, strict=True))
    with pytest.raises(vwt.errors.ArgumentError, match="drop is 1"):
        RandomDrop(1)


# -- runs --------------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_models(capsys):
    found = rows(capsys)
    model = create_model("test_vit", "weights.safetensors")
    fast = vwt.VWTokenizer(model, vwt.Neighbours(0.225))
    spec = PatchSpec.of(model)
    images = torch.cat([batch.images for batch in ImageSource("images", model).batches(8)])
    labels = torch.tensor([3] * 4 + [700] * 3)
    with torch.inference_mode():
        full, reduced = (module(normalise(images, spec.mean, spec.std)) for module in (model, fast))
    kl = F.kl_div(reduced.log_softmax(-1), full.softmax(-1), reduction="none").sum(1)
    row = found["Neighbours 0.225"]
    assert float(kl.mean()) > 0.001
    assert row["kl"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert row["kl_low"] < row["kl"] < row["kl_high"]
    assert row["agreement"] == pytest.approx(float((full.argmax(1) == reduced.argmax(1)).float().mean()))
    right = [float((logits.argmax(1) == labels).float().mean()) for logits in (full, reduced)]
    assert (found["full"]["top1"], row["top1"]) == pytest.approx(right)
    assert row["top1_change"] == pytest.approx(right[1] - right[0])
    assert row["tokens"] == 1 + 100 - 22
    full_row = {name: found["full"][name] for name in ("kl", "agreement", "tokens", "top1_change")}
    assert full_row == {"kl": 0, "agreement": 1, "tokens": 101, "top1_change": 0}
    assert list(found) == ["full", "random drop 0.4", "Neighbours 0.225", *list(found)[3:]]
    assert all(name.startswith("Neighbours 0.225 + Absorb") for name in list(found)[3:])


def test_class_map_gives_labels_and_leaves_other_classes_out(capsys):
    model = create_model("test_vit", "weights.safetensors")
    spec = PatchSpec.of(model)
    [batch] = ImageSource(f"images/{CLASSES[0]}", model).batches(9)
    with torch.inference_mode():
        best = model(normalise(batch.images, spec.mean, spec.std)).argmax(1)
    names = [str(index) for index in range(1000)]
    names[int(best[0])] = CLASSES[0]
    Path("map.txt").write_text("\n".join(names))
    status, out, _ = run(capsys, [*SOME, "--class-map", "map.txt"])
    assert status == 0
    assert "4 images of images (3 of classes that map.txt does not have left out)" in out
    full = json.loads(Path("out.json").read_text())["tables"]["fidelity"][0]
    assert full["top1"] == pytest.approx(float((best == best[0]).float().mean()))


def test_no_labels_no_top1(capsys, folder):
    (folder / "images" / CLASSES[0]).rename(folder / "images" / "dogs")
    status, out, _ = run(capsys, SOME)
    assert status == 0
    assert "no top-1" in out
    assert "top1" not in out.split("no top-1", 1)[1]
    assert all("top1" not in row for row in rows(capsys).values())


def test_limit_is_a_seeded_sample(capsys):
    one, again, other = (rows(capsys, "--limit", "4", "--seed", seed)["random drop 0.4"] for seed in ("0", "0", "1"))
    assert one == again
    assert one["kl"] != other["kl"]


def test_batch_size_does_not_matter(capsys):
    one, other = (rows(capsys, "--batch-size", size)["random drop 0.4"] for size in ("1", "3"))
    for figure in ("kl", "kl_low", "kl_high", "agreement", "top1_change", "tokens"):
        assert one[figure] == pytest.approx(other[figure], rel=1e-3), figure


def test_unreadable_images_are_named(capsys, folder):
    (folder / "images" / CLASSES[1] / "003.jpg").write_bytes(b"")
    status, _, err = run(capsys, SOME)
    assert status == 0
    assert err == f"fidelity: left out 1 that cannot be read: {CLASSES[1]}/003.jpg (not an image, or empty)\n"
    assert json.loads(Path("out.json").read_text())["images"] == 6


def asked(monkeypatch):
    """Batches that the full model was asked, as they come."""
    sizes, ask = [], answers.FullAnswers.__call__

    def count(self, images, question):
        return ask(self, images, lambda: sizes.append(len(images)) or question())

    monkeypatch.setattr(answers.FullAnswers, "__call__", count)
    return sizes


def test_full_model_is_asked_once(capsys, monkeypatch, folder):
    sizes = asked(monkeypatch)
    first = rows(capsys, "--batch-size", "4")
    assert sizes == [4, 3]
    assert rows(capsys, "--batch-size", "4") == first
    assert sizes == [4, 3]
    (cached,) = Path("results").glob("full-test_vit*.safetensors")
    assert load_file(cached)["logits"].shape == (7, 1000)
    path = folder / "images" / CLASSES[0] / "000.jpg"
    path.write_bytes((folder / "images" / CLASSES[1] / "001.jpg").read_bytes())  # the same name, another picture
    assert rows(capsys, "--batch-size", "4") != first
    assert sizes == [4, 3], "both pictures are known"
    weights = load_file("weights.safetensors")
    save_file({name: 1.5 * weight for name, weight in weights.items()}, "weights.safetensors")
    rows(capsys, "--batch-size", "4")
    assert sizes == [4, 3, 4, 3]


def test_interrupted_run_keeps_answers(capsys, monkeypatch):
    sizes = asked(monkeypatch)
    score, calls = fidelity.score, []

    def stop_at_third(*rest):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "score", stop_at_third)
        status, _, err = run(capsys, [*SOME, "--batch-size", "2"])
    assert status == 130
    assert err.count("\n") <= 2
    assert "answers so far are kept" in err
    assert sizes == [2, 2]
    rows(capsys, "--batch-size", "2")
    assert sizes == [2, 2, 2, 1]


def test_damaged_cache_is_one_line(capsys):
    rows(capsys)
    (cached,) = Path("results").glob("full-*.safetensors")
    cached.write_bytes(b"nothing")
    status, _, err = run(capsys, SOME)
    assert (status, err.count("\n")) == (2, 1)
    assert f"{cached} holds no answers" in err
    assert "remove it" in err


def test_whole_table(capsys):
    vwt.PruningSchedule({2: vwt.Merge(10)}).save("mine.json")
    options = ["--schedule", "mine.json", "--results-file", "out", "--plot", "plot.png", "--topk", "50"]
    status, out, err = run(capsys, [*QUICK, *options])
    assert (status, err) == (0, "")
    tables = json.loads(Path("out.json").read_text())["tables"]
    found = {row["name"]: row for row in tables["fidelity"]}
    families = list(dict.fromkeys(row["family"] for row in found.values()))
    assert families == [
        "full", "random drop", "VWT paper", "Neighbours", "Neighbours + merge", "schedule", "from files", "ToMe",
        "top-k", "POMT, the paper's way",
    ]  # fmt: skip
    assert found["Neighbours 0.4"]["tokens"] == 61
    assert found["Neighbours 0.4 + Absorb(0.5) in block 3"]["tokens"] == 1 + (4 * 60 + 2 * 30) / 6
    assert found["schedule mine.json"]["tokens"] == 1 + (3 * 100 + 3 * 90) / 6
    for removed in (28, 56, 84):
        own, paper = found[f"Prune({removed}) in block 3"], found[f"POMT R {removed} in block 3"]
        tokens = 1 + (4 * 100 + 2 * (100 - removed)) / 6
        assert (own["tokens"], paper["tokens"]) == pytest.approx((tokens, tokens))
        assert own["kl"] == pytest.approx(paper["kl"], abs=1e-5)
    for row in found.values():
        assert row["kl_low"] <= row["kl"] + 1e-12
        assert row["kl"] <= row["kl_high"] + 1e-12
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["ms"] > 0
    assert found["full"]["front"] == "tokens latency"
    assert {row["peer"] for row in tables["equal_kl"]} <= set(found)
    assert all(row["vwt_kl"] <= row["kl"] and row["latency"] > 0 for row in tables["equal_kl"])
    assert Path("plot.png").stat().st_size > 1000
    with open("out.csv", newline="") as file:
        assert sum(row["table"] == "fidelity" for row in csv.DictReader(file)) == len(found)
    header = out.split("\nFidelity\n")[1].splitlines()[0]
    assert re.findall(r"\w+", header) == [*fidelity_tables.COLUMNS]
