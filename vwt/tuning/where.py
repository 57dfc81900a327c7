"""Where a model is measured: its device, runtime and precision, and how files name them."""

import copy
from typing import Any

import torch
from torch import nn

from vwt.errors import ArgumentError, DocumentError, brief
from vwt.export.runtimes import RUNTIMES, TORCH_PRECISIONS, check_runtime, in_precision, precision_of


def place(model: nn.Module, device: torch.device | str | None, runtime: str, precision: str | None) -> nn.Module:
    """The model, or a copy, where and in the precision that it is measured in.

    Raises:
        ArgumentError: if there is no such device, or the runtime is not here or cannot do that.
    """
    own, target = next(model.parameters()).device, None if device is None else torch.device(device)
    check_runtime(runtime, precision or precision_of(model), target or own)
    if target is not None and target != own:
        try:
            model = copy.deepcopy(model).to(target)
        except (RuntimeError, AssertionError) as error:
            raise ArgumentError(f"no device {str(device)!r}: {error}") from error
    return in_precision(model, precision or precision_of(model))


def name_runtime(found: dict[str, Any]) -> dict[str, Any]:
    """Fields of a profile or plan; older ones are torch's, and say dtype for precision."""
    if "dtype" not in found or {"runtime", "precision"} & set(found):
        return found
    return {name: value for name, value in found.items() if name != "dtype"} | {
        "runtime": "torch",
        "precision": found["dtype"],
    }


def check_where(runtime: Any, precision: Any, origin: str, advice: str) -> None:
    """Raise DocumentError unless these values of a file are a runtime and a precision."""
    for what, value, known in (("runtime", runtime, RUNTIMES), ("precision", precision, TORCH_PRECISIONS)):
        if value not in known:
            raise DocumentError(f"{origin} has {what} {brief(value)}; expected one of {', '.join(known)}; {advice}")
