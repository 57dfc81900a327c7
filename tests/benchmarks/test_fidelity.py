"""The benchmark of fidelity: its statistics, its tables on a small random model, its cache, and its errors."""

import csv
import json
import re
from pathlib import Path

import fidelity
import image_cache
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fidelity import Scores, equal_kl, fidelity_rows, latency_columns
from peers import RandomDrop
from safetensors.torch import load_file, save, save_file

import vwt
from tests.holding import held_elsewhere
from tests.matrix import matrix
from vwt.datasets import ImageSource
from vwt.models.create import create_model
from vwt.models.spec import PatchSpec
from vwt.tokens.patches import normalise

CLASSES = ("n01494475", "n03888257")  # of the images of `folder`: ImageNet's 3 and 701
MODEL = ["--model", "test_vit", "--checkpoint", "weights.safetensors", "--data", "images", "--words-data", "images"]
QUICK = [*MODEL, "--words", "20", "--threshold", "0.1", "--images", "2", "--runs", "1", "--quiet"]
SOME = [*QUICK, "--no-latency", "--only", "Neighbours 0.225", "random drop 0.4", "--results-file", "out"]


def rows(run, *options):
    """Rows by name of a run that succeeds."""
    status, _, err = run(fidelity.main, [*SOME, *options])
    assert status == 0, err
    return {row["name"]: row for row in json.loads(Path("out.json").read_text())["tables"]["fidelity"]}


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "missing"], "no such folder or file: missing"),
        (["--data", "empty"], "no image|Found 0 images"),
        (["--limit", "8"], "images has 7 images, 8 were asked for with --limit"),
        (["--limit", "0"], "'0' is not a whole number of at least 1"),
        (["--class-map", "missing.txt"], "no class map at missing.txt"),
        (["--class-map", "file"], "cannot read the data set images"),
        (["--class-map", "long.txt"], "long.txt has 1001 classes, the model has 1000"),
        (["--workers", "-1"], "workers is -1"),
        (["--runtime", "onnxruntime"], "--runtime measures latency; leave out --no-latency and --operators"),
        (["--runtime", "torch"], "argument --runtime: invalid choice: 'torch'"),
        (["--cache", "file"], "cannot write to file: .*; choose another --cache"),
    ],
)
def test_errors_are_one_line(run, options, message):
    Path("long.txt").write_text("\n".join([*CLASSES, *map(str, range(999))]))
    status, _, err = run(fidelity.main, [*SOME, *options])
    assert status == 2
    assert err.startswith("fidelity: ")
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert re.search(message, err), err


def test_latency_needs_as_many_images_as_it_asks_for(run):
    status, _, err = run(fidelity.main, [*QUICK, "--images", "8"])
    assert (status, err.count("\n")) == (2, 1)
    assert "images has 7 images that can be read, 8 were asked for with --images" in err


def test_equal_kl():
    names = ["full", "ours", "worse", "peer", "good peer"]
    kl = np.array([[0, 0], [0.1, 0.3], [0.4, 0.8], [0.2, 0.4], [0.0, 0.1]]).T
    scores = Scores(names, kl, np.ones((2, 5)), None, np.array([[10, 6, 3, 8, 9]] * 2))
    groups = ["full", "schedule", "schedule", "ToMe", "ToMe"]
    table = [row | {"group": group} for row, group in zip(fidelity_rows(scores, 0), groups, strict=True)]
    noted = {"name": "other", "group": "ToMe", "note": "not measured"}
    (row,) = equal_kl([*table, noted], scores, {}, 0)
    assert (row["peer"], row["vwt"]) == ("peer", "ours")
    assert (row["kl"], row["vwt_kl"]) == pytest.approx((0.3, 0.2))
    assert (row["kl_change_low"], row["kl_change_high"]) == pytest.approx((-0.1, -0.1))
    assert row["tokens"] == 0.75
    assert "latency" not in row
    seconds = {name: np.full((2, 1), value) for name, value in zip(names, (4.0, 3.0, 1.0, 2.0, 4.0), strict=True)}
    table = [row | latency_columns(seconds[row["name"]], seconds["full"], 0) for row in table]
    (row,) = equal_kl(table, scores, seconds, 0)
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


