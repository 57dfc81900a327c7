"""Blocks and their attention over packed images.

Norms, linear layers and MLPs work on each token by itself; only attention must not cross from one image to the next.
The model's own blocks are called on the packed sequence, and the calls that they make to
`scaled_dot_product_attention` are answered image by image.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vwt.errors import ArgumentError
from vwt.tokens.packing import Packed
from vwt.tokens.positions import gather_bias

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class BlockInputs:
    """What blocks are given beside tokens (b, n, C).

    Attributes:
        bias: (b, 1, 1, n), added to the attention logits; None for nothing.
        rotary: the tokens' rotary embedding (see `Positions`); None where they have none.
    """

    bias: Tensor | None = None
    rotary: Tensor | None = None


def fuses(block: nn.Module) -> bool:
    """Whether all attention in a block is fused, as far as is known of it."""
    flags = [module.fused_attn for module in block.modules() if hasattr(module, "fused_attn")]
    return bool(flags) and all(flags)


def packable(blocks: nn.Module) -> bool:
    """Whether a sequence of blocks can run on packed images.

    Not with stochastic depth in train mode, which draws for each image, and not with attention that is unfused or of an
    unknown kind, which cannot be told where an image ends.
    """
    return not drops_paths(blocks) and all(fuses(block) for block in blocks.children())


def drops_paths(blocks: nn.Module) -> bool:
    """Whether blocks are skipped at random, as in train mode with stochastic depth."""
    return blocks.training and any(getattr(module, "drop_prob", 0.0) for module in blocks.modules())


def run_blocks(
    blocks: Callable[[Tensor, BlockInputs | None], Tensor],
    packed: Packed,
    *,
    one_by_one: bool = False,
    attend: Callable[..., Tensor] | None = None,
) -> Packed:
    """Run transformer blocks on packed sequences, each image as if alone.

    Args:
        blocks: from tokens (b, n, C), and what they are given beside them, to tokens of the same shape.
        packed: the sequences.
        one_by_one: the blocks are not `packable`; images of different lengths run one after another.
        attend: called in the place of F.scaled_dot_product_attention, once for each of `packed.runs`.
    """
    runs = packed.runs(packed.values)
    together = len(runs) > 1 and not one_by_one
    biases, chosen, rotary = _attended(packed, together)
    if together:
        attends = [_adjust(attend, *each) for each in zip(biases, chosen, strict=True)]
        with _Attention(attends, packed):
            return packed.replace(blocks(packed.values[None], _block_inputs(None, rotary[0]))[0])
    outputs = []
    for run, bias, index, turn in zip(runs, biases, chosen, rotary, strict=True):
        answer = attend if index is None else _adjust(attend, bias, index)
        # No mode where none is needed: it costs time in every operation of the blocks.
        with nullcontext() if answer is None else _Attention([answer]):
            outputs.append(blocks(run, _block_inputs(bias if index is None else None, turn)).flatten(0, 1))
    return packed.replace(outputs[0] if len(outputs) == 1 else torch.cat(outputs))


def _attended(packed: Packed, together: bool) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """`_biases`, `_chosen` and `_rotary`, made once for all blocks that the same tokens go through."""
    key = ("attended", together, packed.values.dtype)
    if key not in packed.memo:
        packed.memo[key] = _biases(packed), _chosen(packed), _rotary(packed, together)
    return packed.memo[key]


def _block_inputs(bias: Tensor | None, rotary: Tensor | None) -> BlockInputs | None:
    return None if bias is None and rotary is None else BlockInputs(bias, rotary)


def _biases(packed: Packed) -> Sequence[Tensor | None]:
    """What is added to the attention logits of each of the runs, (b, 1, 1 or n, n) or None."""
    if packed.key_size is None:
        return [None] * (1 if packed.is_dense else len(packed.lengths))
    biases = [bias[:, None, None] for bias in packed.runs(packed.key_size.log().to(packed.values.dtype))]
    return [bias if packed.bias_on_self else _without_diagonal(bias) for bias in biases]


def _without_diagonal(bias: Tensor) -> Tensor:
    """(b, 1, 1, n) for each key, to (b, 1, n, n) that is 0 where query and key are the same token."""
    return bias - torch.diag_embed(bias[..., 0, :])  # nothing in place, which the export to ONNX does not know


def _chosen(packed: Packed) -> Sequence[Tensor | None]:
    """Rows (b, n) of each of the runs in the blocks' own bias, which is that of all patches; None to take it as it is.

    Blocks with a bias for relative positions make it themselves, so that it is picked when they attend.
    """
    places = packed.places
    if places is None or places.table is not None or places.at is None:
        return [None] * (1 if packed.is_dense else len(packed.lengths))
    return packed.runs(places.index)


def _rotary(packed: Packed, together: bool) -> Sequence[Tensor | None]:
    """Rotary embedding of each of the runs, or the one of all together; None where there is none."""
    places = packed.places
    if places is None or places.table is None:
        return [None] * (1 if packed.is_dense else len(packed.lengths))
    if packed.is_dense:
        return [places.dense]
    return [places.together] if together else places.apart


def _adjust(
    attend: Callable[..., Tensor] | None, bias: Tensor | None, chosen: Tensor | None
) -> Callable[..., Tensor] | None:
    """Attention over one run that adds a bias (b, 1, 1, n), and picks chosen tokens (b, n) of the mask it is given."""
    if bias is None and chosen is None:
        return attend
    answer = attend or F.scaled_dot_product_attention

    def adjusted(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        if chosen is not None and attn_mask is not None:
            attn_mask = gather_bias(attn_mask, chosen)
        if bias is not None:
            attn_mask = bias if attn_mask is None else attn_mask + bias
        return answer(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **options)

    return adjusted


class _Attention(TorchFunctionMode):
    """Answers fused attention in another way.

    Over a packed sequence (1, H, T, d) it is answered image by image: with one call an image, or, on a GPU in half
    precision, one call of variable-length attention.

    Args:
        attends: what answers for each run, called like F.scaled_dot_product_attention; None for that itself.
        packed: the sequence, if there is one of images of different lengths.
    """

    def __init__(self, attends: Sequence[Callable[..., Tensor] | None], packed: Packed | None = None) -> None:
        super().__init__()
        self.attends, self.packed = attends, packed

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        if self.packed is None:
            return (self.attends[0] or func)(*args, **(kwargs or {}))
        return self._attend_packed(self.packed, *args, **(kwargs or {}))

    def _attend_packed(
        self, packed: Packed, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kwargs: Any
    ) -> Tensor:
        plain = all(attend is None for attend in self.attends)
        own_scale = kwargs.get("scale") == query.shape[-1] ** -0.5  # what it scales by anyway
        options = [*rest, *(value for name, value in kwargs.items() if not (own_scale and name == "scale"))]
        if plain and _varlen_takes(query, key, value, options):
            return self._varlen(packed, query, key, value)
        runs = zip(self.attends, *(t.split(list(packed.lengths), dim=-2) for t in (query, key, value)), strict=True)
        # Joined in the memory order of tokens, heads last, which is what blocks make of it next.
        outputs = [
            (attend or F.scaled_dot_product_attention)(q, k, v, *rest, **kwargs).transpose(-3, -2)
            for attend, q, k, v in runs
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


Attend: TypeAlias = Callable[..., Tensor]  # called like F.scaled_dot_product_attention


# Tokens (B, n, C), and what a block is given beside them, to tokens.
Half: TypeAlias = Callable[[Tensor, BlockInputs | None], Tensor]


def attend_explicitly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """What F.scaled_dot_product_attention answers (B, H, n, d), and its weights (B, H, n, n) before dropout.

    Raises:
        ArgumentError: for causal or grouped attention, which no Vision Transformer has.
    """
    if is_causal or enable_gqa:
        raise ArgumentError("pruning takes neither causal nor grouped attention; leave this block out of the schedule")
    logits = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    weights = logits.softmax(dim=-1)
    return F.dropout(weights, dropout_p) @ value if dropout_p else weights @ value, weights
