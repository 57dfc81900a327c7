"""Commands and benchmarks that end at any moment, by Ctrl-C or SIGKILL: what is left is whole, and they go on."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.test_datasets import write_images
from vwt import LatencyProfile, Plan, PruningSchedule

# How often each is ended; more of them are tried with VWT_TEST_MOMENTS=20.
MOMENTS = int(os.environ.get("VWT_TEST_MOMENTS", "2"))

# Runs a command in children of one process, which imports torch once: first to its end, then ended at moments drawn at
# random from that time, by either signal in turn, and each time once more to its end.
DRIVER = """
import json, multiprocessing, os, random, signal, sys, time
import torch
from vwt.tuning import tune as tuning
import vwt.commands, fidelity, energy
from vwt import LatencyProfile
from vwt.cli import main

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
for name, value in {"DROPS": (0.2,), "RATIOS": (0.8,), "FEW": 2, "TRIES": 2, "FINALISTS": 1, "COST_RUNS": 1}.items():
    setattr(tuning, name, value)
measure = LatencyProfile.measure
quick = {"points": 3, "runs": 1}
LatencyProfile.measure = lambda model, batch_size=1, **rest: measure(model, batch_size, **rest | quick)
energy.REST, energy.WARMUP = 0.0, 1
MAINS = {"fidelity": fidelity.main, "energy": energy.main}

def child(command, stderr, ready):
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(stderr, "w", buffering=1)
    name, *arguments = command
    ready.set()
    status = MAINS[name](arguments) if name in MAINS else main(command)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done
    sys.exit(status)

def run(command, stderr, end=None, how=None):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=child, args=(command, stderr, ready))
    process.start()
    ready.wait()
    if how is not None:
        process.join(end)
        if process.is_alive():
            os.kill(process.pid, how)
    process.join(300)
    assert process.exitcode is not None, "it hangs"
    return [process.exitcode, open(stderr).read()]

def left():
    return open("out.json").read() if os.path.exists("out.json") else None

def whole():
    begun = time.monotonic()
    return [*run(command, "stderr"), left()], time.monotonic() - begun

command, moments = json.load(sys.stdin)
chance = random.Random(0)
whole()  # codebooks of benchmarks are built and kept
os.remove("out.json")
result, took = whole()
found = {"whole": result, "ended": [], "again": []}
for number in range(moments):
    os.remove("out.json")
    how = (signal.SIGINT, signal.SIGKILL)[number % 2]
    found["ended"].append([*run(command, "stderr", chance.uniform(0, took), how), left()])
    result, seconds = whole()
    found["again"].append(result)
    took = min(took, seconds)
json.dump(found, open("found.json", "w"))
"""

MODEL = ["--model", "test_vit", "--checkpoint", "weights.safetensors", "--quiet"]
IMAGES = ["--images", "images", "--count", "16"]
BENCH = [*MODEL, "--data", "images", "--words-data", "images", "--words", "16", "--images", "4", "--runs", "1"]
RESULTS = ["--only", "Neighbours 0.225", "random drop 0.4", "--cache", "cache", "--results-file", "out"]
COMMANDS = {
    "profile": (["profile", *MODEL, "--out", "out.json"], LatencyProfile.load),
    "schedule": (
        ["schedule", *MODEL, *IMAGES, "--profile", "profile.json", "--utility", "--out", "out.json"],
        PruningSchedule.load,
    ),
    "tune": (["tune", *MODEL, *IMAGES, "--agreement", "0.05", "--out", "out.json"], Plan.load),
    "fidelity": (["fidelity", *BENCH, *RESULTS], lambda path: figures(path, "fidelity")),
    "energy": (
        ["energy", *BENCH, *RESULTS, "--batch-size", "2", "--seconds", "0.01"],
        lambda path: figures(path, "facts"),
    ),
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes as on Unix")]


def figures(path, table):
    """What does not depend on time, of each variant."""
    rows = json.loads(path.read_text())["tables"][table]
    return [[row.get(name) for name in ("name", "tokens", "agreement", "kl")] for row in rows]


@pytest.mark.parametrize("name", COMMANDS)
def test_ended_at_any_moment(tmp_path, name):
    command, load = COMMANDS[name]
    write_images(tmp_path / "images", 20)
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    if name == "schedule":
        LatencyProfile.measure(model, points=3, runs=1, progress=False).save(tmp_path / "profile.json")
    inputs = {path.name for path in tmp_path.iterdir()}
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root), str(root / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([command, MOMENTS]),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr

    def read(text):
        (tmp_path / "read.json").write_text(text)
        return load(tmp_path / "read.json")

    found = json.loads((tmp_path / "found.json").read_text())
    status, err, whole = found["whole"]
    assert status == 0, err
    for status, err, left in found["ended"]:
        # What reads weights may report an interrupt as an error of its own, which is one line all the same.
        assert status in (0, 2, 130, -signal.SIGKILL), err
        assert status != 2 or err.count("\n") == 1, err
        assert "Traceback" not in err
        if status == 130:
            assert re.search(r"interrupted(; .*)?\n\Z", err), err
        if left is not None:
            read(left)  # whole, if it is there at all
    for status, err, text in found["again"]:
        assert status == 0, err
        again = read(text)
        assert not isinstance(again, list) or again == read(whole)
    written = {path.name for path in tmp_path.iterdir()} - inputs
    assert written <= {"out.json", "out.csv", "cache", "read.json", "found.json", "stderr"}
