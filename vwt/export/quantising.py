"""int8 by onnxruntime's own static quantiser, in the linear layers that bear it.

These are the ones that read what a norm put out (queries, keys and values, and the first of an MLP). Attention and GELU
put out few values far from all others, for which one scale of 8 bits is too coarse: with the layers behind them in int8
too, ViT-Tiny kept 79 % of its first classes, without 96 %.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from vwt.errors import ExportError

NORMS = ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization")
RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Transpose")  # which leave the values as they are


def quantise_onnx(path: Path, images: Tensor) -> None:
    """Quantise an ONNX file in place.

    Weights have a scale for each output, and 7 bits, as sums of more overflow on processors without VNNI. Inputs have
    one scale, from the least to the greatest value that the images give.

    Args:
        path: of the file, in float32.
        images: (n, C, H, W) float32 to calibrate on.

    Raises:
        ExportError: if the file has no layer that could be quantised.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        """One image after another, as the quantiser asks for them."""

        def __init__(self) -> None:
            self.images = iter(images.split(1))

        def get_next(self) -> dict[str, Any] | None:
            """See the base class."""
            image = next(self.images, None)
            return None if image is None else {"images": image.numpy()}

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        ready = Path(folder) / "ready.onnx"
        quant_pre_process(path, ready, skip_symbolic_shape=True)
        model = onnx.load(ready, load_external_data=False)
        chosen = layers_after_norms(model.graph)
        if not chosen:
            raise ExportError(f"{path.name} has no linear layer that reads what a norm put out; export it without int8")
        level = logging.root.level
        logging.root.setLevel(logging.ERROR)  # it advises to do what was done
        try:
            quantize_static(
                ready,
                path,
                Reader(),
                quant_format=QuantFormat.QDQ,
                nodes_to_quantize=chosen,
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        finally:
            logging.root.setLevel(level)


def layers_after_norms(graph: Any) -> list[str]:
    """Names of the products with a weight whose other factor is what a norm put out, of an ONNX graph."""
    weights = {tensor.name for tensor in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}

    def reads_norm(name: str) -> bool:
        node = made.get(name)
        while node is not None and node.op_type in RESHAPES:
            node = made.get(node.input[0])
        return node is not None and node.op_type in NORMS

    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    return [node.name for node in products if node.input[1] in weights and reads_norm(node.input[0])]
