import errno
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import vwt
from tests.codebook.test_codebook import Trap, bytes_of
from tests.test_datasets import write_images
from vwt import LatencyProfile, Plan, PruningSchedule
from vwt.cli import COMMANDS, main
from vwt.codebook.config import BuildConfig, BuildReport
from vwt.commands import OPTIONS
from vwt.commands.building import build_summary
from vwt.commands.pictures import read_strategy
from vwt.errors import DataError
from vwt.tuning import tune as tuning
from vwt.tuning.plan import Point

PIXEL = {"--model": "test_vit", "--space": "pixel", "--words": "16", "--out": "w.zarr", "--workers": "0"}
EMBEDDING = PIXEL | {"--space": "embedding", "--checkpoint": "weights.safetensors"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with images, the weights of a model, and files that are neither."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", 3)
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), "weights.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.safetensors").write_text("notes")
    return tmp_path


def command(options, source="images", *flags):
    return ["build", source, "--quiet", *flags, *(word for option in options.items() for word in option)]


def run(capsys, arguments):
    """Exit status, stdout and stderr of a command, and nothing raised but what argparse raises."""
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def one_line(status, out, err):
    assert (status, out) == (2, "")
    assert err.startswith("vwt")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("options", "source", "message"),
    [
        (PIXEL, "missing", "no such folder or file: missing"),
        (PIXEL, "empty", "no image|Found 0 images"),
        (PIXEL, "notes.safetensors", "is a file, but no tar file"),
        (PIXEL | {"--words": "301"}, "images", "300 patches are fewer than 301 words"),
        (PIXEL | {"--words": "0"}, "images", "words is 0; expected an integer of at least 1"),
        (PIXEL | {"--words": "many"}, "images", "argument --words: invalid int value: 'many'"),
        (PIXEL | {"--threshold": "2.5"}, "images", r"threshold is 2.5; expected a cosine distance in \[0, 2\]"),
        (PIXEL | {"--threshold": "-0.1"}, "images", r"threshold is -0.1"),
        (PIXEL | {"--threshold": "nan"}, "images", "threshold is nan"),
        (PIXEL | {"--seed": "4294967296"}, "images", "seed is 4294967296"),
        (PIXEL | {"--iterations": "0"}, "images", "iterations is 0"),
        (PIXEL | {"--workers": "-1"}, "images", "workers is -1"),
        (PIXEL | {"--space": "sound"}, "images", "argument --space: invalid choice: 'sound'"),
        (PIXEL | {"--backend": "abacus"}, "images", "argument --backend: invalid choice: 'abacus'"),
        (PIXEL | {"--colour": "red"}, "images", "unrecognized arguments: --colour red"),
        (PIXEL | {"--out": "notes.safetensors"}, "images", r"notes.safetensors; expected NAME.zarr or NAME.zarr.zip"),
        (PIXEL | {"--out": "notes.safetensors/w.zarr"}, "images", "there is no such folder"),
        (PIXEL | {"--out": "absent/w.zarr"}, "images", "cannot write absent/w.zarr: there is no such folder; make it"),
        (PIXEL | {"--model": "vit_of_the_future"}, "images", r"has no model 'vit_of_the_future'; see timm.list_models"),
        (PIXEL | {"--model": "test_vit.of_the_future"}, "images", "test_vit.of_the_future"),
        (PIXEL | {"--model": "test_resnet"}, "images", "ResNet is not supported"),
        (EMBEDDING | {"--checkpoint": "missing.pt"}, "images", "no checkpoint file at missing.pt"),
        (EMBEDDING | {"--checkpoint": "images"}, "images", "no checkpoint file at images"),
        (EMBEDDING | {"--model": "test_vit2"}, "images", "weights.safetensors holds no weights for test_vit2"),
        (
            EMBEDDING | {"--checkpoint": "notes.safetensors"},
            "images",
            "notes.safetensors holds no weights for test_vit",
        ),
    ],
)
def test_error_is_one_line(capsys, folder, options, source, message):
    before = bytes_of(folder)
    assert re.search(message, one_line(*run(capsys, command(options, source))))
    assert bytes_of(folder) == before


@pytest.mark.parametrize("arguments", [[], ["bake"], ["build"], ["build", "images", "--out", "w.zarr"]])
def test_wrong_call_is_one_line(capsys, arguments):
    assert "--help" in one_line(*run(capsys, arguments))


