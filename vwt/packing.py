"""Images of different token counts as one sequence.

Norms, linear layers and MLPs work on each token by itself, so that the tokens of all images can go through them as one
matrix; only attention must not cross from one image to the next. The model's own blocks are called on the packed
sequence, and the calls that they make to `scaled_dot_product_attention` are answered image by image.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Packed:
    """Token sequences of B images, one after another.

    Attributes:
        values: (T, C), T tokens in all.
        lengths: tokens of each image, prefix tokens included; they sum to T.
        is_dense: whether all images have as many tokens.
    """

    values: Tensor
    lengths: tuple[int, ...]
    is_dense: bool = field(init=False)

    def __post_init__(self) -> None:
        # Stored, so that compiled code can ask without being compiled again for other lengths.
        object.__setattr__(self, "is_dense", all(length == self.lengths[0] for length in self.lengths))

    @property
    def offsets(self) -> Tensor:
        """(B + 1,) int64 on the device of the values: image b owns rows offsets[b]:offsets[b + 1]."""
        return torch.tensor([0, *self.lengths], device=self.values.device).cumsum(0)

    def dense(self) -> Tensor:
        """(B, n, C), where all images have n tokens."""
        return self.values.view(len(self.lengths), -1 if self.lengths else 0, self.values.shape[-1])

    def split(self) -> tuple[Tensor, ...]:
        """One (n, C) for each image."""
        return self.values.split(list(self.lengths))

    def replace(self, values: Tensor) -> "Packed":
        """Other values of the same lengths."""
        return Packed(values, self.lengths)


def pack(prefix: Tensor, merged: Tensor, counts: tuple[int, ...]) -> Packed:
    """Put prefix tokens (B, P, C) before each image's run of merged tokens (T, C).

    Args:
        prefix: class, distillation and register tokens.
        merged: tokens image after image, as `vwt.words.merge` gives them.
        counts: tokens of each image, which sum to T.
    """
    batch, count, width = prefix.shape
    lengths = tuple(count + n for n in counts)
    if len(set(counts)) <= 1:
        dense = torch.cat([prefix, merged.view(batch, -1 if batch else 0, width)], dim=1)
        return Packed(dense.flatten(0, 1), lengths)
    runs = [run for pair in zip(prefix, merged.split(list(counts)), strict=True) for run in pair]
    return Packed(torch.cat(runs), lengths)


def unpack(packed: Packed, prefix: int) -> tuple[Tensor, Tensor]:
    """Inverse of `pack`: prefix tokens (B, P, C) and merged tokens (T, C)."""
    if packed.is_dense:
        dense = packed.dense()
        return dense[:, :prefix], dense[:, prefix:].flatten(0, 1)
    runs = packed.split()
    return torch.stack([run[:prefix] for run in runs]), torch.cat([run[prefix:] for run in runs])


def packable(blocks: nn.Module) -> bool:
    """Whether a sequence of blocks can run on packed images.

    Not in train mode, where stochastic depth draws for each image, and not with attention that is unfused or of an
    unknown kind, which cannot be told where an image ends.
    """
    return not blocks.training and all(
        {getattr(module, "fused_attn", None) for module in block.modules()} <= {None, True}
        and any(hasattr(module, "fused_attn") for module in block.modules())
        for block in blocks.children()
    )


def run_blocks(blocks: Callable[[Tensor], Tensor], packed: Packed, *, crossing: bool = False) -> Packed:
    """Run transformer blocks on packed sequences, each image as if alone.

    Args:
        blocks: from tokens (B, n, C) to tokens of the same shape.
        packed: the sequences.
        crossing: the blocks are not `packable`; images of different lengths run one after another.
    """
    if packed.is_dense:
        return packed.replace(blocks(packed.dense()).flatten(0, 1))
    if crossing:
        return packed.replace(torch.cat([blocks(run[None])[0] for run in packed.split()]))
    with _AttentionWithinImages(packed):
        return packed.replace(blocks(packed.values[None])[0])


class _AttentionWithinImages(TorchFunctionMode):
    """Answers fused attention over a packed sequence (1, H, T, d) image by image.

    On a GPU in half precision that is one call of variable-length attention, else one fused call an image.
    """

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.lengths = list(packed.lengths)
        self.packed = packed

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        if _varlen_takes(query, key, value, [*rest, *kwargs.values()]):
            return self._varlen(query, key, value)
        runs = zip(*(t.split(self.lengths, dim=-2) for t in (query, key, value)), strict=True)
        # Joined in the memory order of tokens, heads last, which is what blocks make of it next.
        attention = F.scaled_dot_product_attention
        outputs = [attention(q, k, v, *rest, **kwargs).transpose(-3, -2) for q, k, v in runs]
        return torch.cat(outputs, dim=-3).transpose(-3, -2)

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))  # (T, H, d)
        offsets, longest = self.packed.offsets.int(), max(self.lengths)
        output = varlen_attn(q, k, v, offsets, offsets, longest, longest)
        return output.transpose(0, 1)[None]  # type: ignore[union-attr]


def _varlen_takes(query: Tensor, key: Tensor, value: Tensor, options: list[Any]) -> bool:
    """Whether variable-length attention, which has one kernel, can stand for the fused call with these options."""
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.dtype == key.dtype == value.dtype
        and query.shape == key.shape == value.shape
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and all(
            option is None or option is False or (isinstance(option, float) and option == 0.0) for option in options
        )
        and torch.cuda.get_device_capability(query.device)[0] >= 8
    )
