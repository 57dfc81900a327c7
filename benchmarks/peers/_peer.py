"""What the comparators share: which models they take, and a forward that reduces tokens between attention and MLP."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vwt.errors import ArgumentError, ModelError
from vwt.tokens.tensors import flat_index


@dataclass(frozen=True)
class Attended:
    """Self-attention of one block.

    Attributes:
        output: (B, n, C).
        query, keys, value: (B, H, n, d).
        weights: (B, H, n, n) after the softmax; None where attention was fused.
        size: (B, n) float32, patches in each token, by which attention was proportional; None where all are 1.
    """

    output: Tensor
    query: Tensor
    keys: Tensor
    value: Tensor
    weights: Tensor | None
    size: Tensor | None

    def of_class_token(self) -> Tensor:
        """What the class token pays to each patch, mean over the heads: (B, n - 1)."""
        if self.weights is not None:
            return self.weights[:, :, 0, 1:].mean(dim=1)
        row = (self.query[:, :, :1] * self.query.shape[-1] ** -0.5) @ self.keys.transpose(-2, -1)  # (B, H, 1, n)
        if self.size is not None:
            row = row + self.size.log()[:, None, None].to(row.dtype)
        return row.softmax(dim=-1).mean(dim=1)[:, 0, 1:]


class Peer(nn.Module):
    """A model whose blocks may reduce tokens between attention and MLP; the model itself is not changed.

    Args:
        model: see `check_model`.
        removed: patches to remove, by the index of the block; where fewer are left, as many as there can be.

    Raises:
        ArgumentError: if the model has no such block, or a number is negative.
    """

    explicit = False  # whether every block computes the matrix of attention weights, as the paper's own code does

    def __init__(self, model: Any, removed: Mapping[int, int]) -> None:
        super().__init__()
        check_model(model)
        self.model = model
        blocks = len(model.blocks)
        for block, count in removed.items():
            if block not in range(blocks) or count < 0:
                raise ArgumentError(
                    f"block {block} removes {count} patches; expected at least 0, and a block below {blocks}"
                )
        self.removed = dict(removed)
        self.eval()  # as the model is

    @staticmethod
    def most(patches: int) -> int:
        """The most that can be removed of so many."""
        return patches - 1

    def remaining(self, block: int, tokens: int) -> int:
        """How many tokens, class token included, leave a block that so many enter."""
        return tokens - min(self.removed.get(block, 0), self.most(tokens - 1))

    def reduce(self, block: int, attended: Attended, tokens: Tensor, left: int) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, n, C) after attention to fewer.

        Args:
            block: its index.
            attended: its attention.
            tokens: class token first.
            left: as `remaining` says, fewer than n.

        Returns:
            Tokens (B, left, C) and their sizes (B, left), or None where all are 1.
        """
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), normalised for the model, to its output (B, classes)."""
        model = self.model
        return self.run(model.norm_pre(model._pos_embed(model.patch_embed(images))))

    def run(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Tokens (B, n, C) that enter the block `start`, class token first and none reduced, to the model's output."""
        model, size = self.model, None
        for index, block in enumerate(model.blocks[start:], start):
            attended = attend(block.attn, block.norm1(tokens), size, explicit=self.explicit)
            tokens = tokens + block.ls1(attended.output)
            if (left := self.remaining(index, tokens.shape[1])) < tokens.shape[1]:
                tokens, size = self.reduce(index, attended, tokens, left)
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        return model.forward_head(model.norm(tokens))

    def lengths(self, tokens: int) -> list[int]:
        """Tokens that enter each block, class token included, when so many enter the first one."""
        counts = [tokens]
        for index in range(len(self.model.blocks) - 1):
            counts.append(self.remaining(index, counts[-1]))
        return counts


def check_model(model: nn.Module) -> None:
    """Raise ModelError unless it is a timm `VisionTransformer` with one class token and plain blocks, in eval mode."""
    if (reason := _unknown(model)) is not None:
        raise ModelError(
            f"the comparators do not know this {type(model).__name__}, {reason}; they take a VisionTransformer with "
            "one class token, class-token pooling and plain blocks"
        )
    if model.training:
        raise ModelError("the comparators run in eval mode only; call .eval() first")


def _unknown(model: Any) -> str | None:
    """Why the comparators do not take a model; None where they do."""
    if getattr(model, "rope", None) is not None:
        return "which has rotary positions"
    if type(model) is not VisionTransformer:
        return "which is of another class"
    if model.num_reg_tokens:
        return f"which has {model.num_reg_tokens} register tokens"
    if model.num_prefix_tokens != 1:
        return "which has no class token"
    if model.global_pool != "token":
        return f"which pools by {model.global_pool!r}"
    if not all(type(block) is Block and _plain(block.attn) for block in model.blocks):
        return "which has blocks of another kind"
    return None


def _plain(attn: Any) -> bool:
    return type(attn) is Attention and getattr(attn, "gate", None) is None


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
    return Attended(output, query, keys, value, weights, size)


def select(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, n, C) at the places (B, k) int64 of each image: (B, k, C)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


def merge(tokens: Tensor, size: Tensor | None, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Size-weighted means of the tokens of each place.

    Args:
        tokens: (B, n, C).
        size: (B, n) float32, patches in each token; None where all are 1.
        rows: (B, n) int64, the place of each token.
        count: places.

    Returns:
        Tokens (B, count, C) and their sizes (B, count) float32.
    """
    batch, _, width = tokens.shape
    if size is None:
        size = tokens.new_ones(rows.shape, dtype=torch.float32)
    index = flat_index(rows, count)
    total = size.new_zeros(batch * count).index_add_(0, index, size.flatten())
    # Shares of at most 1, so that no sum is larger than its terms in half precision.
    share = (size.flatten() / total[index]).to(tokens.dtype)
    merged = tokens.new_zeros(batch * count, width).index_add_(0, index, tokens.flatten(0, 1) * share[:, None])
    return merged.view(batch, count, width), total.view(batch, count)


def after_class_token(rows: Tensor) -> Tensor:
    """Places (B, n - 1) of patches to those of all tokens (B, n), the class token alone at the first."""
    return F.pad(rows + 1, (1, 0))