def test_figures_are_those_of_the_models(run):
    found = rows(run)
    model = create_model("test_vit", "weights.safetensors")
    fast = vwt.VWTokenizer(model, vwt.Neighbours(0.225))
    spec = PatchSpec.of(model)
    images = torch.cat([batch.images for batch in ImageSource("images", model).batches(8)])
    labels = torch.tensor([3] * 4 + [701] * 3)
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


def test_class_map_gives_labels_and_leaves_other_classes_out(run):
    model = create_model("test_vit", "weights.safetensors")
    spec = PatchSpec.of(model)
    [batch] = ImageSource(f"images/{CLASSES[0]}", model).batches(9)
    with torch.inference_mode():
        best = model(normalise(batch.images, spec.mean, spec.std)).argmax(1)
    names = [str(index) for index in range(1000)]
    names[int(best[0])] = CLASSES[0]
    Path("map.txt").write_text("\n".join(names))
    status, out, _ = run(fidelity.main, [*SOME, "--class-map", "map.txt"])
    assert status == 0
    assert "4 images of images (3 of classes that map.txt does not have left out)" in out
    full = json.loads(Path("out.json").read_text())["tables"]["fidelity"][0]
    assert full["top1"] == pytest.approx(float((best == best[0]).float().mean()))


def test_no_labels_no_top1(run, folder):
    (folder / "images" / CLASSES[0]).rename(folder / "images" / "dogs")
    status, out, _ = run(fidelity.main, SOME)
    assert status == 0
    assert out.count("no top-1") == 1
    assert "top1" not in out.split("no top-1", 1)[1]
    assert all("top1" not in row for row in rows(run).values())


def test_limit_is_a_seeded_sample(run):
    one, again, other = (rows(run, "--limit", "4", "--seed", seed)["random drop 0.4"] for seed in ("0", "0", "1"))
    assert one == again
    assert one["kl"] != other["kl"]


def test_batch_size_does_not_matter(run):
    one, other = (rows(run, "--batch-size", size)["random drop 0.4"] for size in ("1", "3"))
    for figure in ("kl", "kl_low", "kl_high", "agreement", "top1_change", "tokens"):
        assert one[figure] == pytest.approx(other[figure], rel=1e-3), figure


def test_unreadable_images_are_named(run, folder):
    (folder / "images" / CLASSES[1] / "003.jpg").write_bytes(b"")
    status, _, err = run(fidelity.main, SOME)
    assert status == 0
    assert err == f"fidelity: left out 1 that cannot be read: {CLASSES[1]}/003.jpg (not an image, or empty)\n"
    assert json.loads(Path("out.json").read_text())["images"] == 6


def scored(monkeypatch, stop_at=0):
    """Sizes of the batches that are scored, as they come; batch `stop_at` is where Ctrl-C is pressed."""
    batches, score = [], fidelity.score

    def spy(bench, modules, images):
        batches.append(len(images))
        if len(batches) == stop_at:
            raise KeyboardInterrupt
        return score(bench, modules, images)

    monkeypatch.setattr(fidelity, "score", spy)
    return batches


def interrupt(run, monkeypatch, *options):
    """A run in batches of two that is interrupted in its third, and the file that it leaves."""
    with monkeypatch.context() as patch:
        scored(patch, stop_at=3)
        status, _, err = run(fidelity.main, [*SOME, "--batch-size", "2", *options])
    assert status == 130
    assert err == "\nfidelity: interrupted; the same command goes on with what is kept in --cache\n"
    (kept,) = Path("results").glob("scores-*")
    return kept