def test_weights_that_would_run_code(capsys, folder):
    torch.save(Trap(), folder / "trap.pt")
    line = one_line(*run(capsys, command(EMBEDDING | {"--checkpoint": "trap.pt"})))
    assert "trap.pt holds no weights for test_vit" in line
    assert not (folder / "sprung").exists()


def test_weights_out_of_reach(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", os.path.abspath("empty"))
    line = one_line(*run(capsys, command(PIXEL | {"--space": "embedding"})))
    assert re.search(r"no pretrained weights for test_vit: .*\(--checkpoint\)", line)


def test_strict_stops_at_an_unreadable_image(capsys, folder):
    (folder / "images" / "b" / "001.jpg").write_bytes(b"")
    line = one_line(*run(capsys, command(PIXEL, "images", "--strict")))
    assert "cannot read b/001.jpg: not an image, or empty" in line
    assert not (folder / "w.zarr").exists()


def test_weights_that_are_not_finite(capsys, folder):
    model = timm.create_model("test_vit")
    model.patch_embed.proj.weight.data.fill_(torch.nan)
    save_file(model.state_dict(), folder / "weights.safetensors")
    assert "NaN or infinity in the patches" in one_line(*run(capsys, command(EMBEDDING)))


def test_codebook_is_made_and_summed_up(capsys, folder):
    (folder / "images" / "b" / "001.jpg").write_bytes(b"")
    status, out, err = run(capsys, command(EMBEDDING))
    assert (status, err) == (0, "")
    images, skipped, patches, words, distance, matched, seconds, path = out.splitlines()
    assert images == "images    2 read, 1 skipped"
    assert skipped.split() == ["skipped", "b/001.jpg:", "not", "an", "image,", "or", "empty"]
    assert patches == "patches   200 seen, 200 sampled"
    assert words == "words     16, 16 effective (0 empty, 0 duplicate)"
    assert re.fullmatch(r"distance  0\.\d{4} mean cosine distance to the nearest word", distance)
    assert re.fullmatch(r"matched   \d+\.\d % of patches within 0.1", matched)
    assert re.fullmatch(r"seconds   \d+\.\d \(.*(decode|cluster) \d+\.\d.*\)", seconds)
    assert path == "w.zarr"
    assert len(vwt.Codebook.load("w.zarr")) == 16


def test_progress_is_shown_unless_quiet(capsys):
    arguments = command(PIXEL)
    arguments.remove("--quiet")
    status, _, err = run(capsys, arguments)
    assert status == 0
    steps = [line for line in err.splitlines() if line.startswith("step")]
    assert steps == [
        "step 1 of 3: sampling patches of 3 images",
        "step 2 of 3: clustering 300 patches into 16 words",
        "step 3 of 3: counting each word in 3 images",
    ]
    assert err.splitlines()[-1].startswith('next: reduce tokens with vwt.InterImage(vwt.Codebook.load("w.zarr"))')


@pytest.mark.parametrize("flags", [[], ["--euclidean"]])
@pytest.mark.parametrize("backend", ["faiss", "sklearn"])
def test_options_reach_the_codebook(capsys, flags, backend):
    options = EMBEDDING | {"--backend": backend, "--seed": "7", "--out": "w.zarr.zip"}
    assert run(capsys, command(options, "images", *flags))[0] == 0
    clustering = vwt.Codebook.load("w.zarr.zip").provenance["clustering"]
    assert (clustering["backend"], clustering["seed"], clustering["spherical"]) == (backend, 7, not flags)


def test_pixel_codebook_needs_no_weights_and_does_not_depend_on_them(capsys, folder, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert run(capsys, command(PIXEL | {"--out": f"{seed}.zarr"}))[0] == 0
    assert bytes_of(folder / "1.zarr") == bytes_of(folder / "2.zarr")


def test_overwrite_replaces_what_is_there(capsys):
    for options, flags, expected in ((PIXEL, [], 0), (EMBEDDING, [], 2), (EMBEDDING, ["--overwrite"], 0)):
        assert run(capsys, command(options, "images", *flags))[0] == expected
    assert vwt.Codebook.load("w.zarr").space == "embedding"


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_interrupt_is_one_line_with_the_way_on(capsys, monkeypatch):
    monkeypatch.setattr("vwt.commands.building.run_build", interrupted)
    status, out, err = run(capsys, command(PIXEL))
    assert (status, out, err.strip()) == (130, "", "vwt: interrupted; go on with --resume")


@pytest.mark.parametrize("error", [RuntimeError("trying to pop from empty mode stack"), DataError("nothing was read")])
def test_what_fails_since_it_was_interrupted_is_an_interrupt(capsys, monkeypatch, error):
    """As torch does where the interrupt meets the code that leaves a mode."""

    def fail(*_, **__):
        try:
            raise KeyboardInterrupt
        finally:
            raise error

    monkeypatch.setattr("vwt.commands.building.run_build", fail)
    status, out, err = run(capsys, command(PIXEL))
    assert (status, out, err.strip()) == (130, "", "vwt: interrupted; go on with --resume")


def test_interrupted_build_goes_on_only_with_resume(capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("vwt.codebook.passes.CountPass.result", interrupted)
        assert run(capsys, command(PIXEL))[0] == 130
    assert "go on with --resume, or drop it with --overwrite" in one_line(*run(capsys, command(PIXEL)))
    assert run(capsys, command(PIXEL, "images", "--resume"))[0] == 0


def test_bug_is_not_hidden(monkeypatch):
    """Only what a user can cause becomes a line; anything else keeps its traceback."""
    monkeypatch.setattr("vwt.commands.building.run_build", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(command(PIXEL))


def test_summary_names_ten_skipped_images_and_counts_the_others():
    report = BuildReport(images=3, skipped={f"{index}.jpg": "empty" for index in range(14)}, patches=300)
    lines = build_summary(report, BuildConfig()).splitlines()
    assert lines[0] == "images    3 read, 14 skipped"
    assert [line.split()[1] for line in lines[1:11]] == [f"{index}.jpg:" for index in range(10)]
    assert lines[11].strip() == "... and 4 more"
    assert lines[12].startswith("patches")


def test_a_name_that_a_shell_completed(capsys):
    assert run(capsys, command(PIXEL))[0] == 0
    status, _, err = run(capsys, command(PIXEL | {"--out": "w.zarr/"}, "images", "--overwrite"))
    assert (status, err) == (0, "")


# -- show --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A codebook that serves all tests; in pixel space."""
    folder = tmp_path_factory.mktemp("built")
    images = str(write_images(folder / "images", 3))
    assert main(command(PIXEL | {"--out": str(folder / "w.zarr")}, images)) == 0
    return folder / "w.zarr"


@pytest.fixture
def words(folder, built):
    shutil.copytree(built, folder / "w.zarr")


SHOW = ["--model", "test_vit", "--checkpoint", "weights.safetensors", "--out", "out.png", "--quiet"]


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        ("missing.jpg", ["--strategy", "intra:0.5"], "cannot read missing.jpg: No such file"),
        ("notes.safetensors", ["--strategy", "intra:0.5"], "cannot read notes.safetensors: not an image, or empty"),
        ("images", ["--strategy", "intra:0.5"], "cannot read images: Is a directory"),
        ("images/a/000.jpg", [], "nothing is reduced; give --plan"),
        ("images/a/000.jpg", ["--strategy", "magic"], "no strategy 'magic'; expected neighbours:SHARE"),
        ("images/a/000.jpg", ["--strategy", "neighbours:"], "no strategy 'neighbours:'"),
        ("images/a/000.jpg", ["--strategy", "inter:"], "no strategy 'inter:'"),
        ("images/a/000.jpg", ["--strategy", "neighbours:0.7"], r"drop is 0.7; expected a share in \[0, 0.5\)"),
        ("images/a/000.jpg", ["--strategy", "intra:1"], "drop is 1.0"),
        ("images/a/000.jpg", ["--strategy", "inter:missing.zarr:0.1"], "no codebook at missing.zarr"),
        ("images/a/000.jpg", ["--strategy", "inter:w.zarr:3"], "threshold is 3.0"),
        ("images/a/000.jpg", ["--schedule", "missing.json"], "missing.json: No such file"),
        ("images/a/000.jpg", ["--schedule", "notes.safetensors"], "notes.safetensors is damaged or no schedule"),
        ("images/a/000.jpg", ["--schedule", "late.json"], "the schedule names block 9"),
        ("images/a/000.jpg", ["--strategy", "intra:0.5", "--out", "out.txt"], r"cannot draw out.txt; expected a .png"),
        ("images/a/000.jpg", ["--strategy", "intra:0.5", "--out", "no/out.png"], "a folder that exists"),
        ("images/a/000.jpg", ["--strategy", "inter:w.zarr", "--images", "missing"], "no such folder or file: missing"),
        ("images/a/000.jpg", ["--strategy", "inter:w.zarr", "--count", "0"], "--count is 0"),
        ("images/a/000.jpg", ["--strategy", "intra:0.5", "--device", "nowhere"], "no device 'nowhere'"),
    ],
)
@pytest.mark.usefixtures("words")
def test_show_errors_are_one_line(capsys, folder, image, options, message):
    vwt.PruningSchedule({9: 1}).save("late.json")
    before = bytes_of(folder)
    assert re.search(message, one_line(*run(capsys, ["show", image, *SHOW, *options])))
    assert bytes_of(folder) == before


@pytest.mark.skipif(not os.path.isdir("/sys"), reason="needs a folder in which not even root can make files")
def test_show_says_first_that_a_picture_cannot_be_written(capsys, monkeypatch):
    monkeypatch.setattr("vwt.commands.options.create_model", lambda *_, **__: pytest.fail("came too late"))
    shown = ["show", "images/a/000.jpg", *SHOW, "--strategy", "intra:0.5", "--out", "/sys/out.png"]
    assert re.search(r"cannot write /sys/out.png: [A-Z].*; choose another folder", one_line(*run(capsys, shown)))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--strategy", "neighbours:0.2"], marks=pytest.mark.slow),
        ["--strategy", "inter:w.zarr:0.3"],
        [],
    ],
)
def test_show_draws(capsys, options):
    assert run(capsys, command(EMBEDDING))[0] == 0
    vwt.PruningSchedule({2: 10}).save("schedule.json")
    shown = ["show", "images/a/000.jpg", *SHOW, *options, "--schedule", "schedule.json", "--images", "images"]
    assert run(capsys, shown) == (0, "out.png\n", "")
    with Image.open("out.png") as picture:
        assert 800 < picture.width <= 13.34 * 160  # the width of a slide
        assert (picture.height > 900) == ("w.zarr" in str(options))  # with words below


