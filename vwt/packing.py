"""Images of different token counts as one sequence.

Norms, linear layers and MLPs work on each token by itself, so that the tokens of all images can go through them as one
matrix; only attention must not cross from one image to the next. The model's own blocks are called on the packed
sequence, and the calls that they make to `scaled_dot_product_attention` are answered image by image.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
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
        sizes: (T,) float32, patches that each token stands for; None where all are 1.
        counted: (T,) float32, how often attention counts each token as a key; None where all are 1.
        counts_itself: whether a token does so when it attends to itself.
        is_dense: whether all images have as many tokens.
    """

    values: Tensor
    lengths: tuple[int, ...]
    sizes: Tensor | None = None
    counted: Tensor | None = None
    counts_itself: bool = True
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
        """Other values of the same tokens."""
        return Packed(values, self.lengths, self.sizes, self.counted, self.counts_itself)

    def runs(self, values: Tensor) -> list[Tensor]:
        """What belongs to the tokens (T, ...) as dense tensors (b, n, ...): one of all images, or one for each."""
        if self.is_dense:
            return [values.unflatten(0, (len(self.lengths), -1 if self.lengths else 0))]
        return [run[None] for run in values.split(list(self.lengths))]


def pack(
    prefix: Tensor, merged: Tensor, counts: tuple[int, ...], sizes: Tensor | None = None, proportion: float = 0.0
) -> Packed:
    """Put prefix tokens (B, P, C) before each image's run of merged tokens (T, C).

    Args:
        prefix: class, distillation and register tokens.
        merged: tokens image after image, as `vwt.words.merge` gives them.
        counts: tokens of each image, which sum to T.
        sizes: (T,) float32, patches in each merged token; None where all are 1.
        proportion: p; attention counts a token as size ** p, but once when a token attends to itself.
    """
    lengths = tuple(prefix.shape[1] + n for n in counts)
    if sizes is not None:
        sizes = _join(sizes.new_ones(*prefix.shape[:2], 1), sizes[:, None], counts)[:, 0]
    counted = sizes**proportion if proportion and sizes is not None else None
    return Packed(_join(prefix, merged, counts), lengths, sizes, counted, counts_itself=counted is None)


def _join(prefix: Tensor, merged: Tensor, counts: tuple[int, ...]) -> Tensor:
    batch, _, width = prefix.shape
    if len(set(counts)) <= 1:
        return torch.cat([prefix, merged.view(batch, -1 if batch else 0, width)], dim=1).flatten(0, 1)
    return torch.cat([run for pair in zip(prefix, merged.split(list(counts)), strict=True) for run in pair])


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


def run_blocks(
    blocks: Callable[[Tensor, Tensor | None], Tensor],
    packed: Packed,
    *,
    crossing: bool = False,
    attend: Callable[..., Tensor] | None = None,
) -> Packed:
    """Run transformer blocks on packed sequences, each image as if alone.

    Args:
        blocks: from tokens (B, n, C), and what is added to the attention logits (B, 1, 1, n) or None, to tokens of the
            same shape.
        packed: the sequences.
        crossing: the blocks are not `packable`; images of different lengths run one after another.
        attend: called in the place of F.scaled_dot_product_attention, once for each of `packed.runs`.
    """
    runs, bias = packed.runs(packed.values), _biases(packed)
    if len(runs) > 1 and not crossing:
        with _Attention(attend or F.scaled_dot_product_attention, packed, bias):
            return packed.replace(blocks(packed.values[None], None)[0])
    with nullcontext() if attend is None else _Attention(attend):
        outputs = [blocks(run, extra) for run, extra in zip(runs, bias, strict=True)]
    values = [output.flatten(0, 1) for output in outputs]
    return packed.replace(values[0] if len(values) == 1 else torch.cat(values))


def _biases(packed: Packed) -> list[Tensor | None]:
    """What is added to the attention logits of each of the runs, (b, 1, 1 or n, n) or None."""
    if packed.counted is None:
        return [None] * (1 if packed.is_dense else len(packed.lengths))
    biases = [bias[:, None, None] for bias in packed.runs(packed.counted.log().to(packed.values.dtype))]
    return [bias if packed.counts_itself else _without_diagonal(bias) for bias in biases]


def _without_diagonal(bias: Tensor) -> Tensor:
    """(b, 1, 1, n) for each key, to (b, 1, n, n) that is 0 where query and key are the same token."""
    square = bias.repeat(1, 1, bias.shape[-1], 1)
    square.diagonal(dim1=-2, dim2=-1).zero_()
    return square


class _Attention(TorchFunctionMode):
    """Answers fused attention in another way.

    Over a packed sequence (1, H, T, d) it is answered image by image: with one call an image, or, on a GPU in half
    precision, one call of variable-length attention.

    Args:
        attend: what answers; called like F.scaled_dot_product_attention.
        packed: the sequence, if there is one of images of different lengths.
        bias: for each image of the sequence, (1, 1, 1, n) that is added to the attention logits, or None.
    """

    def __init__(
        self, attend: Callable[..., Tensor], packed: Packed | None = None, bias: Sequence[Tensor | None] = ()
    ) -> None:
        super().__init__()
        self.attend, self.packed, self.bias = attend, packed, bias

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        if self.packed is None:
            return self.attend(*args, **(kwargs or {}))
        return self._attend_packed(self.packed, *args, **(kwargs or {}))

    def _attend_packed(
        self, packed: Packed, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kwargs: Any
    ) -> Tensor:
        options = [*rest, *kwargs.values(), *self.bias]
        if self.attend is F.scaled_dot_product_attention and _varlen_takes(query, key, value, options):
            return self._varlen(packed, query, key, value)
        runs = zip(*(t.split(list(packed.lengths), dim=-2) for t in (query, key, value)), self.bias, strict=True)
        # Joined in the memory order of tokens, heads last, which is what blocks make of it next.
        outputs = [
            self.attend(q, k, v, *rest, **(kwargs if bias is None else {**kwargs, "attn_mask": bias})).transpose(-3, -2)
            for q, k, v, bias in runs
        ]
        return torch.cat(outputs, dim=-3).transpose(-3, -2)

    @staticmethod
    def _varlen(packed: Packed, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))  # (T, H, d)
        offsets, longest = packed.offsets.int(), max(packed.lengths)
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
