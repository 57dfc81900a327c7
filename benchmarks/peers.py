"""Comparators, from their papers: ToMe, class-attention top-k, POMT, padding with a mask; and random dropping.

They take a timm `VisionTransformer` with one class token, class-token pooling and plain blocks, in eval mode, and never
change it. They are measured against, and nothing in `vwt` depends on them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vwt.errors import ArgumentError, ModelError
from vwt.models.backbone import Backbone
from vwt.models.spec import PatchSpec
from vwt.reductions.prune import Prune
from vwt.tokenizer import VWTokenizer
from vwt.tokens.patches import Space, patchify
from vwt.tokens.words import Words, keep_patches, merge
from vwt.tuning.schedule import PruningSchedule


class TokenMerging(nn.Module):
    """Token Merging, ToMe (Bolya et al., ICLR 2023, arXiv 2210.09461), with proportional attention.

    In every block, between attention and MLP, the r most similar pairs of tokens become their size-weighted mean.

    Args:
        model: see the module's docstring.
        r: pairs to merge in each block; where fewer tokens are left, as many as there can be.
    """

    def __init__(self, model: nn.Module, r: int) -> None:
        super().__init__()
        check_model(model)
        if r < 0:
            raise ArgumentError(f"r is {r}; expected a number of pairs a block of at least 0")
        self.model: Any = model
        self.r = r

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), normalised for the model, to its output (B, classes)."""
        tokens, size = embed(self.model, images), None
        for block in self.model.blocks:
            attended, keys, _ = attend(block.attn, block.norm1(tokens), None if size is None else size.log())
            tokens = tokens + block.ls1(attended)
            r = min(self.r, (tokens.shape[1] - 1) // 2)
            if r:
                rows, count = match_pairs(keys.mean(dim=1), r)
                tokens, size = merge_pairs(tokens, size, rows, count)
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        return self.model.forward_head(self.model.norm(tokens))

    def lengths(self, tokens: int) -> list[int]:
        """Tokens that enter each block, class token included, when so many enter the first one."""
        counts = [tokens]
        for _ in self.model.blocks[1:]:
            counts.append(counts[-1] - min(self.r, (counts[-1] - 1) // 2))
        return counts


class ClassAttentionTopK(nn.Module):
    """Keep the patches that the class token attends to most, in one block, between attention and MLP.

    As in EViT (Liang et al., ICLR 2022, arXiv 2202.07800), without its token for what was dropped. Attention stays
    fused; only the class token's row is computed once more.

    Args:
        model: see the module's docstring.
        keep: patches to keep.
        block: index of the block.
    """

    def __init__(self, model: nn.Module, keep: int, block: int = 3) -> None:
        super().__init__()
        check_model(model)
        blocks = len(model.blocks)  # type: ignore[arg-type]
        if keep < 1 or not 0 <= block < blocks:
            raise ArgumentError(f"keep is {keep}, block {block}; expected at least 1 patch, and a block below {blocks}")
        self.model: Any = model
        self.keep, self.block = keep, block

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), normalised for the model, to its output (B, classes)."""
        tokens = embed(self.model, images)
        blocks = list(self.model.blocks)
        for block in blocks[: self.block]:
            tokens = block(tokens)
        tokens = self._reduce(blocks[self.block], tokens)
        for block in blocks[self.block + 1 :]:
            tokens = block(tokens)
        return self.model.forward_head(self.model.norm(tokens))

    def _reduce(self, block: Any, tokens: Tensor) -> Tensor:
        attended, keys, query = attend(block.attn, block.norm1(tokens))
        tokens = tokens + block.ls1(attended)
        if self.keep < tokens.shape[1] - 1:
            row = (query[:, :, :1] * block.attn.scale) @ keys.transpose(-2, -1)  # (B, H, 1, n)
            score = row.softmax(dim=-1).mean(dim=1)[:, 0, 1:]
            kept = score.topk(self.keep, dim=1).indices.sort(dim=1).values + 1
            tokens = select(tokens, F.pad(kept, (1, 0)))
        return tokens + block.ls2(block.mlp(block.norm2(tokens)))

    def lengths(self, tokens: int) -> list[int]:
        """Tokens that enter each block, class token included, when so many enter the first one."""
        return [tokens if i <= self.block else min(tokens, self.keep + 1) for i in range(len(self.model.blocks))]


class PruneOneMoreToken(nn.Module):
    """Prune One More Token (Eliopoulos et al., WACV 2025, arXiv 2407.05941) in the paper's way.

    Every block computes its attention explicitly, although one prunes; an image's scores are divided by its own
    maximum, so that the answers are those of `vwt.Prune`.

    Args:
        model: see the module's docstring.
        removed: R; R + 1 patches become one token, their mean.
        block: index of the block that prunes.
    """

    def __init__(self, model: nn.Module, removed: int, block: int = 3) -> None:
        super().__init__()
        check_model(model)
        self.model: Any = model
        self.removed, self.block = removed, block

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), normalised for the model, to its output (B, classes)."""
        tokens = embed(self.model, images)
        for index, block in enumerate(self.model.blocks):
            attn, normed = block.attn, block.norm1(tokens)
            batch, count, _ = normed.shape
            qkv = attn.qkv(normed).view(batch, count, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
            query, keys, value = attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2]
            weights = ((query * attn.scale) @ keys.transpose(-2, -1)).softmax(dim=-1)
            mixed = (weights @ value).transpose(1, 2).reshape(batch, count, attn.attn_dim)
            tokens = tokens + block.ls1(attn.proj(attn.norm(mixed)))
            if index == self.block:
                tokens = self._prune(tokens, weights, value)
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        return self.model.forward_head(self.model.norm(tokens))

    def lengths(self, tokens: int) -> list[int]:
        """Tokens that enter each block, class token included, when so many enter the first one."""
        return [tokens - self.removed * (i > self.block) for i in range(len(self.model.blocks))]

    def _prune(self, tokens: Tensor, weights: Tensor, value: Tensor) -> Tensor:
        received = weights.amax(dim=1)[:, 1:, 1:].sum(dim=1)
        energy = value.amax(dim=1).sum(dim=-1).softmax(dim=-1)[:, 1:]
        score = received / received.amax(dim=-1, keepdim=True) + energy
        order = score.sort(dim=1, descending=True).indices + 1
        kept, dropped = order.split([order.shape[1] - self.removed - 1, self.removed + 1], dim=1)
        kept = F.pad(kept.sort(dim=1).values, (1, 0))
        return torch.cat([select(tokens, kept), select(tokens, dropped).mean(dim=1, keepdim=True)], dim=1)


def in_the_papers_way(model: nn.Module, schedule: PruningSchedule) -> PruneOneMoreToken | None:
    """A schedule of one pruning as Prune One More Token does it; None for any other."""
    if len(schedule) == 1 and isinstance(what := next(iter(schedule.values())), Prune):
        return PruneOneMoreToken(model, what.removed(Backbone(model).patches), next(iter(schedule)))
    return None


class RandomDrop(nn.Module):
    """A strategy that drops patches at random: the yardstick that every other one must beat at the same count.

    What is drawn depends on an image's own pixels and the seed, so that batch mates do not matter.

    Args:
        drop: share of the patches, in [0, 1).
        seed: of the draw.
    """

    space: Space = "pixel"
    fixed_count = True
    size_exponent = 0.0

    def __init__(self, drop: float, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= drop < 1:
            raise ArgumentError(f"drop is {drop}; expected a share in [0, 1)")
        self.drop, self.seed = drop, seed

    def bind(self, spec: PatchSpec) -> "RandomDrop":
        """The strategy itself: it serves any model."""
        return self

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Words:
        """Pixel patches (B, N, D) to Words of N - int(N · drop) tokens an image."""
        patches = features.shape[1]
        count = max(1, patches - int(patches * self.drop + 1e-9))
        bits = features.float().view(torch.int32).sum(dim=(1, 2)).tolist()
        draws = [torch.rand(patches, generator=torch.Generator().manual_seed(own ^ self.seed)) for own in bits]
        kept = torch.stack(draws).topk(count, dim=1).indices.sort(dim=1).values
        return keep_patches(kept.to(features.device), grid)


class PadAndMask(nn.Module):
    """A VWTokenizer as the reference runs a ragged batch: padded to the longest image, its padding masked as keys.

    The answers are those of the packed VWTokenizer.

    Args:
        fast: with a strategy, around a model as in the module's docstring.
    """

    def __init__(self, fast: VWTokenizer) -> None:
        super().__init__()
        check_model(fast.model)
        if fast.strategy is None:
            raise ArgumentError("padding needs a strategy; without one all images have as many tokens")
        self.fast: Any = fast
        self.patch_size = PatchSpec.of(fast.model).patch_size

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), normalised for the model, to its output (B, classes)."""
        model = self.fast.model
        tokens, words = self._reduce(images)
        runs = list(merge(tokens[:, 1:], words).split(list(words.lengths)))
        padded = torch.cat([tokens[:, :1], pad_sequence(runs, batch_first=True)], dim=1)
        mask = None
        if len(set(words.lengths)) > 1:
            places = torch.arange(padded.shape[1], device=images.device)
            mask = (places <= words.counts[:, None])[:, None, None]  # (B, 1, 1, n): which keys are tokens
        padded = model.norm_pre(padded)
        for block in model.blocks:
            padded = block(padded, attn_mask=mask)
        return model.forward_head(model.norm(padded))

    def _reduce(self, images: Tensor) -> tuple[Tensor, Words]:
        patches, tokens, grid = self.fast.backbone.embed(images)
        strategy = self.fast.strategy
        features = patches if strategy.space == "embedding" else patchify(images, self.patch_size, grid)
        return tokens, strategy(features, grid)


def check_model(model: nn.Module) -> None:
    """Raise ModelError unless the comparators can take the model apart."""
    blocks: Any = getattr(model, "blocks", ())
    plain = type(model) is VisionTransformer and model.num_prefix_tokens == 1 and model.global_pool == "token"
    if plain:
        plain = all(
            type(b) is Block and type(b.attn) is Attention and getattr(b.attn, "gate", None) is None for b in blocks
        )
    if not plain:
        raise ModelError(
            f"the comparators do not know this {type(model).__name__}; they take a VisionTransformer with one class "
            "token, class-token pooling and plain blocks; leave them out with --no-peers"
        )
    if model.training:
        raise ModelError("the comparators run in eval mode only; call .eval() first")


def embed(model: Any, images: Tensor) -> Tensor:
    """Images (B, C, H, W) to what enters the first block (B, 1 + N, C)."""
    return model.norm_pre(model._pos_embed(model.patch_embed(images)))


def attend(attn: Any, tokens: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Fused self-attention that shows its keys.

    Args:
        attn: timm's plain `Attention`.
        tokens: (B, n, C), after the norm.
        bias: (B, n), added to the logits of each key.

    Returns:
        The output (B, n, C), keys (B, H, n, d) and queries (B, H, n, d).
    """
    batch, count, _ = tokens.shape
    qkv = attn.qkv(tokens).view(batch, count, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    query, keys, value = attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2]
    mask = None if bias is None else bias[:, None, None].to(query.dtype)
    mixed = F.scaled_dot_product_attention(query, keys, value, attn_mask=mask)
    return attn.proj(attn.norm(mixed.transpose(1, 2).reshape(batch, count, attn.attn_dim))), keys, query


def match_pairs(metric: Tensor, r: int) -> tuple[Tensor, int]:
    """Bipartite soft matching: even tokens propose to odd tokens, and the r most similar pairs merge.

    Args:
        metric: (B, n, d), compared by cosine; token 0 is the class token, which never merges into another.
        r: pairs, at most (n - 1) // 2.

    Returns:
        The place of each token (B, n) int64 in the merged sequence, and that sequence's length, n - r: first the even
        tokens that stay, then the odd ones.
    """
    metric = F.normalize(metric, dim=-1)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(-2, -1)
    best, partner = similarity.max(dim=-1)  # (B, ceil(n / 2))
    best[:, 0] = -torch.inf
    merged = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(r, dim=1).indices, True)
    stay = best.shape[1] - r
    rows = partner.new_empty(metric.shape[:2])
    rows[:, ::2] = torch.where(merged, stay + partner, (~merged).cumsum(dim=1) - 1)
    rows[:, 1::2] = torch.arange(stay, metric.shape[1] - r, device=metric.device)
    return rows, metric.shape[1] - r


def merge_pairs(tokens: Tensor, size: Tensor | None, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
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
    index = (rows + torch.arange(0, batch * count, count, device=rows.device)[:, None]).flatten()
    total = size.new_zeros(batch * count).index_add_(0, index, size.flatten())
    # Shares of at most 1, so that no sum is larger than its terms in half precision.
    share = (size.flatten() / total[index]).to(tokens.dtype)
    merged = tokens.new_zeros(batch * count, width).index_add_(0, index, tokens.flatten(0, 1) * share[:, None])
    return merged.view(batch, count, width), total.view(batch, count)


def select(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, n, C) at the places (B, k) int64 of each image: (B, k, C)."""
    batch, count, width = tokens.shape
    flat = (index + torch.arange(0, batch * count, count, device=index.device)[:, None]).flatten()
    return tokens.flatten(0, 1).index_select(0, flat).view(batch, -1, width)