def test_show_on_a_full_disk_leaves_no_picture(capsys, folder, monkeypatch):
    def fill(self, path, **options):
        path.write_bytes(b"")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fill)
    before = bytes_of(folder)
    error = one_line(*run(capsys, ["show", "images/a/000.jpg", *SHOW, "--strategy", "intra:0.5"]))
    assert error == "vwt: cannot draw out.png: No space left on device; choose another file\n"
    assert bytes_of(folder) == before


def test_the_model_is_created_as_asked_for(capsys, photos):
    options = PROFILE | {"--threads": "1"}
    assert (
        run(capsys, [*call("profile", options), "--model-kwargs", "img_size=(64, 96)", "dynamic_img_pad=True"])[0] == 0
    )
    assert LatencyProfile.load("profile.json").patches == 4 * 6
    error = one_line(*run(capsys, call("schedule", SCHEDULE)))
    assert "measured with patches 24, here it is 100" in error


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("96", "argument --model-kwargs: '96' is not NAME=VALUE"),
        ("img-size=96", "argument --model-kwargs: 'img-size=96' is not NAME=VALUE"),
        ("colour=red", r"timm \S+ cannot make test_vit with colour='red': .*unexpected keyword argument 'colour'"),
        ("depth=__import__('os').getcwd()", 'cannot make test_vit with depth="__import__'),
        ("num_classes=3", "holds no weights for test_vit: .* size mismatch for head"),
    ],
)
def test_a_model_that_cannot_be_created_so(capsys, given, message):
    assert re.search(message, one_line(*run(capsys, call("profile", PROFILE, "--model-kwargs", given))))


