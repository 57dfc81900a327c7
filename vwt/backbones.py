"""What is needed of a timm model: embed, blocks, head."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchDropout, PatchEmbed
from timm.models import checkpoint_seq
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from vwt.errors import ImageError, ModelError, first_line
from vwt.packing import Packed, packable, run_blocks, unpack
from vwt.patches import embed
from vwt.pruning import Half, Reduction, Step, follow, reduce_between
from vwt.words import Words, fill, keep_all

# By exact class: a subclass may have another forward pass, and the result would be silently wrong.
SUPPORTED: tuple[type[nn.Module], ...] = (VisionTransformer, VisionTransformerDistilled)
NOTHING: Mapping[int, Reduction] = MappingProxyType({})
_POOLS = ("", "token", "avg", "max", "avgmax")


class Backbone:
    """The parts of a timm VisionTransformer, called one by one; the model itself is not changed.

    Args:
        model: a `VisionTransformer` or `VisionTransformerDistilled` with class-token, average or maximum pooling.

    Raises:
        ModelError: for any other model.
    """

    def __init__(self, model: nn.Module) -> None:
        if type(model) not in SUPPORTED:
            names = ", ".join(f"{cls.__module__}.{cls.__name__}" for cls in SUPPORTED)
            raise ModelError(f"{type(model).__module__}.{type(model).__name__} is not supported; supported are {names}")
        if type(model.patch_embed) is not PatchEmbed:
            raise ModelError(
                f"this {type(model).__name__} makes its patches with {type(model.patch_embed).__name__}, which is not "
                f"supported; supported is {PatchEmbed.__module__}.{PatchEmbed.__name__}"
            )
        pool = model.global_pool if getattr(model, "attn_pool", None) is None else "map"
        if pool not in _POOLS:
            raise ModelError(
                f"this {type(model).__name__} pools by attention (global_pool={pool!r}), which is not supported; "
                f"supported are {', '.join(repr(p) for p in _POOLS)}"
            )
        self.model: Any = model

    @property
    def prefix(self) -> int:
        """Number of prefix tokens: class, distillation and register tokens."""
        return int(self.model.num_prefix_tokens)

    @property
    def blocks(self) -> list[Any]:
        """The transformer blocks, in order."""
        return list(self.model.blocks)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.model.blocks)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the model was made for."""
        patch_embed = self.model.patch_embed
        size = patch_embed.img_size or self.model.pretrained_cfg["input_size"][1:]
        return (patch_embed.proj.in_channels, *size)

    @property
    def patches(self) -> int:
        """Patches of such an image."""
        rows, columns = self.model.patch_embed.dynamic_feat_size(self.input_shape[1:])
        return int(rows * columns)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Images (B, C, H, W) to what the blocks will see, before anything is reduced.

        Returns:
            The patch projection's output (B, N, D) without position, the tokens (B, P + N, D) with prefix tokens and
            position, and the grid (rows, columns) of the N patches.
        """
        output, grid = embed(self.model.patch_embed, images)
        return output.flatten(1, -2), self.model._pos_embed(output), grid

    def pack_all(self, images: Tensor) -> tuple[Packed, Words]:
        """Images (B, C, H, W) to all their tokens, before anything is reduced."""
        _, tokens, grid = self.embed(images)
        packed = Packed(tokens.flatten(0, 1), (tokens.shape[1],) * len(tokens))
        return packed, keep_all(len(images), grid, images.device)

    def check(self, images: Tensor) -> None:
        """Raise ImageError, saying what to do, unless the model takes these images."""
        if not isinstance(images, Tensor):
            raise ImageError(
                f"images are {type(images).__name__}; expected a torch.Tensor (batch, channels, height, width)"
            )
        patch_embed = self.model.patch_embed
        channels = patch_embed.proj.in_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ImageError(
                f"images have shape {tuple(images.shape)}; expected (batch, {channels}, height, width)"
                + ("; add a batch dimension with images[None]" if images.ndim == 3 else "")
            )
        weight = patch_embed.proj.weight
        if images.device != weight.device:
            raise ImageError(f"images are on {images.device}, the model is on {weight.device}; move one with .to()")
        autocast = torch.is_autocast_enabled(images.device.type)
        if not images.is_floating_point() or (images.dtype != weight.dtype and not autocast):
            raise ImageError(
                f"images are {images.dtype}, the model is {weight.dtype}; "
                + ("cast one to the other" if images.is_floating_point() else "scale and normalise them for the model")
            )
        size, expected, patch = tuple(images.shape[2:]), patch_embed.img_size, patch_embed.patch_size
        if expected is not None and patch_embed.strict_img_size and size != tuple(expected):
            raise ImageError(
                f"images are {size[0]}x{size[1]}, the model takes {expected[0]}x{expected[1]}; resize them, or create "
                f"the model with img_size={size} or dynamic_img_size=True"
            )
        padded = patch_embed.strict_img_size or patch_embed.dynamic_img_pad
        if expected is not None and not padded and (size[0] % patch[0] or size[1] % patch[1]):
            raise ImageError(
                f"images are {size[0]}x{size[1]}, no multiple of the patch {patch[0]}x{patch[1]}; resize them"
            )

    def check_reducible(self) -> None:
        """Raise ModelError if the model itself drops patches at random, as it does in training with patch dropout."""
        if self.model.training and isinstance(self.model.patch_drop, PatchDropout):
            raise ModelError("the model drops patches itself (patch_drop_rate) in train mode; call .eval() first")

    def encode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, n, D) through the norm before the blocks, the blocks and the norm after them."""
        tokens = self.model.norm_pre(self.model.patch_drop(tokens))
        return self.model.norm(self._run(self.blocks, tokens))

    def encode_packed(self, packed: Packed, reductions: Mapping[int, Reduction] = NOTHING) -> tuple[Packed, list[Step]]:
        """The same for packed sequences of any number of tokens; every image as if alone.

        Args:
            packed: the sequences.
            reductions: by the index of the block inside which they happen, between attention and MLP.

        Returns:
            The encoded sequences, and for each reduction how its tokens became fewer.
        """
        packed, steps = self.run(self.enter(packed), reductions)
        return self.leave(packed), steps

    def enter(self, packed: Packed) -> Packed:
        """Tokens through the norm before the blocks."""
        return packed.replace(self.model.norm_pre(packed.values))

    def leave(self, packed: Packed) -> Packed:
        """Tokens through the norm after the blocks."""
        return packed.replace(self.model.norm(packed.values))

    def run(
        self, packed: Packed, reductions: Mapping[int, Reduction] = NOTHING, start: int = 0, stop: int | None = None
    ) -> tuple[Packed, list[Step]]:
        """Tokens through the blocks from `start` to before `stop`; see `encode_packed`."""
        steps: list[Step] = []
        blocks = self.blocks[:stop]
        if not packed.lengths:
            return packed, steps
        crossing = self._crossing(packed)
        for index in sorted(index for index in reductions if start <= index < len(blocks)):
            packed = run_blocks(partial(self._run, blocks[start:index]), packed, crossing=crossing)
            attention, mlp = self.halves(blocks[index])
            packed, step = reduce_between(attention, mlp, packed, reductions[index], self.prefix, crossing=crossing)
            steps.append(step)
            start = index + 1
        return run_blocks(partial(self._run, blocks[start:]), packed, crossing=crossing), steps

    def _crossing(self, packed: Packed) -> bool:
        """Whether images of different lengths have to run one after another."""
        # Checkpointed blocks run again in the backward pass, when nothing answers their attention image by image.
        recomputed = self.model.grad_checkpointing and torch.is_grad_enabled()
        return not packed.is_dense and (recomputed or not packable(self.model.blocks))

    def _run(self, blocks: list[Any], tokens: Tensor, bias: Tensor | None = None) -> Tensor:
        """Tokens (B, n, D) through blocks, with what is added to the attention logits (B, 1, 1, n)."""
        if bias is not None:
            blocks = [partial(block, attn_mask=bias) for block in blocks]
        if self.model.grad_checkpointing and blocks:
            return checkpoint_seq(blocks, tokens)
        for block in blocks:
            tokens = block(tokens)
        return tokens

    @staticmethod
    def halves(block: Any) -> tuple[Half, Half]:
        """A block up to what follows its attention, and the rest of it."""

        def attention(tokens: Tensor, bias: Tensor | None) -> Tensor:
            if isinstance(block, ResPostBlock):
                return tokens + block.drop_path1(block.norm1(block.attn(tokens, attn_mask=bias)))
            if isinstance(block, Block):
                return tokens + block.drop_path1(block.ls1(block.attn(block.norm1(tokens), attn_mask=bias)))
            return block(tokens, attn_mask=bias)  # attention and MLP side by side: what follows both

        def mlp(tokens: Tensor, bias: Tensor | None) -> Tensor:
            if isinstance(block, ResPostBlock):
                return tokens + block.drop_path2(block.norm2(block.mlp(tokens)))
            if isinstance(block, Block):
                return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
            return tokens

        return attention, mlp

    @property
    def reads_prefix_only(self) -> bool:
        """Whether the head looks at prefix tokens only."""
        return bool(self.model.global_pool == "token")

    def answer(
        self, packed: Packed, words: Words, reductions: Mapping[int, Reduction] = NOTHING, start: int = 0
    ) -> Tensor:
        """Tokens that enter block `start` to the model's output.

        Where the head reads the prefix tokens only, nothing else goes through the last MLP, and what is scheduled for
        the last block does not happen.
        """
        if not self.reads_prefix_only:
            packed, steps = self.run(packed, reductions, start)
            return self.head(self.leave(packed), words, steps)
        last = self.depth - 1
        packed, _ = self.run(packed, reductions, start, last)
        attention, mlp = self.halves(self.blocks[last])
        prefix, _ = unpack(run_blocks(attention, packed, crossing=self._crossing(packed)), self.prefix)
        return self.model.forward_head(self.model.norm(mlp(prefix, None)))

    def full(self, packed: Packed, words: Words, steps: Sequence[Step] = ()) -> Tensor:
        """Encoded tokens to the full grid (B, P + N, C): every patch takes the value of its token.

        Args:
            packed: what `encode_packed` gave.
            words: of the tokens that entered the first block.
            steps: what `encode_packed` gave.
        """
        prefix, merged = unpack(packed, self.prefix)
        return torch.cat([prefix, merged[follow(fill(words), steps).rows]], dim=1)

    def head(self, packed: Packed, words: Words, steps: Sequence[Step] = ()) -> Tensor:
        """Encoded tokens (see `full`) to the model's output, each weighed by the patches that it stands for.

        The head is the model's own: it pools over one token that already is the pool of all.
        """
        model = self.model
        if model.global_pool == "":
            return model.forward_head(self.full(packed, words, steps))
        prefix, _ = unpack(packed, self.prefix)
        if self.reads_prefix_only:
            return model.forward_head(prefix)
        words = follow(fill(words), steps)
        sizes = words.sizes
        if packed.is_dense:
            images = [(packed.dense(), sizes.view(len(packed.lengths), -1))]
        else:
            runs = zip(packed.split(), sizes.split(list(words.lengths)), strict=True)
            images = [(tokens[None], size[None]) for tokens, size in runs]
        skipped = 0 if model.pool_include_prefix else self.prefix
        pooled = torch.cat([_pool(tokens, size, self.prefix, skipped, model.global_pool) for tokens, size in images])
        pooled = pooled[:, None].to(packed.values.dtype)
        return model.forward_head(torch.cat([prefix[:, :skipped], pooled], dim=1))


