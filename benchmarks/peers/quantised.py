"""The full model in fewer bits: what can be had without removing tokens."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vwt.errors import ArgumentError, first_line


def in_bfloat16(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A copy of the model in bfloat16."""
    if next(model.parameters()).dtype == torch.bfloat16:
        raise ArgumentError("the full model is in bfloat16 already")
    low: Any = copy.deepcopy(model).bfloat16()
    return lambda images: low(images.bfloat16())


def in_int8(model: nn.Module) -> nn.Module:
    """A copy of the model with weights in int8, and activations brought to int8 as they come, by torchao.

    Raises:
        ArgumentError: if torchao is not there, or cannot do it.
    """
    try:
        logging.disable(logging.WARNING)  # of torch, about how torchao uses it
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        low = copy.deepcopy(model)
        quantize_(low, Int8DynamicActivationInt8WeightConfig())
    except ModuleNotFoundError as error:
        raise ArgumentError("torchao is not installed; pip install 'vwt[int8]'") from error
    except Exception as error:  # of whichever kernel this device lacks
        raise ArgumentError(f"torchao cannot quantize it: {first_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)
    return low