def test_interrupted_run_goes_on(run, monkeypatch, folder):
    (folder / "images" / CLASSES[0] / "002.jpg").write_bytes(b"")
    options = ["--batch-size", "2", "--only", "InterImage", "random drop 0.4", "--limit", "7"]
    status, table, _ = run(fidelity.main, [*SOME, *options])
    assert status == 0
    whole = Path("out.json").read_bytes()
    Path("out.json").unlink()
    kept = interrupt(run, monkeypatch, *options)
    assert not Path("out.json").exists()
    batches = scored(monkeypatch)
    status, again, err = run(fidelity.main, [*SOME, *options])
    assert (status, again, Path("out.json").read_bytes()) == (0, table, whole)
    assert "left out 1 that cannot be read" in err
    assert batches == [2, 1]
    assert not kept.exists()


def test_interrupted_latency_keeps_all_scores(run, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    options = ["--batch-size", "4", "--only", "random drop 0.4"]
    batches = scored(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "measure_latency", stop)
        assert run(fidelity.main, [*QUICK, *options])[0] == 130
    assert run(fidelity.main, [*QUICK, *options])[0] == 0
    assert batches == [4, 3]


OTHERS = [
    ["--seed", "3"],
    ["--batch-size", "3"],
    ["--limit", "5"],
    ["--only", "random drop 0.4"],
    ["--precision", "bfloat16"],
    ["--checkpoint", "other.safetensors"],
    ["--only", "from.json"],
]


@pytest.mark.parametrize("options", matrix(OTHERS, ["--limit", "5"], ["--only", "from.json"]))
def test_interrupted_run_of_other_options_is_not_taken(run, monkeypatch, options):
    vwt.PruningSchedule({2: 10}).save("from.json")
    own = ["--only", "from.json", "--schedule", "from.json"] if options[-1] == "from.json" else []
    kept = interrupt(run, monkeypatch, *own)
    weights = load_file("weights.safetensors")
    save_file({name: 1.5 * weight for name, weight in weights.items()}, "other.safetensors")
    vwt.PruningSchedule({2: 11}).save("from.json")
    batches = scored(monkeypatch)
    rows(run, "--batch-size", "2", *own, *options)
    assert sum(batches) == (5 if "--limit" in options else 7)
    assert kept.exists(), "the interrupted run can still go on"


@pytest.mark.parametrize("changed", matrix(["tokenizer.py", "tokens/words.py"], "tokens/words.py"))
def test_interrupted_run_of_other_code_is_not_taken(run, monkeypatch, changed):
    interrupt(run, monkeypatch)
    batches, read, path_of = scored(monkeypatch), Path.read_bytes, Path(vwt.__file__).parent / changed
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path == path_of))
    rows(run, "--batch-size", "2")
    assert len(batches) == 4


def test_changed_pictures_are_scored_again(run, monkeypatch, folder):
    interrupt(run, monkeypatch)
    path = folder / "images" / CLASSES[0] / "000.jpg"
    path.write_bytes((folder / "images" / CLASSES[1] / "005.jpg").read_bytes())  # the same name, another picture
    batches = scored(monkeypatch)
    found = rows(run, "--batch-size", "2")
    assert batches == [2, 2], "the first batch and the third; the last picture is the first by now"
    assert found == rows(run, "--batch-size", "2")


@pytest.mark.parametrize("damage", matrix(["short", "empty", "other"], "short"))
def test_damaged_cache_is_made_anew(run, monkeypatch, damage):
    kept = interrupt(run, monkeypatch)
    other = save({"weight": torch.ones(3)})
    kept.write_bytes({"short": kept.read_bytes()[:-9], "empty": b"", "other": other}[damage])
    batches = scored(monkeypatch)
    status, _, err = run(fidelity.main, [*SOME, "--batch-size", "2"])
    assert (status, err.count("\n")) == (0, 1)
    assert re.match(rf"fidelity: {kept} is damaged \(.+\) and is made anew\n", err)
    assert len(batches) == 4


def test_a_second_run_is_told_who_holds_the_cache(run, monkeypatch):
    kept = interrupt(run, monkeypatch)
    before = kept.read_bytes()
    with held_elsewhere(kept.with_name(f"{kept.name}.lock")) as other:
        status, _, err = run(fidelity.main, [*SOME, "--batch-size", "2"])
    assert (status, err.count("\n")) == (2, 1)
    assert f"fidelity: {kept} is held by process {other.pid} on " in err
    assert kept.read_bytes() == before
    rows(run, "--batch-size", "2")
    assert not list(kept.parent.glob("scores-*"))


