"""A working folder with images and weights, and a run of a benchmark as on a command line."""

import copy
import hashlib
import shutil
from pathlib import Path

import harness
import peers
import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.test_datasets import write_images


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with seven images of two of ImageNet's classes, and weights; no run depends on torchao."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", 7, ("n01494475", "n03888257"))
    torch.manual_seed(0)
    model = timm.create_model("test_vit")
    model.head.weight.data *= 30  # answers that differ from image to image
    save_file(model.state_dict(), "weights.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("file")
    monkeypatch.setattr(peers, "in_int8", copy.deepcopy)
    return tmp_path


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("codebooks")


@pytest.fixture(autouse=True)
def codebooks_are_built_once(kept, monkeypatch):
    """In a session: their names say of which weights and options they are, and a checksum of which images."""
    build = harness.run_build

    def build_once(images, *arguments, out, **options):
        pixels = b"".join(path.read_bytes() for path in sorted(Path(images).rglob("*.jpg")))
        built = kept / f"{hashlib.sha256(pixels).hexdigest()}-{out.name}"
        if not built.exists():
            build(images, *arguments, out=built, **options)
        shutil.copytree(built, out)

    monkeypatch.setattr(harness, "run_build", build_once)


@pytest.fixture
def run(capsys):
    """Exit status, stdout and stderr of a benchmark's main, and nothing raised but what argparse raises."""

    def run_main(main, arguments):
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run_main
