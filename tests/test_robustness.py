"""Builds killed with SIGKILL, wherever they are, and resumed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.codebook.test_codebook import bytes_of
from tests.matrix import matrix
from tests.test_datasets import write_images
from vwt import Codebook
from vwt.cli import main

SCRIPT = Path(__file__).parents[1] / "scripts" / "build_codebook.py"

# Runs the script in a child process that kills itself when it calls `target` for the n-th time, for n = 1, 2, ... until
# a child survives. One process forks them all, since importing torch takes seconds.
DRIVER = """
import itertools, json, multiprocessing, os, pkgutil, runpy, signal, sys
import PIL.Image, torch, vwt.codebook.building, vwt.codebook.passes, vwt.codebook.store

PIL.Image.init()  # what would be slow in every child
torch.zeros(1).erfinv_()
vwt.codebook.building.SHARD_IMAGES = 4
vwt.codebook.building._PATCHES_PER_WORD = (2, 8)

def run(script, arguments, target, calls):
    path, _, name = target.rpartition(".")
    owner, left = pkgutil.resolve_name(path), itertools.count(1)
    call = getattr(owner, name)

    def deadly(*args, **kwargs):
        if next(left) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    setattr(owner, name, deadly)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")

script, name, arguments, target = json.load(sys.stdin)
codes = []
while not codes or codes[-1] == -signal.SIGKILL:
    process = multiprocessing.get_context("fork").Process(
        target=run, args=(script, [*arguments, "--out", f"{name}-{len(codes)}.zarr"], target, len(codes) + 1)
    )
    process.start()
    process.join()
    codes.append(process.exitcode)
json.dump(codes, open("codes.json", "w"))
"""

WEIGHTS = ["--checkpoint", "weights.safetensors"]
# What is built, and at each of whose calls it is killed.
JOBS = {
    "at any rename": (WEIGHTS, "os.replace"),
    "while sampling": (WEIGHTS, "vwt.codebook.passes:SamplePass.result"),
    "while a shard's result is put in its place": (WEIGHTS, "vwt.codebook.store:ShardStore.write"),
    "while making the sample's file": (WEIGHTS, "os.posix_fallocate"),
    "while counting": (WEIGHTS, "vwt.codebook.passes:CountPass.result"),
    "while saving the codebook": (WEIGHTS, "vwt.codebook.files._checksum"),
    "while clustering a stream": ([*WEIGHTS, "--backend", "sklearn"], "vwt.codebook.clustering:StreamingKMeans.add"),
    "after clustering a stream": ([*WEIGHTS, "--backend", "sklearn"], "os.replace"),
    "in pixel space, without weights": (["--space", "pixel"], "os.replace"),
    "when all is done": ([*WEIGHTS, "--euclidean"], "shutil.rmtree"),
}
COMMON = ["images", "--model", "test_vit", "--words", "16", "--iterations", "2", "--workers", "0", "--quiet"]

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="kills and forks processes as on Linux")


@pytest.fixture(scope="module", params=matrix(JOBS))
def killed(request, tmp_path_factory):
    """A job, the folder of its builds that were killed, and the exit codes of its processes."""
    job, (arguments, target) = request.param, JOBS[request.param]
    folder = tmp_path_factory.mktemp("killed")
    (write_images(folder / "images", 11) / "a" / "004.jpg").write_bytes(b"")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), folder / "weights.safetensors")
    subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([str(SCRIPT), job, [*COMMON, *arguments], target]),
        text=True,
        cwd=folder,
        env=os.environ | {"SOURCE_DATE_EPOCH": "0", "OMP_WAIT_POLICY": "passive"},  # spinning threads slow each other
        check=True,
        capture_output=True,
    )
    return job, folder, json.loads((folder / "codes.json").read_text())


def test_killed_build_resumes_to_the_very_bytes(killed, monkeypatch, capsys):
    job, folder, (*deaths, last) = killed
    monkeypatch.chdir(folder)
    monkeypatch.setattr("vwt.codebook.building.SHARD_IMAGES", 4)
    monkeypatch.setattr("vwt.codebook.building._PATCHES_PER_WORD", (2, 8))
    assert set(deaths) == {-signal.SIGKILL}
    assert last == 0
    whole = Path(f"{job}-{len(deaths)}.zarr")
    assert len(Codebook.load(whole)) == 16
    for death in range(len(deaths)):
        out = Path(f"{job}-{death}.zarr")
        begun = Path(f"{out}.building", "build.json").exists()
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400" if begun else "0")  # a day later does not matter
        again = ["--resume", *(["--overwrite"] if out.exists() else [])]
        assert main(["build", *COMMON, *JOBS[job][0], "--out", str(out), *again]) == 0, capsys.readouterr().err
        assert bytes_of(out) == bytes_of(whole), death
        assert not Path(f"{out}.building").exists()
        assert "10 read, 1 skipped" in capsys.readouterr().out


def test_killed_build_is_not_taken_for_a_codebook(killed):
    job, folder, codes = killed
    assert len(codes) > 1
    for path in folder.glob(f"{job}-*.zarr"):
        assert len(Codebook.load(path)) == 16  # whole, wherever there is one
