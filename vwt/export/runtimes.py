"""What runs a model: torch itself, torch.compile, onnxruntime or OpenVINO."""

import copy
import importlib.util
import inspect
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vwt.errors import ArgumentError, ModelError
from vwt.export.formats import BATCH, Run, open_onnx, open_openvino, write_onnx
from vwt.models.spec import family_of
from vwt.tokenizer import VWTokenizer

RUNTIMES = ("torch", "compile", "onnxruntime", "openvino")
EXPORTED = ("onnxruntime", "openvino")  # which read a file
PRECISIONS = ("float32", "bfloat16")
TORCH_PRECISIONS = (*PRECISIONS, "float16", "float64")
OLDEST = (2, 10)  # torch that traces reduced models

# What each needs beside torch; the extra `export` has it.
_PACKAGES = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}


class Answer(nn.Module):
    """Images (B, C, H, W) float32 to the model's answer (B, D) float32, whatever the model's precision.

    Args:
        model: of timm or transformers, or a VWTokenizer; not changed.
        precision: what it computes in.
    """

    def __init__(self, model: nn.Module, precision: str = "float32") -> None:
        super().__init__()
        self.family = model.family if isinstance(model, VWTokenizer) else family_of(model)
        if self.family.parent is not None:
            raise ModelError(f"{type(model).__name__} is a model of images and text; take its vision tower")
        self.dtype = getattr(torch, precision)
        self.model = in_precision(model, precision)
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        """See above."""
        return self.family.vectors(self.model(images.to(self.dtype))).float()


def precision_of(model: nn.Module) -> str:
    """Of its weights: "float32"."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """The model, or a copy with weights of this precision."""
    return model if precision_of(model) == precision else copy.deepcopy(model).to(getattr(torch, precision))


def can_trace() -> bool:
    """Whether the installed torch traces reduced models."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= OLDEST


def check_runtime(runtime: str, precision: str = "float32", device: torch.device | None = None) -> None:
    """Raise ArgumentError unless a runtime is here, and computes in a precision on a device (by default the CPU)."""
    precisions = TORCH_PRECISIONS if runtime in ("torch", "compile") else PRECISIONS
    for what, value, known in (("runtime", runtime, RUNTIMES), ("precision", precision, precisions)):
        if value not in known:
            raise ArgumentError(f"{what} is {value!r}; expected one of {', '.join(known)}")
    if runtime != "torch" and not can_trace():
        raise ArgumentError(f"{runtime} needs torch 2.10 or newer, and this is torch {torch.__version__}; update torch")
    on_cpu = device is None or device.type == "cpu"
    if runtime == "compile" and on_cpu and not shutil.which(os.environ.get("CXX", "g++")):
        raise ArgumentError("torch.compile needs a C++ compiler; install g++, or name another in the variable CXX")
    missing = [name for name in _PACKAGES.get(runtime, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise ArgumentError(f"{runtime} needs {', '.join(missing)}, not installed; pip install 'vwt[export]'")
    if runtime in _PACKAGES and not on_cpu:
        raise ArgumentError(f"{runtime} is used on the CPU, and the model is on {device}; move it there")
    if runtime == "onnxruntime" and precision != "float32":
        raise ArgumentError(f"onnxruntime has no {precision} on a CPU; take float32, or another runtime")
    if runtime == "openvino" and precision == "bfloat16":
        import openvino

        if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ArgumentError("OpenVINO has no bfloat16 on this CPU; take float32, or another runtime")


def run_in(runtime: str, precision: str, model: nn.Module, example: Tensor) -> Run:
    """A model in a runtime: what takes images (B, C, H, W) float32 to its answer (B, D) float32.

    Threads are as many as torch has when this is called.

    Args:
        runtime: "torch", "compile", "onnxruntime" or "openvino".
        precision: "float32" or "bfloat16", which it computes in; images and answer are float32 all the same.
        model: of timm or transformers, or a VWTokenizer, in eval mode; not changed.
        example: (B, C, H, W) images of the shape that it will be called with.

    Raises:
        ArgumentError, ExportError: if the runtime is unknown, not installed, or cannot hold this model or precision.
    """
    check_runtime(runtime, precision, example.device)
    return run_module(runtime, precision, Answer(model, written_in(runtime, precision)), example)


def written_in(runtime: str, precision: str) -> str:
    """The precision of the weights: OpenVINO computes in bfloat16 what is written in float32."""
    return "float32" if runtime == "openvino" else precision


def runtime_version(runtime: str) -> dict[str, str]:
    """The version of a runtime by its name; nothing for those that are torch's own."""
    return {runtime: version(runtime)} if runtime in _PACKAGES else {}


def run_module(
    runtime: str, precision: str, answer: nn.Module, example: Tensor, free: Mapping[int, str] | None = None
) -> Run:
    """As `run_in`, of any module from images (B, C, H, W) float32 to an answer (B, D) float32.

    Args:
        runtime: see `run_in`.
        precision: see `run_in`; the module itself is `written_in` it.
        answer: what runs, see `Answer`.
        example: see `run_in`.
        free: names of its dimensions that may differ from the example's.

    Raises:
        ArgumentError, ExportError: if the runtime cannot hold it.
    """
    if runtime == "torch":
        return answer
    if runtime == "compile":
        return compile_alone(answer)
    shape = tuple(example.shape) if free is None else None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(answer, example, path, free=BATCH if free is None else free)
        return (open_onnx if runtime == "onnxruntime" else open_openvino)(path, precision, shape)


def compile_alone(module: nn.Module) -> Run:
    """torch.compile, for which other compiled models do not count as recompilations, as far as torch can."""
    isolates = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {"isolate_recompiles": True} if isolates else {}
    return torch.compile(module, **options)
