"""Small helpers over tensors."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class lazy_property(Generic[Value]):
    """functools.cached_property without its lock, which torch.compile cannot trace."""

    def __init__(self, compute: Callable[[Any], Value]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Value:
        if instance is None:
            return self  # type: ignore[return-value]
        value = instance.__dict__[self.name] = self.compute(instance)
        return value


def flat_index(index: Tensor, count: int) -> Tensor:
    """Places (B, k) in images of `count` rows each, to rows (B·k,) of all images one after another."""
    if len(index) == 1:
        return index[0]
    return (index + count * torch.arange(len(index), device=index.device)[:, None]).flatten()


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Without autocast, which would compare patches in half precision."""
    kind = device.type
    # Only then, as a context costs time and hinders export.
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def select(values: Tensor, index: Tensor) -> Tensor:
    """Rows of values (B, n, C) at the places (B, k) int64 of each image: (B, k, C)."""
    rows = values.flatten(0, 1).index_select(0, flat_index(index, values.shape[1]))
    return rows.view(*index.shape, values.shape[2])