@pytest.mark.usefixtures("words")
def test_read_strategy():
    assert repr(read_strategy("neighbours:0.22")) == "Neighbours(drop=0.22)"
    assert repr(read_strategy("intra:.5")) == "IntraImage(drop=0.5)"
    assert read_strategy("inter:w.zarr").threshold == 0.1
    assert read_strategy("inter:w.zarr:0.25").threshold == 0.25
    os.rename("w.zarr", "a:b.zarr")
    assert len(read_strategy("inter:a:b.zarr:0.25").codebook) == len(read_strategy("inter:a:b.zarr").codebook) == 16


# -- what runs a model -------------------------------------------------------------------------------------------------

MODEL = {"--model": "test_vit", "--checkpoint": "weights.safetensors"}
PROFILE = MODEL | {"--points": "3", "--runs": "1", "--out": "profile.json"}
SCHEDULE = MODEL | {"--profile": "profile.json", "--images": "photos", "--ratio": "0.8", "--out": "schedule.json"}
TUNE = MODEL | {"--images": "photos", "--ratio": "0.9", "--out": "plan.json"}

REPORT = MODEL | {"--plan": "plan.json", "--images": "images", "--out": "report.html"}


def call(name, options, *flags):
    return [name, "--quiet", *flags, *(word for option in options.items() for word in option)]


