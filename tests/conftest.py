import os
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import settings

from vwt.models.create import create_model

torch.set_num_threads(1)  # models so small are slower on several, above all where the cores are shared
settings.register_profile("vwt", deadline=None, derandomize=True, max_examples=30)
settings.register_profile("random", deadline=None, max_examples=1000, print_blob=True)  # `make test-random`
settings.register_profile("fresh", deadline=None, print_blob=True)  # `make test-fresh`
settings.load_profile("vwt")

ROOT = Path(__file__).parents[1]
TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.fixture(scope="session")
def shared():
    """The folder of real weights, photographs and recorded outputs."""
    default = ROOT / ".." / "shared" / "data"
    path = Path(os.environ.get("VWT_SHARED") or default).resolve()
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}; set VWT_SHARED")
    return path


@pytest.fixture(scope="session")
def vit_tiny(shared):
    """The real ViT-Tiny; read only, it serves the whole session."""
    checkpoint = shared / "models" / f"{TINY}.safetensors"
    if not checkpoint.is_file():
        pytest.skip(f"no weights at {checkpoint}")
    return create_model(TINY, checkpoint)


@pytest.fixture(autouse=True)
def few_runs(monkeypatch):
    """No test asserts how long anything takes, so that latencies need not be measured often."""
    monkeypatch.setattr("vwt.measure.timing.TIMED_RUNS", 1)
    monkeypatch.setattr("vwt.pictures.report.costs.RUNS", 1)


@pytest.fixture
def in_folder(folder, monkeypatch):
    """The fixture `folder` of the module is the current one; builds are of one time, and their processes find vwt."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def small_vit():
    """A model of 160 x 160 pixels in 10 x 10 patches, with random weights that are always the same."""
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=10).eval()
