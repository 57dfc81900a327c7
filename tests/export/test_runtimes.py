"""Runtimes: each answers as torch does; what is missing, unknown or impossible is said in one line."""

import importlib.util
import shutil

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.export.cases import needs_tracing
from tests.matrix import matrix
from tests.test_tokenizer import make_inter
from vwt import Absorb, IntraImage, Neighbours, PruningSchedule, VWTokenizer
from vwt.errors import ArgumentError, ModelError
from vwt.export.runtimes import RUNTIMES, check_runtime, run_in

pytestmark = needs_tracing

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
REDUCED = {
    "nothing": lambda model: model,
    "intra": lambda model: VWTokenizer(model, IntraImage(0.4)),
    "near": lambda model: VWTokenizer(model, Neighbours(0.4), PruningSchedule({0: Absorb(10)})),
}


@pytest.fixture
def images():
    return torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(1))


def need(runtime):
    try:
        check_runtime(runtime)
    except ArgumentError as error:
        pytest.skip(str(error))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("runtime", "what"),
    matrix(
        [(runtime, what) for runtime in RUNTIMES for what in REDUCED],
        ("torch", "near"),
        ("onnxruntime", "near"),
        ("openvino", "intra"),
    ),
)
def test_a_runtime_answers_as_torch(runtime, what, small_vit, images):
    need(runtime)
    model = REDUCED[what](small_vit)
    run = run_in(runtime, "float32", model, images)
    for batch in (images, images.flip(0)):
        torch.testing.assert_close(run(batch), model(batch), **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize("runtime", matrix(["torch", "compile", "openvino"], "torch"))
def test_a_precision_is_that_of_the_work_not_of_the_answer(runtime, small_vit, images):
    try:
        check_runtime(runtime, "bfloat16")
    except ArgumentError as error:
        pytest.skip(str(error))
    answer, full = run_in(runtime, "bfloat16", small_vit, images)(images), small_vit(images)
    assert answer.dtype == torch.float32
    assert 0 < (answer - full).abs().max() < 0.1 * full.abs().max()
    assert next(small_vit.parameters()).dtype == torch.float32


@pytest.mark.slow
def test_answers_of_one_call_outlive_the_next(small_vit, images):
    need("openvino")
    run = run_in("openvino", "float32", small_vit, images)
    first = run(images)
    kept = first.clone()
    run(images.flip(0))
    assert torch.equal(first, kept)


def test_towers_of_transformers_answer_with_their_vectors(images):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=160
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    with torch.inference_mode():
        assert torch.equal(run_in("torch", "float32", model, images)(images), model(images).logits)


def test_what_is_unknown_is_said():
    with pytest.raises(ArgumentError, match=r"runtime is 'tvm'; expected one of torch, compile, onnxruntime, openvino"):
        check_runtime("tvm")
    with pytest.raises(ArgumentError, match=r"precision is 'int4'; expected one of float32, bfloat16"):
        check_runtime("torch", "int4")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_runtime_that_is_not_installed_names_the_extra(runtime, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == runtime else find(name))
    with pytest.raises(ArgumentError, match=rf"{runtime} needs .*{runtime}.*; pip install 'vwt\[export\]'"):
        check_runtime(runtime)


def test_compilation_without_a_compiler_is_said(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ArgumentError, match="needs a C\\+\\+ compiler"):
        check_runtime("compile")
    check_runtime("compile", device=torch.device("cuda"))


def test_what_a_runtime_cannot_do_is_said():
    need("onnxruntime")
    with pytest.raises(ArgumentError, match="onnxruntime has no bfloat16 on a CPU"):
        check_runtime("onnxruntime", "bfloat16")
    with pytest.raises(ArgumentError, match="the model is on cuda:0; move it there"):
        check_runtime("onnxruntime", device=torch.device("cuda:0"))


def test_models_that_no_runtime_takes_are_said(small_vit, images):
    need("onnxruntime")
    with pytest.raises(ArgumentError, match="gives every image its own number of tokens"):
        run_in("onnxruntime", "float32", VWTokenizer(small_vit, make_inter(small_vit, "pixel")), images)
    with pytest.raises(ModelError, match="Linear"):
        run_in("torch", "float32", nn.Linear(2, 2), images)


@pytest.mark.slow
@torch.inference_mode()
def test_many_models_are_compiled_each_once(images):
    """torch.compile gives up on a function that it has compiled eight times."""
    need("compile")
    torch._dynamo.reset()
    counters.clear()
    for index in range(10):
        torch.manual_seed(index)
        model = VWTokenizer(timm.create_model("test_vit", depth=1).eval(), IntraImage(0.04 * index))
        torch.testing.assert_close(run_in("compile", "float32", model, images)(images), model(images), **CLOSE)
    assert counters["frames"]["ok"] >= 10
    assert not counters["unimplemented"]