@pytest.fixture
def photos(folder):
    write_images(folder / "photos", 16)


@pytest.fixture(scope="module")
def measured():
    return LatencyProfile.measure(timm.create_model("test_vit").eval(), points=3, runs=1, progress=False)


@pytest.fixture
def profile(measured, folder):
    """One that says that time goes with tokens, whatever was measured."""
    per_token = {"block": [1.0 * n for n in measured.counts], "attention": [0.5 * n for n in measured.counts]}
    free = {kind: [0.0] * len(values) for kind, values in measured.reductions.items()}
    known = {**vars(measured), **per_token, "counting": per_token["block"], "reductions": free, "checks": []}
    made = LatencyProfile(**{field: known[field] for field in LatencyProfile.__dataclass_fields__})
    made.save("profile.json")
    return made


@pytest.fixture
def plan(folder):
    """Of the model that the commands are called with."""
    own = LatencyProfile.identify(timm.create_model("test_vit").eval())
    machine = {name: own[name] for name in ("device", "cpu", "threads", "torch", "timm")}
    point = Point({"name": "Neighbours", "drop": 0.2}, PruningSchedule({2: 8}), 8.0, 0.8, 0.1, 0.9)
    made = Plan(own["model"], 1, own["precision"], machine, {"ratio": 0.8}, point, [point])
    made.save("plan.json")
    return made


