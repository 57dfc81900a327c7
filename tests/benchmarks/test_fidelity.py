"""The benchmark of fidelity: its statistics, its tables on a small random model, its cache, and its errors."""

import csv
import json
import re
from pathlib import Path

import answers
import fidelity
import fidelity_tables
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from fidelity_tables import Scores, bootstrap, equal_kl, interval, pareto, ratio_interval
from peers import RandomDrop
from safetensors.torch import load_file, save, save_file

import vwt
from tests.test_datasets import write_images
from vwt.datasets import ImageSource
from vwt.models.create import create_model
from vwt.models.spec import PatchSpec
from vwt.tokens.patches import normalise

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
    sizes, ask = [], answers.ImageCache.__call__

    def count(self, images, question):
        noted = (lambda: sizes.append(len(images)) or question()) if self.path.name.startswith("full") else question
        return ask(self, images, noted)

    monkeypatch.setattr(answers.ImageCache, "__call__", count)
    return sizes


def test_full_model_is_asked_once(capsys, monkeypatch, folder):
    sizes = asked(monkeypatch)
    first = rows(capsys, "--batch-size", "4")
    assert sizes == [4, 3]
    assert rows(capsys, "--batch-size", "4") == first
    assert sizes == [4, 3]
    (cached,) = Path("results").glob("full-test_vit*.safetensors")
    assert load_file(cached)["values"].shape == (7, 1000)
    path = folder / "images" / CLASSES[0] / "000.jpg"
    path.write_bytes((folder / "images" / CLASSES[1] / "001.jpg").read_bytes())  # the same name, another picture
    assert rows(capsys, "--batch-size", "4") != first
    assert sizes == [4, 3], "both pictures are known"
    weights = load_file("weights.safetensors")
    save_file({name: 1.5 * weight for name, weight in weights.items()}, "weights.safetensors")
    rows(capsys, "--batch-size", "4")
    assert sizes == [4, 3, 4, 3]


def scored(monkeypatch, stop_at=0):
    """Indices of the images that are scored, as they come; batch `stop_at` is where Ctrl-C is pressed."""
    indices, score = [], fidelity.score

    def spy(bench, variants, batch, known):
        indices.append(batch.indices)
        if len(indices) == stop_at:
            raise KeyboardInterrupt
        return score(bench, variants, batch, known)

    monkeypatch.setattr(fidelity, "score", spy)
    return indices


def interrupt(capsys, monkeypatch, *options):
    """A run in batches of two that is interrupted in its third, and the file that it leaves."""
    with monkeypatch.context() as patch:
        scored(patch, stop_at=3)
        status, _, err = run(capsys, [*SOME, "--batch-size", "2", *options])
    assert status == 130
    assert err == "\nfidelity: interrupted; the same command goes on with what is kept in --cache\n"
    (kept,) = Path("results").glob("scores-*")
    return kept


def test_interrupted_run_goes_on(capsys, monkeypatch, folder):
    (folder / "images" / CLASSES[0] / "002.jpg").write_bytes(b"")
    options = ["--batch-size", "2", "--only", "InterImage", "random drop 0.4", "--limit", "7"]
    status, table, _ = run(capsys, [*SOME, *options])
    assert status == 0
    whole = Path("out.json").read_bytes()
    for path in (Path("out.json"), *Path("results").glob("full-*")):
        path.unlink()
    kept = interrupt(capsys, monkeypatch, *options)
    assert not Path("out.json").exists()
    indices, sizes = scored(monkeypatch), asked(monkeypatch)
    status, again, err = run(capsys, [*SOME, *options])
    assert (status, again, Path("out.json").read_bytes()) == (0, table, whole)
    assert "left out 1 that cannot be read" in err
    assert (indices, sizes) == ([[4, 5], [6]], [2, 1])
    assert not kept.exists()


