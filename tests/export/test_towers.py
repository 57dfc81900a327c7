"""transformers' vision towers as ONNX, on fewer tokens: what onnxruntime answers to any number of images."""

import pytest
import torch

from tests.export.cases import needs_tracing
from tests.matrix import matrix
from vwt import Absorb, Merge, Neighbours, PruningSchedule, VWTokenizer
from vwt.export.formats import open_onnx, write_onnx
from vwt.export.runtimes import Answer

pytest.importorskip("transformers", reason="transformers is not installed; pip install vwt[hf]")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; pip install vwt[export]")
pytest.importorskip("onnxscript", reason="onnxscript is not installed; pip install vwt[export]")

from tests.models.test_hf import MODELS, make_model

pytestmark = needs_tracing
REDUCED = {
    "absorb": (None, PruningSchedule({0: Absorb(0.3)})),
    "near": (Neighbours(0.2), PruningSchedule({0: Absorb(3), 1: Merge(2)})),
}


CASES = [(name, how) for name in MODELS for how in REDUCED]


@torch.no_grad()
@pytest.mark.parametrize(("name", "how"), matrix(CASES, ("siglip-classifier", "absorb")))
def test_every_tower(name, how, tmp_path):
    fast = VWTokenizer(make_model(name), *REDUCED[how])
    images = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert fast.family.ABILITIES.export is True, "the table of `vwt models` says that it can be exported"
    write_onnx(Answer(fast, "float32"), images[:2], tmp_path / "fast.onnx")
    run = open_onnx(tmp_path / "fast.onnx")
    answers = torch.cat([run(images[:1]), run(images[1:])])
    torch.testing.assert_close(answers, Answer(fast, "float32")(images), atol=1e-4, rtol=1e-4)