def _pool(tokens: Tensor, sizes: Tensor, prefix: int, skipped: int, kind: str) -> Tensor:
    """Pool tokens (B, P + n, C), of which n have sizes (B, n), over all but the first `skipped`: (B, C) float32."""
    sizes = F.pad(sizes, (prefix, 0), value=1.0)[:, skipped:, None]
    tokens = tokens[:, skipped:].float()
    mean = (tokens * sizes).sum(1) / sizes.sum(1)
    if kind == "avg":
        return mean
    most = tokens.amax(1)
    return most if kind == "max" else 0.5 * (most + mean)


def create_model(name: str, checkpoint: str | os.PathLike[str] | None = None, *, weights: bool = True) -> nn.Module:
    """A timm model in eval mode, with its pretrained weights or those of a checkpoint file.

    Args:
        name: as `timm.create_model` takes it.
        checkpoint: a file of weights; None fetches the pretrained ones from the hub, or its cache.
        weights: False for random weights where none are needed.

    Raises:
        ModelError: if the model is unknown, or its weights are out of reach.
    """
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise ModelError(f"no checkpoint file at {checkpoint}")
    try:
        with _quiet("huggingface_hub", "timm"):  # which log each attempt; what went wrong is said below
            if checkpoint is not None:
                return timm.create_model(name, checkpoint_path=os.fspath(checkpoint)).eval()
            return timm.create_model(name, pretrained=weights).eval()
    # timm, huggingface_hub, safetensors and torch each raise errors of their own.
    except Exception as error:
        detail = first_line(error)
        if not timm.is_model(name.split("/")[-1].split(".")[0]) and "/" not in name:
            raise ModelError(f"timm {timm.__version__} has no model {name!r}; see timm.list_models()") from error
        if checkpoint is not None:
            raise ModelError(f"{checkpoint} holds no weights for {name}: {detail}") from error
        raise ModelError(
            f"no pretrained weights for {name}: {detail} Give a file of weights (--checkpoint), or see that the hub "
            "is in reach"
        ) from error


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Hold back the warnings of other libraries' loggers."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
