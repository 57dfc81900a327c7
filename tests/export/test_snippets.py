"""What docs/export.md says: files are written with vwt, and run without it."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import vwt
from tests.export.cases import needs_tracing
from tests.export.test_exporting import make_plan
from tests.test_datasets import write_images
from tests.test_docs import ROOT, snippets
from vwt.datasets import read_image
from vwt.models.spec import prepare

pytestmark = needs_tracing

ALONE = """
import sys

sys.modules |= dict.fromkeys(["vwt", "torch", "timm"])  # importing them fails
{program}
np.save("answers.npy", answers)
"""


@pytest.mark.slow
@torch.inference_mode()
def test_files_run_without_vwt(small_vit, tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "path" / "to" / "images", count=64)
    make_plan(small_vit).save("plan.json")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 240, 3), np.uint8)).save("photo.jpg")
    writing, in_onnxruntime, in_openvino, _ = (code for code, _ in snippets(ROOT / "docs" / "export.md", "python"))
    exec(compile(writing, "export.md", "exec"), {"vwt": vwt, "model": small_vit})
    fast = vwt.Plan.load("plan.json").apply(small_vit, force=True)
    expected = fast(prepare(read_image("photo.jpg", small_vit)[None], small_vit))
    for program in (in_onnxruntime, in_onnxruntime + in_openvino):
        subprocess.run([sys.executable, "-c", ALONE.format(program=program)], check=True)
        np.testing.assert_allclose(np.load("answers.npy"), expected, atol=1e-4, rtol=1e-4)