def test_long_run_is_written_as_it_goes(run, monkeypatch):
    """Killed without a chance to write, it has what there was."""
    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "EVERY", 0)
        scored(patch, stop_at=3)
        save, writes = image_cache.ImageCache.save, []

        def die_after_two_batches(cache):
            writes.append(cache.path.name)
            if len(writes) <= 2:
                save(cache)

        patch.setattr(image_cache.ImageCache, "save", die_after_two_batches)
        assert run(fidelity.main, [*SOME, "--batch-size", "2"])[0] == 130
    batches = scored(monkeypatch)
    rows(run, "--batch-size", "2")
    assert batches == [2, 1]


def test_full_disk_is_one_line(run, monkeypatch):
    def refuse(*_):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(image_cache, "save_file", refuse)
    status, _, err = run(fidelity.main, SOME)
    assert (status, err.count("\n")) == (2, 1)
    assert "no space left on device; choose another --cache" in err
    assert not list(Path("results").glob(".*"))


def test_whole_table(run):
    vwt.PruningSchedule({2: vwt.Merge(10)}).save("mine.json")
    options = ["--schedule", "mine.json", "--results-file", "out", "--plot", "plot.png", "--topk", "50"]
    status, out, err = run(fidelity.main, [*QUICK, *options])
    assert (status, err) == (0, "")
    tables = json.loads(Path("out.json").read_text())["tables"]
    found = {row["name"]: row for row in tables["fidelity"]}
    groups = list(dict.fromkeys(row["group"] for row in found.values()))
    assert groups == [
        "full", "quantised", "random drop", "VWT paper", "padded", "Neighbours", "schedule", "strategy + schedule",
        "from files", "ToMe", "ATC", "top-k", "POMT", "DiffRate", "PPT", "PiToMe",
    ]  # fmt: skip
    assert found["Neighbours 0.4"]["tokens"] == 61
    assert found["Neighbours 0.4 + Absorb(0.5) in block 3"]["tokens"] == 1 + (4 * 60 + 2 * 30) / 6
    assert found["schedule mine.json"]["tokens"] == 1 + (3 * 100 + 3 * 90) / 6
    for removed in (28, 56, 84):
        own, paper = found[f"Prune({removed}) in block 3"], found[f"POMT R {removed} in block 3"]
        tokens = 1 + (4 * 100 + 2 * (100 - removed)) / 6
        assert (own["tokens"], paper["tokens"]) == pytest.approx((tokens, tokens))
        assert own["kl"] == pytest.approx(paper["kl"], abs=1e-5)
    measured = [row for row in found.values() if "note" not in row]
    assert len(found) - len(measured) == 13 + 3 + 2  # of a model so small, of DiffRate's rates, and of PPT's block 9
    for row in measured:
        assert row["kl_low"] <= row["kl"] + 1e-12
        assert row["kl"] <= row["kl_high"] + 1e-12
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["ms"] > 0
        assert row["throughput"] > 0
    assert found["Neighbours 0.4"]["gmacs"] < found["Neighbours 0.15"]["gmacs"] < found["full"]["gmacs"]
    assert found["full"]["front"].startswith("tokens")
    assert {row["peer"] for row in tables["equal_kl"]} <= set(found)
    assert all(row["vwt_kl"] <= row["kl"] and row["latency"] > 0 for row in tables["equal_kl"])
    assert Path("plot.png").stat().st_size > 1000
    with open("out.csv", newline="") as file:
        assert sum(row["table"] == "fidelity" for row in csv.DictReader(file)) == len(found)
    header = out.split("\nFidelity\n")[1].splitlines()[0]
    assert re.findall(r"\w+", header) == [name for name in fidelity.COLUMNS if name not in fidelity.OTHER_RUNTIMES]
