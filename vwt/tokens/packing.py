"""Images of different token counts as one sequence.

Norms, linear layers and MLPs work on each token by itself, so that the tokens of all images can go through them as one
matrix; only attention must not cross from one image to the next. The model's own blocks are called on the packed
sequence, and the calls that they make to `scaled_dot_product_attention` are answered image by image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vwt.tokens.positions import PREFIX, Positions
from vwt.tokens.tensors import Equal, count_images, flat_index, lengthen


@dataclass(eq=False)  # not frozen, which takes time at every block
class Packed:
    """Token sequences of B images, one after another.

    Attributes:
        values: (T, C), T tokens in all.
        lengths: tokens of each image, prefix tokens included; they sum to T.
        sizes: (T,) float32, patches that each token stands for; None where all are 1.
        key_size: (T,) float32, how often attention counts each token as a key; None where all are 1.
        places: where the tokens are, for models whose attention asks for it; else None.
        bias_on_self: whether a token is counted so by itself too.
        memo: what follows from all but the values, once it has been asked for; blocks on the same tokens share it.
        images: B.
        is_dense: whether all images have as many tokens.
    """

    values: Tensor
    lengths: Sequence[int]
    sizes: Tensor | None = None
    key_size: Tensor | None = None
    places: Positions | None = None
    bias_on_self: bool = True
    memo: dict[Any, Any] = field(init=False, default_factory=dict, repr=False)
    images: int = field(init=False)
    is_dense: bool = field(init=False)

    def __post_init__(self) -> None:
        # Stored, so that compiled code can ask without being compiled again for other lengths.
        self.images = count_images(self.lengths)
        # Compared one by one: a set of lengths would be a guard on each of them.
        self.is_dense = type(self.lengths) is Equal or all(length == self.lengths[0] for length in self.lengths)

    @property
    def offsets(self) -> Tensor:
        """(B + 1,) int64 on the device of the values: image b owns rows offsets[b]:offsets[b + 1]."""
        return torch.tensor([0, *self.lengths], device=self.values.device).cumsum(0)

    def dense(self) -> Tensor:
        """(B, n, C), where all images have n tokens."""
        return self.runs(self.values)[0]

    def split(self) -> tuple[Tensor, ...]:
        """One (n, C) for each image."""
        return self.values.split(list(self.lengths))

    def replace(self, values: Tensor) -> "Packed":
        """Other values of the same tokens."""
        other = Packed(values, self.lengths, self.sizes, self.key_size, self.places, self.bias_on_self)
        other.memo = self.memo
        return other

    def take(self, index: Tensor) -> "Packed":
        """Some tokens (b, k) int64 of each image, where all images have as many; prefix tokens must be among them."""
        count = len(self.values) // max(len(self.lengths), 1)
        flat = flat_index(index, count)
        lengths = (index.shape[1],) * len(index)
        sizes, key_size = (None if value is None else value[flat] for value in (self.sizes, self.key_size))
        places = self.places and self.places.replace(self.places.rows[flat], lengths, whole=self.places.whole)
        return Packed(self.values[flat], lengths, sizes, key_size, places, self.bias_on_self)

    def runs(self, values: Tensor) -> list[Tensor]:
        """What belongs to the tokens (T, ...) as dense tensors (b, n, ...): one of all images, or one for each."""
        if self.is_dense:
            return [values.view(self.images, self.lengths[0] if self.images else 0, *values.shape[1:])]
        return [run[None] for run in values.split(list(self.lengths))]


def pack(
    prefix: Tensor,
    merged: Tensor,
    counts: Sequence[int],
    sizes: Tensor | None = None,
    places: tuple[Positions, Tensor] | None = None,
    size_exponent: float = 0.0,
) -> Packed:
    """Put prefix tokens (B, P, C) before each image's run of merged tokens (T, C).

    Args:
        prefix: class, distillation and register tokens.
        merged: tokens image after image, as `vwt.tokens.words.merge` gives them.
        counts: tokens of each image, which sum to T.
        sizes: (T,) float32, patches in each merged token; None where all are 1.
        places: of all patches, and (T, 2) float32 where each merged token is.
        size_exponent: p; attention counts a token as size ** p, but once when a token attends to itself.
    """
    lengths = lengthen(counts, prefix.shape[1])
    if sizes is not None:
        sizes = _join(sizes.new_ones(*prefix.shape[:2], 1), sizes[:, None], counts)[:, 0]
    key_size = sizes**size_exponent if size_exponent and sizes is not None else None
    moved = None
    if places is not None:
        every, at = places
        moved = every.replace(
            _join(at.new_full((*prefix.shape[:2], 2), PREFIX), at, counts), lengths, whole=every.whole
        )
    return Packed(_join(prefix, merged, counts), lengths, sizes, key_size, moved, bias_on_self=key_size is None)


def _join(prefix: Tensor, merged: Tensor, counts: Sequence[int]) -> Tensor:
    batch, _, width = prefix.shape
    if type(counts) is Equal or len(set(counts)) <= 1:
        return torch.cat([prefix, merged.view(batch, counts[0] if count_images(counts) else 0, width)], dim=1).flatten(
            0, 1
        )
    return torch.cat([run for pair in zip(prefix, merged.split(list(counts)), strict=True) for run in pair])


def prefix_tokens(packed: Packed, prefix: int) -> Tensor:
    """The first P tokens of each image: (B, P, C)."""
    if packed.is_dense:
        return packed.dense()[:, :prefix]
    return torch.stack([run[:prefix] for run in packed.split()])


def unpack(packed: Packed, prefix: int) -> tuple[Tensor, Tensor]:
    """Inverse of `pack`: prefix tokens (B, P, C) and merged tokens (T, C)."""
    if packed.is_dense:
        merged = packed.dense()[:, prefix:].flatten(0, 1)
    else:
        merged = torch.cat([run[prefix:] for run in packed.split()])
    return prefix_tokens(packed, prefix), merged
