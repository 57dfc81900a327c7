"""The files of exported models: ONNX, OpenVINO IR, AOTInductor package.

All take images (B, C, H, W) float32, for any B, as input "images", and answer (B, D) float32 as "output".
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vwt.errors import ArgumentError, ExportError, first_line

Run: TypeAlias = Callable[[Tensor], Tensor]

_IN_ONE_FILE = 2**31 - 2**20  # bytes of weights in an ONNX file, as protobuf holds no more

BATCH = {0: "batch"}  # the dimension of images that is free


def _free(example: Tensor, dimensions: Mapping[int, str]) -> tuple[Tensor, tuple[dict[int, Any]]]:
    """An example for torch.export, and its free dimensions: of size two, as one is taken to be always one."""
    for dimension in dimensions:
        example = torch.cat([example.narrow(dimension, 0, 1)] * 2, dim=dimension)
    return example, ({dimension: torch.export.Dim(name, min=1) for dimension, name in dimensions.items()},)


def _refuse(error: BaseException, target: str) -> ExportError | ArgumentError:
    """What to raise for an error of an exporter: what vwt said on the way, or the exporter's own first line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ArgumentError):
            return cause
        error, cause = cause, cause.__cause__
    return ExportError(f"the model cannot be exported to {target}: {first_line(error)}")


# -- ONNX --------------------------------------------------------------------------------------------------------------


def write_onnx(
    answer: nn.Module,
    example: Tensor,
    path: Path,
    metadata: Mapping[str, str] | None = None,
    free: Mapping[int, str] = BATCH,
) -> None:
    """Write a module as ONNX; weights of more than 2 GB go into a file beside it.

    Args:
        answer: from images (B, C, H, W) float32 to (B, D) float32.
        example: images.
        path: NAME.onnx.
        metadata: what the file says of itself.
        free: names of the dimensions of its input that may be of any size.

    Raises:
        ArgumentError, ExportError: if it cannot be exported; says why.
    """
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["output"]}
    example, shapes = _free(example, free)
    try:
        with torch.no_grad():
            program = torch.onnx.export(answer, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    except Exception as error:  # of torch.export, or of the translation
        raise _refuse(error, "ONNX") from error
    assert program is not None  # which it is with dynamo
    program.model.metadata_props.update(metadata or {})
    size = sum(tensor.numel() * tensor.element_size() for tensor in answer.state_dict().values())
    program.save(path, external_data=size > _IN_ONE_FILE)


def open_onnx(path: Path, precision: str = "float32", shape: tuple[int, ...] | None = None) -> Run:
    """An ONNX file in onnxruntime, on the CPU; faster if the shape of the images is known."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads else wait for more work, in the way of whatever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if shape is not None:
        options.add_free_dimension_override_by_name("batch", shape[0])
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return run


# -- OpenVINO ----------------------------------------------------------------------------------------------------------


def write_openvino(answer: nn.Module, example: Tensor, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a module as OpenVINO IR, NAME.xml and NAME.bin, in float32; see `write_onnx`."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder) / "model.onnx"
        write_onnx(answer, example, onnx)
        try:
            model = openvino.Core().read_model(onnx)
            for name, value in (metadata or {}).items():
                model.set_rt_info(value, name)
            openvino.save_model(model, path, compress_to_fp16=False)
        except RuntimeError as error:  # of its translation, or of the disk
            raise _refuse(error, "OpenVINO") from error


def open_openvino(path: Path, precision: str = "float32", shape: tuple[int, ...] | None = None) -> Run:
    """An OpenVINO IR or ONNX file in OpenVINO, on the CPU; faster if the shape of the images is known."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    if shape is not None:
        model.reshape(list(shape))
    hints = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    compiled = core.compile_model(model, "CPU", hints)

    def run(images: Tensor) -> Tensor:
        # A copy: the next call writes its answer in the same place.
        return torch.from_numpy(compiled(images.numpy())[0].copy())

    return run


# -- AOTInductor -------------------------------------------------------------------------------------------------------


def write_package(answer: nn.Module, example: Tensor, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a module as AOTInductor package, which holds code for this kind of machine; see `write_onnx`."""
    example, shapes = _free(example, BATCH)
    try:
        with torch.no_grad():
            program = torch.export.export(answer, (example,), dynamic_shapes=shapes)
            options = {"aot_inductor.metadata": dict(metadata or {})}
            torch._inductor.aoti_compile_and_package(program, package_path=os.fspath(path), inductor_configs=options)
    except Exception as error:  # of torch.export, inductor, or the C++ compiler
        raise _refuse(error, "AOTInductor") from error


def open_package(path: Path, precision: str = "float32", shape: tuple[int, ...] | None = None) -> Run:
    """An AOTInductor package, where it was compiled for."""
    return torch._inductor.aoti_load_package(os.fspath(path))


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        runtime: that runs it.
        write: see `write_onnx`.
        open: the file, the precision that it was exported in, and the shape of images (None for any number of them) to
            what runs it, with as many threads as torch has.
    """

    runtime: str
    write: Callable[[nn.Module, Tensor, Path, Mapping[str, str] | None], None]
    open: Callable[[Path, str, tuple[int, ...] | None], Run]


FORMATS = {
    ".onnx": Format("onnxruntime", write_onnx, open_onnx),
    ".xml": Format("openvino", write_openvino, open_openvino),
    ".pt2": Format("compile", write_package, open_package),
}