def test_profile(capsys, folder):
    status, out, err = run(capsys, call("profile", PROFILE, "--plot", "profile.png", "--batch-size", "2"))
    assert status == 0
    assert all("measure again on an idle machine" in line for line in err.splitlines())  # as a busy one has it
    made = LatencyProfile.load("profile.json")
    title, header, *rows, total, path = out.splitlines()
    assert title.startswith("test_vit")
    assert "batch 2, float32" in title
    assert header.startswith("tokens")
    assert [int(row.split()[0]) for row in rows] == made.counts
    assert made.counts[::2] == [2, 101]
    assert re.fullmatch(r"whole model \d+\.\d\d ms; predictions of forwards err by \d+\.\d % \(median\)", total)
    assert path == "profile.json"
    assert (folder / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_schedule_for_a_budget(capsys, photos, profile):
    status, out, err = run(capsys, call("schedule", SCHEDULE))
    assert status == 0
    assert all("search again on an idle machine" in line for line in err.splitlines())  # as a busy one has it
    schedule = PruningSchedule.load("schedule.json")
    assert profile.predict(schedule) <= 0.8 * profile.predict()
    assert out == f"{schedule.table(profile)}\nschedule.json\n"


def test_schedule_that_does_not_prune(capsys, photos, profile):
    status, out, _ = run(capsys, call("schedule", SCHEDULE | {"--ratio": "1"}))
    assert (status, out.splitlines()[0][:12]) == (0, "do not prune")
    assert PruningSchedule.load("schedule.json") == {}


def test_schedule_by_utility(capsys, photos, profile, folder):
    options = {name: value for name, value in SCHEDULE.items() if name != "--ratio"}
    options |= {"--block": "2", "--alpha": "1", "--plot": "utility.png"}
    status, out, err = run(capsys, call("schedule", options, "--utility"))
    assert (status, err) == (0, "")
    schedule = PruningSchedule.load("schedule.json")
    assert list(schedule) == [2]
    assert out == f"{schedule.table(profile)}\nschedule.json\n"
    assert (folder / "utility.png").exists()


def test_tune(capsys, photos, folder, monkeypatch):
    small = {"DROPS": (0.2,), "RATIOS": (0.8,), "FEW": 2, "TRIES": 2, "FINALISTS": 1}
    for name, value in (small | {"COST_RUNS": 1}).items():
        monkeypatch.setattr(tuning, name, value)
    measure = LatencyProfile.measure

    def quick(model, batch_size=1, **options):
        return measure(model, batch_size, points=3, runs=1, **options)

    monkeypatch.setattr(LatencyProfile, "measure", quick)
    options = {name: value for name, value in TUNE.items() if name != "--ratio"}
    status, out, err = run(capsys, call("tune", options | {"--agreement": "0.05"}))
    assert status == 0
    assert all("measure again on an idle machine" in line for line in err.splitlines())  # as a busy one has it
    plan = Plan.load("plan.json")
    assert out == f"{plan}\nplan.json\n"
    assert plan.goal == {"agreement": 0.05}
    assert not (folder / "plan.json.tuning").exists()
    model = timm.create_model("test_vit").eval()
    assert plan.apply(model)(torch.zeros(1, 3, 160, 160)).shape == (1, 1000)


NEXT = {
    "profile": (
        PROFILE,
        "vwt schedule --profile profile.json --model test_vit --images DIR --ratio 0.8 --out NAME.json",
    ),
    "tune": (TUNE, 'apply it with vwt.Plan.load("plan.json").apply(model)'),
    "report": (REPORT, "open report.html in a browser"),
}


@pytest.mark.parametrize("name", NEXT)
def test_what_to_do_next_is_said_last(capsys, photos, plan, profile, monkeypatch, name):
    monkeypatch.setattr("vwt.commands.tuning.tune", lambda *_, **__: plan)
    monkeypatch.setattr("vwt.commands.pictures.write_report", lambda *_, **__: [])
    monkeypatch.setattr(LatencyProfile, "measure", lambda *_, **__: profile)
    options, advice = NEXT[name]
    arguments = call(name, options)
    arguments.remove("--quiet")
    status, out, err = run(capsys, arguments)
    assert (status, out.splitlines()[-1]) == (0, options["--out"])
    assert err.splitlines()[0] == "opening test_vit"
    assert err.splitlines()[-1] == f"next: {advice}"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("profile", PROFILE | {"--out": "absent/profile.json"}),
        ("schedule", SCHEDULE | {"--out": "absent/schedule.json"}),
        ("tune", TUNE | {"--out": "absent/plan.json"}),
        # Nobody can make files in /sys, not even root.
        ("profile", PROFILE | {"--out": "/sys/profile.json"}),
        ("schedule", SCHEDULE | {"--out": "/sys/schedule.json"}),
        ("tune", TUNE | {"--out": "/sys/plan.json"}),
        ("report", REPORT | {"--out": "/sys/report.html"}),
        ("tune", {name: value for name, value in TUNE.items() if name != "--ratio"}),
        ("profile", PROFILE | {"--model": "convnext_tiny"}),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(capsys, photos, profile, plan, monkeypatch, name, options):
    for long in ("options.create_model", "tuning.load_images"):
        monkeypatch.setattr(f"vwt.commands.{long}", lambda *_, **__: pytest.fail("came too late"))
    one_line(*run(capsys, call(name, options)))


@pytest.mark.slow
def test_a_profile_of_the_threads_that_are_asked_for(capsys, photos, profile):
    """The profile is compared with the threads that the command sets."""
    threads = torch.get_num_threads()
    try:
        status, _, err = run(capsys, call("schedule", SCHEDULE | {"--threads": str(threads + 1)}))
    finally:
        torch.set_num_threads(threads)
    assert status == 0
    assert err.count(f"measured with {threads} threads, here torch has {threads + 1}") == 1


def test_every_command_has_its_options():
    assert list(COMMANDS) == list(OPTIONS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_no_empty_defaults(capsys, name):
    status, out, _ = run(capsys, [name, "--help"])
    assert status == 0
    assert not re.search(r"default:\s+(None|False|\[\])", out)


def test_help_imports_nothing_that_takes_seconds():
    code = (
        "import sys, vwt.cli\ntry: vwt.cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print({'torch', 'timm', 'numpy'} & {*sys.modules})"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "set()"


def test_an_interrupt_while_a_command_is_imported_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(OPTIONS, "env", interrupted)
    assert run(capsys, ["env"]) == (130, "", "\nvwt: interrupted\n")


def test_every_public_name_can_be_had():
    for name in vwt.__all__:
        assert getattr(vwt, name).__name__ == name
    assert set(vwt.__all__) <= set(dir(vwt))
    with pytest.raises(AttributeError, match="module 'vwt' has no attribute 'nonsense'"):
        vwt.nonsense  # noqa: B018


def test_models_that_are_known_are_answered_beside_others(capsys):
    status, out, err = run(capsys, ["models", "test_vit", "nonsense", "test_resnet"])
    assert status == 2
    assert [line.split(":")[0] for line in out.splitlines()] == ["test_vit", "test_resnet"]
    assert "has no model 'nonsense'" in err


WRONG = {
    "profile": (
        PROFILE,
        [
            ({"--points": "1"}, "points is 1; expected at least 2"),
            ({"--runs": "0"}, "runs is 0; expected at least 1"),
            ({"--batch-size": "0"}, "batch_size is 0; expected at least 1"),
            ({"--threads": "0"}, "--threads is 0; expected at least 1"),
            ({"--device": "abacus"}, "no device 'abacus'"),
            ({"--precision": "int8"}, "argument --precision: invalid choice: 'int8'"),
            ({"--runtime": "tvm"}, "argument --runtime: invalid choice: 'tvm'"),
            ({"--runtime": "onnxruntime", "--precision": "float16"}, "precision is 'float16'; expected one of float32"),
            ({"--plot": "picture.txt"}, "cannot draw picture.txt; expected a .png, .svg or .pdf"),
            ({"--out": "absent/profile.json"}, "cannot write the profile absent/profile.json"),
            ({"--out": "profile.txt"}, "cannot write the profile profile.txt; expected a name that ends in .json"),
            ({"--checkpoint": "missing.pt"}, "no checkpoint file at missing.pt"),
            ({"--model": "test_resnet", "--checkpoint": "notes.safetensors"}, "test_resnet: no. .*ResNet is not supp"),
        ],
    ),
    "schedule": (
        SCHEDULE,
        [
            ({"--profile": "absent.json"}, "cannot read the profile absent.json"),
            ({"--profile": "notes.safetensors"}, "damaged or no profile"),
            ({"--images": "absent"}, "no such folder or file: absent"),
            ({"--images": "images"}, "has 3 images that can be read; calibration needs at least 16"),
            ({"--ratio": "0"}, "the budget is 0.0 ms; expected a positive number"),
            ({"--ratio": "0.001"}, "the least possible is"),
            ({"--milliseconds": "3"}, "not allowed with argument --ratio"),
            ({"--plot": "utility.png"}, "--plot draws the utility; give --utility"),
            ({"--precision": "bfloat16"}, "measured with precision 'float32', here it is 'bfloat16'"),
            ({"--runtime": "openvino"}, "profile.json was measured in torch, not in openvino; measure again, or leave"),
            ({"--ratio": "1", "--out": "absent/schedule.json"}, "cannot write the schedule absent/schedule.json"),
            ({"--ratio": None, "--utility": ..., "--block": "99"}, "block"),
            ({"--ratio": None, "--utility": ..., "--alpha": "2"}, "alpha is 2.0; expected a weight"),
        ],
    ),
    "tune": (
        TUNE,
        [
            ({"--ratio": "0"}, "ratio is 0; expected a number above 0 and at most 1"),
            ({"--ratio": None}, "tune needs a goal"),
            ({"--milliseconds": "3"}, "tune needs a goal"),
            ({"--agreement": "1.5"}, "agreement is 1.5; expected a number above 0 and at most 1"),
            ({"--images": "absent"}, "no such folder or file: absent"),
            ({"--images": "images"}, "has 3 images that can be read; calibration needs at least 16"),
            ({"--batch-size": "0"}, "batch_size is 0; expected at least 1"),
            ({"--out": "absent/plan.json"}, "cannot write .*absent"),
            ({"--runtime": "openvino", "--report": "r.html"}, "a report measures a plan in torch, not in openvino"),
        ],
    ),
}
CASES = [(name, *case) for name, (_, cases) in WRONG.items() for case in cases]


@pytest.mark.parametrize(("name", "changes", "message"), CASES, ids=[f"{n}-{' '.join(c)}" for n, c, _ in CASES])
def test_wrong_arguments_are_one_line(capsys, photos, request, monkeypatch, name, changes, message):
    if name == "schedule":
        request.getfixturevalue("profile")
    if name == "tune":
        measure = LatencyProfile.measure
        monkeypatch.setattr(LatencyProfile, "measure", partial(measure, points=2, runs=1))
    options = WRONG[name][0] | changes
    flags = [option for option, value in options.items() if value is ...]
    options = {option: value for option, value in options.items() if isinstance(value, str)}
    assert re.search(message, one_line(*run(capsys, call(name, options, *flags))))
    assert not os.path.exists(WRONG[name][0]["--out"])


@pytest.mark.parametrize(
    ("name", "options", "advice"),
    [
        ("profile", PROFILE, "; nothing was written"),
        ("schedule", SCHEDULE, "; nothing was written"),
        ("tune", TUNE, "; the same command goes on where it stopped"),
    ],
)
def test_an_interrupt_says_how_to_go_on(capsys, photos, profile, monkeypatch, name, options, advice):
    if name == "profile":
        os.remove("profile.json")
    called = "vwt.measure.timing.time_call" if name == "profile" else "vwt.tuning.calibration.compare"
    monkeypatch.setattr(called, interrupted)
    monkeypatch.setattr(
        LatencyProfile, "measure", LatencyProfile.measure if name == "profile" else lambda *_, **__: profile
    )
    monkeypatch.setattr(tuning, "COST_RUNS", 1)
    status, out, err = run(capsys, call(name, options))
    assert (status, out, err.strip()) == (130, "", f"vwt: interrupted{advice}")
    assert not os.path.exists(options["--out"])
    assert os.path.exists("plan.json.tuning") == (name == "tune")


# -- report ------------------------------------------------------------------------------------------------------------


def test_report(capsys, plan):
    (Path("images") / "b" / "001.jpg").write_bytes(b"no image")
    status, out, err = run(capsys, call("report", REPORT))
    assert (status, out) == (0, "report.html\n")
    assert err == "vwt: left out 1 images that cannot be read: b/001.jpg (not an image, or empty)\n"
    text = Path("report.html").read_text(encoding="utf-8")
    assert "vwt report --quiet --model test_vit" in text
    assert "Neighbours(drop=0.2) + Prune(8) in block 2" in text


def test_tune_writes_a_report_too(capsys, photos, plan, monkeypatch):
    monkeypatch.setattr("vwt.commands.tuning.tune", lambda *_, **__: plan)
    status, out, err = run(capsys, call("tune", TUNE | {"--report": "report.html"}))
    assert (status, err) == (0, "")
    assert out == f"{plan}\nplan.json\nreport.html\n"
    assert "vwt tune --quiet" in Path("report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--plan": "absent.json"}, "cannot read the plan absent.json"),
        ({"--plan": "notes.safetensors"}, "damaged or no plan"),
        ({"--images": "absent"}, "no such folder or file: absent"),
        ({"--images": "empty"}, "no image|Found 0 images"),
        ({"--out": "absent/report.html"}, "cannot write the report absent/report.html: there is no such folder"),
        ({"--out": "report.pdf"}, r"cannot write the report report.pdf; expected a name that ends in \.html"),
        ({"--precision": "bfloat16"}, "the plan was tuned for precision 'float32', here 'bfloat16'"),
    ],
)
def test_report_errors_are_one_line(capsys, plan, changes, message):
    assert re.search(message, one_line(*run(capsys, call("report", REPORT | changes))))
    assert not os.path.exists("report.html")


@pytest.mark.parametrize(("name", "place"), [("report", "--out"), ("tune", "--report")])
@pytest.mark.parametrize("fault", ["folder", "package"])
def test_a_report_that_cannot_be_written_is_noticed_first(capsys, plan, photos, monkeypatch, name, place, fault):
    monkeypatch.setattr("vwt.commands.options.create_model", lambda *_, **__: pytest.fail("came too late"))
    path = "absent/report.html" if fault == "folder" else "report.html"
    if fault == "package":
        monkeypatch.setitem(sys.modules, "altair", None)
    message = "there is no such folder" if fault == "folder" else r"a report needs altair; pip install 'vwt\[report\]'"
    line = one_line(*run(capsys, call(name, {"report": REPORT, "tune": TUNE}[name] | {place: path})))
    assert re.search(message, line)
