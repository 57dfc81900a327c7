"""Small helpers over tensors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
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


class Equal(Sequence[int]):
    """The same number of tokens for each of some images, as a tuple, except that the images may be of any number.

    torch.export and torch.compile fix the number of a tuple's members. Asked for by `type`, as `isinstance` takes long
    for a Sequence.
    """

    def __init__(self, length: int, images: int) -> None:
        self.length, self.images = length, images

    def __getitem__(self, index: Any) -> Any:
        return self.length if isinstance(index, int) else tuple(self)[index]

    def __len__(self) -> int:
        return self.images

    def __iter__(self) -> Iterator[int]:
        return iter((self.length,) * self.images)


def equal_lengths(length: int, images: int) -> Sequence[int]:
    """So many tokens for each image."""
    return Equal(length, images) if torch.compiler.is_compiling() else (length,) * images


def count_images(lengths: Sequence[int]) -> int:
    """How many images have these lengths."""
    return lengths.images if type(lengths) is Equal else len(lengths)


def lengthen(lengths: Sequence[int], by: int) -> Sequence[int]:
    """So many tokens more for each image, or fewer."""
    if type(lengths) is Equal:
        return Equal(lengths.length + by, lengths.images)
    return tuple(length + by for length in lengths)


def numbers(count: int, device: torch.device) -> Tensor:
    """0, 1, ..., count - 1, made once; not to be changed."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # which fold constants themselves
        return torch.arange(count, device=device)
    return _numbers(count, device)


@lru_cache(maxsize=256)
def _numbers(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # they serve later calls, with gradients too
        return torch.arange(count, device=device)


def flat_index(index: Tensor, count: int) -> Tensor:
    """Places (B, k) in images of `count` rows each, to rows (B·k,) of all images one after another."""
    if index.shape[0] == 1:
        return index[0]
    return (index + count * numbers(index.shape[0], index.device)[:, None]).flatten()


def sum_at(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Values (B, m) or (B, m, C) at places (B, m) in [0, count) to the sums of what is at each: (B, count[, C])."""
    if torch.compiler.is_exporting():
        # As a product of matrices: other runtimes are slow to add by index, or add what collides only once.
        at = index[:, None] == torch.arange(count, device=index.device)[:, None]  # (B, count, m)
        sums = at.to(values.dtype) @ (values if values.ndim == 3 else values[..., None])
        return sums if values.ndim == 3 else sums[..., 0]
    if values.ndim == 2:
        return values.new_zeros(values.shape[0], count).scatter_add(1, index, values)
    sums = values.new_zeros(values.shape[0] * count, values.shape[2])
    return sums.index_add(0, flat_index(index, count), values.flatten(0, 1)).view(-1, count, values.shape[2])


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Without autocast, which would compare patches in half precision."""
    kind = device.type
    # Only then, as a context costs time and hinders export.
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def select(values: Tensor, index: Tensor) -> Tensor:
    """Rows of values (B, n, C) at the places (B, k) int64 of each image: (B, k, C)."""
    rows = values.flatten(0, 1).index_select(0, flat_index(index, values.shape[1]))
    return rows.view(*index.shape, values.shape[2])
