"""What the comparators share: which models they take, and a forward that reduces tokens between attention and MLP."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vwt.errors import ModelError


@dataclass(frozen=True)
class Attended:
    """Self-attention of one block.

    Attributes:
        output: (B, n, C).
        query, keys, value: (B, H, n, d).
        weights: (B, H, n, n) after the softmax; None where attention was fused.
    """

    output: Tensor
    query: Tensor
    keys: Tensor
    value: Tensor
    weights: Tensor | None


class Peer(nn.Module):
    """A model whose blocks may reduce tokens between attention and MLP; the model itself is not changed.

    A comparator says how many tokens each block leaves (`remaining`), and which (`reduce`).

    Args:
        model: see `check_model`.
    """

    explicit = False  # whether every block computes the matrix of attention weights, as the paper's own code does

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        check_model(model)
        self.model: Any = model

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), normalised for the model, to its output (B, classes)."""
        model, size = self.model, None
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for index, block in enumerate(model.blocks):
            attended = attend(block.attn, block.norm1(tokens), size, explicit=self.explicit)
            tokens = tokens + block.ls1(attended.output)
            count = tokens.shape[1]
            if (left := self.remaining(index, count)) < count:
                tokens, size = self.reduce(attended, tokens, size, left)
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        return model.forward_head(model.norm(tokens))

    def remaining(self, block: int, tokens: int) -> int:
        """How many tokens, class token included, leave a block that so many enter."""
        raise NotImplementedError

    def reduce(
        self, attended: Attended, tokens: Tensor, size: Tensor | None, left: int
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, n, C) after attention to fewer.

        Args:
            attended: the attention of the block.
            tokens: class token first.
            size: (B, n) float32, patches in each token, by which attention is proportional; None where all are 1.
            left: as `remaining` says, fewer than n.

        Returns:
            Tokens (B, left, C) and their sizes (B, left), or None.
        """
        raise NotImplementedError

    def lengths(self, tokens: int) -> list[int]:
        """Tokens that enter each block, class token included, when so many enter the first one."""
        counts = [tokens]
        for index in range(len(self.model.blocks) - 1):
            counts.append(self.remaining(index, counts[-1]))
        return counts


def check_model(model: nn.Module) -> None:
    """Raise ModelError unless it is a timm `VisionTransformer` with one class token and plain blocks, in eval mode."""
    blocks: Any = getattr(model, "blocks", ())
    plain = type(model) is VisionTransformer and model.num_prefix_tokens == 1 and model.global_pool == "token"
    if not plain or any(
        type(b) is not Block or type(b.attn) is not Attention or getattr(b.attn, "gate", None) is not None
        for b in blocks
    ):
        raise ModelError(
            f"the comparators do not know this {type(model).__name__}; they take a VisionTransformer with one class "
            "token, class-token pooling and plain blocks"
        )
    if model.training:
        raise ModelError("the comparators run in eval mode only; call .eval() first")


def attend(attn: Any, tokens: Tensor, size: Tensor | None = None, *, explicit: bool = False) -> Attended:
    """Self-attention that shows its parts.

    Args:
        attn: timm's plain `Attention`.
        tokens: (B, n, C), after the norm.
        size: (B, n), whose logarithm is added to the logits of each key (proportional attention); None for none.
        explicit: compute the weights, in the place of fused attention; without sizes.
    """
    batch, count, _ = tokens.shape
    qkv = attn.qkv(tokens).view(batch, count, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    query, keys, value = attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2]
    weights = None
    if explicit:
        weights = ((query * attn.scale) @ keys.transpose(-2, -1)).softmax(dim=-1)
        mixed = weights @ value
    else:
        bias = None if size is None else size.log()[:, None, None].to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, keys, value, attn_mask=bias)
    output = attn.proj(attn.norm(mixed.transpose(1, 2).reshape(batch, count, attn.attn_dim)))
    return Attended(output, query, keys, value, weights)


def select(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, n, C) at the places (B, k) int64 of each image: (B, k, C)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))