def test_interrupted_latency_keeps_all_scores(capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    options = ["--batch-size", "4", "--only", "random drop 0.4"]
    indices = scored(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "measure_latency", stop)
        assert run(capsys, [*QUICK, *options])[0] == 130
    assert run(capsys, [*QUICK, *options])[0] == 0
    assert indices == [[0, 1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    "options",
    [
        ["--seed", "3"],
        ["--batch-size", "3"],
        ["--limit", "5"],
        ["--only", "random drop 0.4"],
        ["--precision", "bfloat16"],
        ["--checkpoint", "other.safetensors"],
        ["--only", "from.json"],
    ],
)
def test_interrupted_run_of_other_options_is_not_taken(capsys, monkeypatch, options):
    vwt.PruningSchedule({2: 10}).save("from.json")
    own = ["--only", "from.json", "--schedule", "from.json"] if options[-1] == "from.json" else []
    kept = interrupt(capsys, monkeypatch, *own)
    weights = load_file("weights.safetensors")
    save_file({name: 1.5 * weight for name, weight in weights.items()}, "other.safetensors")
    vwt.PruningSchedule({2: 11}).save("from.json")
    indices = scored(monkeypatch)
    rows(capsys, "--batch-size", "2", *own, *options)
    assert sum(map(len, indices)) == (5 if "--limit" in options else 7)
    assert kept.exists(), "the interrupted run can still go on"


def test_interrupted_run_of_other_code_is_not_taken(capsys, monkeypatch):
    interrupt(capsys, monkeypatch)
    indices, read = scored(monkeypatch), Path.read_bytes
    changed = Path(vwt.__file__).with_name("tokenizer.py")
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path == changed))
    rows(capsys, "--batch-size", "2")
    assert len(indices) == 4


def test_changed_pictures_are_scored_again(capsys, monkeypatch, folder):
    interrupt(capsys, monkeypatch)
    path = folder / "images" / CLASSES[0] / "000.jpg"
    path.write_bytes((folder / "images" / CLASSES[1] / "005.jpg").read_bytes())  # the same name, another picture
    indices = scored(monkeypatch)
    found = rows(capsys, "--batch-size", "2")
    assert indices == [[0, 1], [4, 5]], "the last picture is the first by now"
    assert found == rows(capsys, "--batch-size", "2")


@pytest.mark.parametrize("damage", ["short", "flipped", "empty", "other", "bare"])
@pytest.mark.parametrize("which", ["scores", "full"])
def test_damaged_cache_is_made_anew(capsys, monkeypatch, which, damage):
    whole = rows(capsys, "--batch-size", "2")
    interrupt(capsys, monkeypatch)
    (kept,) = Path("results").glob(f"{which}-*")
    content = bytearray(kept.read_bytes())
    content[-3] ^= 1
    kept.write_bytes(
        {
            "short": content[:-9],
            "flipped": content,
            "empty": b"",
            "other": save({"weight": torch.ones(3)}),
            "bare": save({name: tensor.clone() for name, tensor in load_file(kept).items()}),
        }[damage]
    )
    indices, sizes = scored(monkeypatch), asked(monkeypatch)
    status, _, err = run(capsys, [*SOME, "--batch-size", "2"])
    assert (status, err.count("\n")) == (0, 1)
    assert re.match(rf"fidelity: {kept} is damaged \(.+\) and is made anew\n", err)
    assert len(indices) == (4 if which == "scores" else 2)
    assert rows(capsys, "--batch-size", "2") == whole
    assert len(sizes) == (0 if which == "scores" else 4)


def test_long_run_is_written_as_it_goes(capsys, monkeypatch):
    """Killed without a chance to write, it has what there was."""
    with monkeypatch.context() as patch:
        patch.setattr(answers, "EVERY", 0)
        scored(patch, stop_at=3)
        save, writes = answers.ImageCache.save, []

        def die_after_both_batches(cache):
            writes.append(cache.path.name)
            if len(writes) <= 4:
                save(cache)

        patch.setattr(answers.ImageCache, "save", die_after_both_batches)
        assert run(capsys, [*SOME, "--batch-size", "2"])[0] == 130
    indices = scored(monkeypatch)
    rows(capsys, "--batch-size", "2")
    assert indices == [[4, 5], [6]]


def test_full_disk_is_one_line(capsys, monkeypatch):
    def refuse(*_):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(answers, "save_file", refuse)
    status, _, err = run(capsys, SOME)
    assert (status, err.count("\n")) == (2, 1)
    assert "no space left on device; choose another --cache" in err
    assert not list(Path("results").glob(".*"))


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
