"""int8: only layers that bear it, calibrated on other images than the file is checked on, kept where it agrees."""

import json
from dataclasses import replace

import pytest
import torch

from tests.export.cases import needs_tracing
from tests.export.test_exporting import make_plan, need, read_onnx
from vwt import Absorb, PruningSchedule, VWTokenizer
from vwt.cli import main
from vwt.errors import ArgumentError, ExportError
from vwt.export import exporting
from vwt.export.exporting import CALIBRATED, LEAST, export, least_images
from vwt.export.formats import FORMATS
from vwt.export.quantising import layers_after_norms

pytestmark = needs_tracing
onnx = pytest.importorskip("onnx")


def test_layers_that_read_what_a_norm_put_out():
    node = onnx.helper.make_node
    nodes = [
        node("LayerNormalization", ["x", "scale"], ["normed"], name="norm"),
        node("MatMul", ["normed", "w"], ["a"], name="queries"),
        node("Reshape", ["normed", "shape"], ["flat"], name="reshape"),
        node("Gemm", ["flat", "w"], ["b"], name="fc1"),
        node("Gelu", ["b"], ["c"], name="gelu"),
        node("MatMul", ["c", "w"], ["d"], name="fc2"),
        node("MatMul", ["normed", "a"], ["e"], name="attention"),
        node("Gather", ["normed", "index"], ["f"], name="class token"),
        node("Gemm", ["f", "w"], ["g"], name="head"),
        node("MatMul", ["x", "w"], ["h"], name="first"),
    ]
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [1.0])
    graph = onnx.helper.make_graph(nodes, "graph", [], [], initializer=[weight])
    assert layers_after_norms(graph) == ["queries", "fc1"]


@pytest.mark.slow
def test_an_int8_file_answers_photographs_nearly_as_the_model(vit_tiny, photographs, tmp_path):
    need(".onnx")
    fast = VWTokenizer(vit_tiny, None, PruningSchedule({3: Absorb(98)}))
    images = torch.cat([photographs.flip(3), photographs])
    parity = export(fast, tmp_path / "fast.onnx", images, int8=True, progress=False)
    assert (parity.precision, parity.images) == ("int8", 64)
    assert parity.agreement >= 0.9
    nodes = onnx.load(tmp_path / "fast.onnx").graph.node
    assert "QuantizeLinear" in {node.op_type for node in nodes}
    said = json.loads(read_onnx(tmp_path / "fast.onnx"))
    assert said["precision"] == "int8"
    assert [file.name for file in tmp_path.iterdir()] == ["fast.onnx"]


@pytest.fixture
def fake(fast, monkeypatch):
    """Files that are not written, and answer as the model does or otherwise; images that they are calibrated on."""
    calibrated, answer = [], {"run": fast}
    monkeypatch.setattr(exporting, "quantise_onnx", lambda path, images: calibrated.append(images))
    kind = replace(FORMATS[".onnx"], write=lambda *_: None, open=lambda *_: lambda images: answer["run"](images))
    monkeypatch.setitem(exporting.FORMATS, ".onnx", kind)
    return calibrated, answer


@pytest.fixture
def more(images):
    return torch.cat([images.flip(3), images])


def test_images_are_for_calibration_or_for_the_check(fast, fake, more, tmp_path):
    need(".onnx")
    parity = export(fast, tmp_path / "fast.onnx", more, int8=True, progress=False)
    assert [torch.equal(images, more[:CALIBRATED]) for images in fake[0]] == [True]
    assert (parity.images, parity.agreement, parity.precision) == (64, 1.0, "int8")
    assert str(parity).startswith(f"{tmp_path}/fast.onnx: for onnxruntime, int8, any number of images")


def test_an_int8_file_that_does_not_agree_is_refused(fast, fake, more, tmp_path):
    need(".onnx")
    fake[1]["run"] = lambda images: fast(images).flip(1)
    with pytest.raises(ExportError, match=r"agreement [\d.]+ % \(expected at least 90 %\)") as error:
        export(fast, tmp_path / "fast.onnx", more, int8=True, progress=False)
    assert "\n" not in str(error.value)


def test_what_int8_needs_is_said_before_the_work(fast, images, small_vit, tmp_path, capsys):
    need(".onnx")
    need(".xml")
    with pytest.raises(ArgumentError, match="127 images; an exported model is checked on at least 128"):
        export(fast, tmp_path / "fast.onnx", torch.cat([images, images[1:]]), int8=True)
    with pytest.raises(ArgumentError, match=r"int8 is for onnxruntime, not for openvino; name the file NAME\.onnx"):
        export(fast, tmp_path / "fast.xml", images, int8=True)
    assert least_images(100, True) == 100 + CALIBRATED
    assert least_images(1, False) == LEAST
    make_plan(small_vit).save(tmp_path / "plan.json")
    call = ["export", "--plan", f"{tmp_path}/plan.json", "--model", "test_vit", "--images", f"{tmp_path}", "--int8"]
    assert main([*call, "--to", f"{tmp_path}/fast.onnx", "--count", "127"]) == 2
    assert capsys.readouterr().err == "vwt: --count is 127; expected at least 128\n"
    assert main([*call, "--to", f"{tmp_path}/fast.xml"]) == 2
    assert "int8 is for onnxruntime, not for openvino" in capsys.readouterr().err
