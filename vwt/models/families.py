"""One adapter a family of models: where its embedding, blocks, norms, pooling and head are.

Nothing of a model's forward pass is copied here. What an adapter says is checked against the model when that is wrapped
(see `vwt.models.checking`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from timm.layers import PatchEmbed
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from vwt.errors import ArgumentError, ImageError, ModelError
from vwt.tokens.attention import BlockInputs, Half, fuses, packable
from vwt.tokens.patches import patchify


def embed(patch_embed: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Images (B, C, H, W) to the raw output of the patch projection, and the grid (rows, columns).

    The output is (B, N, D), or (B, rows, columns, D) for models that take any image size.
    """
    output = patch_embed(images)
    if output.ndim == 4:
        return output, (output.shape[1], output.shape[2])
    rows, columns = patch_embed.dynamic_feat_size(images.shape[-2:])  # type: ignore[operator]
    return output, (int(rows), int(columns))


_PRE_NORM = (Block, EvaBlock, BeitBlock)


_POST_NORM = (ResPostBlock, EvaBlockPostNorm)


# Mean and standard deviation of images in [0, 1], one number a channel.
Normalisation: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]


class Parent(Protocol):
    """A vision-language model whose vision tower is reduced; see `vwt.models.image_text`."""

    model: Any
    methods: tuple[str, ...]  # of the model, that can be called

    def call(self, method: str, encode_images: Callable[[Tensor], Any], options: dict[str, Any]) -> Any:
        """One of `methods` with options by name; `encode_images` gives the reduced tower's output."""
        ...


@dataclass(frozen=True, eq=False)
class Embedded:
    """Images before anything is reduced.

    Attributes:
        project: gives the patch projection's output (B, N, D) without position.
        tokens: (B, P + N, D), what enters the norm before the blocks: with prefix tokens and position.
        grid: (rows, columns) of the N patches.
        rotary: the model's rotary embedding of these places (see `vwt.tokens.positions.Positions`), if it has one.
    """

    project: Callable[[], Tensor]
    tokens: Tensor
    grid: tuple[int, int]
    rotary: Tensor | None = None


class Family:
    """timm's VisionTransformer, and what other families have in common with it.

    Args:
        model: of the class that `MODEL` is.

    Raises:
        ModelError: for a variant of it that cannot be reduced.
    """

    MODEL: type[nn.Module] = VisionTransformer
    ABOUT = "DeiT, DeiT-3, CLIP, SigLIP, DINO, DINOv2, I-JEPA, ..."
    parent: "Parent | None" = None  # the vision-language model that was wrapped, if this is its vision tower

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self._check_patches(getattr(model, "patch_embed", None))

    def _check_patches(self, patch_embed: nn.Module | None) -> None:
        if type(patch_embed) is not PatchEmbed:
            raise ModelError(
                f"this {type(self.model).__name__} makes its patches with {type(patch_embed).__name__}, which is not "
                f"supported; supported is {PatchEmbed.__module__}.{PatchEmbed.__name__}, one convolution over pixels"
            )

    def forward(self, images: Tensor) -> Any:
        """What the model itself answers."""
        return self.model(images)

    def forward_features(self, images: Tensor) -> Tensor:
        """The model's own encoded tokens (B, P + N, C)."""
        return self.model.forward_features(images)

    def arguments(self, images: Tensor | None, options: dict[str, Any]) -> Tensor | None:
        """The images among what a wrapped model was called with.

        Raises:
            ArgumentError: for options that mean nothing to reduced tokens.
        """
        if options:
            raise ArgumentError(f"VWTokenizer takes images alone, without {', '.join(options)}; call it without")
        return images

    def with_loss(self, output: Any, labels: Tensor) -> Any:
        """The model's output with the loss that the model computes of it and labels (B,).

        Raises:
            ArgumentError: if it computes none.
        """
        raise ArgumentError(f"{type(self.model).__name__} computes no loss; call it without labels")

    # -- images --------------------------------------------------------------------------------------------------------

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What is known of timm's `pretrained_cfg`, with the model's own `input_size`."""
        return {**(getattr(self.model, "pretrained_cfg", None) or {}), "input_size": self.input_shape}

    @property
    def name(self) -> str:
        """Of the model and its weights, for messages and provenance."""
        cfg = self.pretrained_cfg
        name, tag = cfg.get("architecture") or type(self.model).__name__, cfg.get("tag")
        return f"{name}.{tag}" if tag else str(name)

    @property
    def normalisation(self) -> Normalisation | None:
        """What the model expects of its images; None if that is unknown."""
        cfg = self.pretrained_cfg
        mean, std = (tuple(float(value) for value in cfg.get(name) or ()) for name in ("mean", "std"))
        return (mean, std) if len(mean) == len(std) == self.channels else None

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        height, width = self.model.patch_embed.patch_size
        return int(height), int(width)

    # -- embedding -----------------------------------------------------------------------------------------------------

    @property
    def patch_embed(self) -> nn.Module:
        """The module whose weights decide what `project` makes of a patch."""
        return self.model.patch_embed

    @property
    def projection(self) -> Any:
        """The layer of it that is given pixels."""
        return self.model.patch_embed.proj

    def project(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to the embeddings of their patches (B, N, D), without position."""
        output, _ = embed(self.model.patch_embed, images)
        return output.flatten(1, -2)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the model was made for."""
        patch_embed = self.model.patch_embed
        size = patch_embed.img_size or self.model.pretrained_cfg["input_size"][1:]
        return (self.channels, *size)

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return int(self.model.in_chans)

    @property
    def prefix(self) -> int:
        """Number of prefix tokens."""
        return int(self.model.num_prefix_tokens)

    @property
    def drops_patches(self) -> bool:
        """Whether the model itself drops patches at random, as some do in train mode."""
        return self.model.training and not isinstance(self.model.patch_drop, nn.Identity | None)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the patches of images of height and width."""
        rows, columns = self.model.patch_embed.dynamic_feat_size(size)
        return int(rows), int(columns)

    def embed(self, images: Tensor) -> Embedded:
        """Images (B, C, H, W) to their tokens."""
        output, grid = embed(self.model.patch_embed, images)
        return Embedded(partial(output.flatten, 1, -2), self.model._pos_embed(output), grid)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ImageError, saying what to do, unless the model takes images of this height and width."""
        patch_embed = self.model.patch_embed
        expected, patch = patch_embed.img_size, patch_embed.patch_size
        if expected is not None and patch_embed.strict_img_size and size != tuple(expected):
            raise ImageError(
                f"images are {size[0]}x{size[1]}, the model takes {expected[0]}x{expected[1]}; resize them, or create "
                f"the model with img_size={size} or dynamic_img_size=True"
            )
        padded = patch_embed.strict_img_size or patch_embed.dynamic_img_pad
        if expected is not None and not padded:
            _check_multiple(size, patch)

    # -- blocks --------------------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> Any:
        """The transformer blocks, in order."""
        return self.model.blocks

    @property
    def checkpoints(self) -> bool:
        """Whether blocks run again in the backward pass."""
        return bool(self.model.grad_checkpointing)

    @property
    def needs_positions(self) -> bool:
        """Whether the blocks are told where tokens are."""
        return False

    @property
    def merges_positions(self) -> bool:
        """Whether a token may stand for patches of several places."""
        return True

    @property
    def packable(self) -> bool:
        """Whether blocks can run on packed images; see `vwt.tokens.attention.packable`."""
        return packable(self.blocks)

    def pre_norm(self, tokens: Tensor) -> Tensor:
        """Tokens through what the model does before its first block."""
        return self.model.norm_pre(tokens)

    def final_norm(self, tokens: Tensor) -> Tensor:
        """Tokens through the norm after the blocks."""
        return self.model.norm(tokens)

    def options(self, blocks: Sequence[nn.Module], inputs: BlockInputs | None) -> list[dict[str, Any]]:
        """What each of some blocks is called with beside tokens; their attention takes the same."""
        return [{} if inputs is None or inputs.bias is None else {"attn_mask": inputs.bias}] * len(blocks)

    def calls(self, blocks: Sequence[nn.Module], inputs: BlockInputs | None) -> Sequence[Callable[[Tensor], Tensor]]:
        """Blocks as functions of tokens (b, n, C) alone."""
        if inputs is None and not self.needs_positions:
            return blocks
        options = self.options(blocks, inputs)
        return [partial(block, **own) if own else block for block, own in zip(blocks, options, strict=True)]

    def halves(self, block: Any) -> tuple[Half, Half]:
        """A block up to what follows its attention, and the rest of it.

        A block of another kind, or one that runs attention and MLP side by side, is a first half as a whole.
        """
        kind = type(block)

        def attention(tokens: Tensor, inputs: BlockInputs | None) -> Tensor:
            (options,) = self.options([block], inputs)
            if kind in _PRE_NORM:
                return tokens + block.drop_path1(_scale(block, 1, block.attn(block.norm1(tokens), **options)))
            if kind in _POST_NORM:
                return tokens + block.drop_path1(block.norm1(block.attn(tokens, **options)))
            return block(tokens, **options)

        def mlp(tokens: Tensor, inputs: BlockInputs | None) -> Tensor:
            if kind in _PRE_NORM:
                return tokens + block.drop_path2(_scale(block, 2, block.mlp(block.norm2(tokens))))
            if kind in _POST_NORM:
                return tokens + block.drop_path2(block.norm2(block.mlp(tokens)))
            return tokens

        return attention, mlp

    # -- head ----------------------------------------------------------------------------------------------------------

    @property
    def pool(self) -> str:
        """What the head reads: "token", "avg", "max", "avgmax", or "" for all tokens (also where it attends them)."""
        pool = self.model.global_pool
        return (
            pool if pool in ("token", "avg", "max", "avgmax") and getattr(self.model, "attn_pool", None) is None else ""
        )

    @property
    def pools_prefix(self) -> bool:
        """Whether it pools over prefix tokens too."""
        return bool(getattr(self.model, "pool_include_prefix", False))

    @property
    def returns_features(self) -> bool:
        """Whether the model's output holds the encoded tokens of the full grid, beside what the head says."""
        return False

    def head(self, tokens: Tensor, features: Tensor | None = None) -> Any:
        """Encoded tokens (B, n, C), and the full grid (B, P + N, C) if `returns_features`, to the model's output."""
        return self.model.forward_head(tokens)

    # -- what an answer says -------------------------------------------------------------------------------------------

    @property
    def has_classes(self) -> bool:
        """Whether the model tells classes apart, rather than to embed images."""
        return bool(getattr(self.model, "num_classes", 1))

    def vectors(self, output: Any) -> Tensor:
        """The model's output to the logits of its classes, or, without classes, its embeddings: (B, D)."""
        return output


class EvaFamily(Family):
    """timm's Eva: absolute positions, rotary positions, or both."""

    MODEL = Eva
    ABOUT = "EVA-02, DINOv3, Perception Encoder, RoPE-ViT, ..."

    @property
    def needs_positions(self) -> bool:
        """Where attention is rotary."""
        return self.model.rope is not None

    def embed(self, images: Tensor) -> Embedded:
        """See `Family`."""
        output, grid = embed(self.model.patch_embed, images)
        tokens, rotary = self.model._pos_embed(output)
        return Embedded(partial(output.flatten, 1, -2), tokens, grid, rotary)

    def options(self, blocks: Sequence[nn.Module], inputs: BlockInputs | None) -> list[dict[str, Any]]:
        """Each block of mixed rotary embeddings has its own; the others share one."""
        if not self.needs_positions:
            return super().options(blocks, inputs)
        if inputs is None or inputs.rotary is None:
            raise ModelError(
                f"{type(self.model).__name__} turns its tokens by their places, which these have lost; hand on "
                "`Packed` as `VWTokenizer.pack` gives it, and cut it with `Packed.take`"
            )
        shared = {} if inputs.bias is None else {"attn_mask": inputs.bias}
        if not self._mixed:
            return [{"rope": inputs.rotary, **shared}] * len(blocks)
        places = {id(block): index for index, block in enumerate(self.model.blocks)}
        return [{"rope": inputs.rotary[places[id(block)]], **shared} for block in blocks]

    @property
    def _mixed(self) -> bool:
        return bool(self.model.rope_mixed)


class NaFlexFamily(EvaFamily):
    """timm's NaFlexVit on images of one size; its blocks are those of VisionTransformer or of Eva."""

    MODEL = NaFlexVit
    ABOUT = "NaFlex ViT, SigLIP 2 NaFlex, RADIO, with images of one size in a batch"

    def _check_patches(self, patch_embed: nn.Module | None) -> None:
        embeds = self.model.embeds
        if embeds.norm_input is not None:
            raise ModelError(
                f"this {type(self.model).__name__} norms pixels before it projects them, which is not supported; "
                "create it without input_norm_layer"
            )

    @property
    def patch_size(self) -> tuple[int, int]:
        """See `Family`."""
        height, width = self.model.embeds.patch_size
        return int(height), int(width)

    @property
    def patch_embed(self) -> nn.Module:
        """See `Family`."""
        return self.projection

    @property
    def projection(self) -> Any:
        """See `Family`: a convolution, or a linear layer over flattened pixels."""
        return self.model.embeds.proj

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """See `Family`; the model takes images of any size."""
        size = self.model.embeds.default_img_size or self.model.pretrained_cfg["input_size"][1:]
        return (self.channels, *size)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """See `Family`."""
        rows, columns = self.model.embeds.dynamic_feat_size(size)
        return int(rows), int(columns)

    def check_size(self, size: tuple[int, int]) -> None:
        """See `Family`."""
        if not self.model.embeds.dynamic_img_pad:
            _check_multiple(size, self.model.embeds.patch_size)

    def embed(self, images: Tensor) -> Embedded:
        """See `Family`."""
        tokens, (rows, columns) = self.model.embeds(images)
        grid = (int(rows), int(columns))
        rotary = None if self.model.rope is None else self.model.rope.get_embed(shape=grid)
        return Embedded(partial(self.project, images), tokens, grid, rotary)

    def project(self, images: Tensor) -> Tensor:
        """See `Family`; made anew, since the model adds positions to its output in place."""
        embeds = self.model.embeds
        patches = patchify(images, self.patch_size, self.grid((images.shape[2], images.shape[3])))
        if embeds.is_linear and embeds.channels_last:  # pixel after pixel, each with its channels
            patches = patches.unflatten(-1, (images.shape[1], -1)).transpose(-1, -2).flatten(-2)
        return embeds.norm(nn.functional.linear(patches, embeds.proj.weight.flatten(1), embeds.proj.bias))

    @property
    def _mixed(self) -> bool:
        return bool(self.model.rope_is_mixed)


class BeitFamily(Family):
    """timm's Beit: a bias for the relative position of each two patches, added to the attention logits."""

    MODEL = Beit
    ABOUT = "BEiT, BEiTv2; only strategies that keep patches in their places, and no schedule"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        own = any(block.attn.relative_position_bias_table is not None for block in self.blocks)
        self._biased = own or self.model.rel_pos_bias is not None
        if self._biased and not all(fuses(block) for block in self.blocks):
            raise ModelError(
                f"this {type(model).__name__} adds a bias for relative positions in attention that is not fused; "
                "create it after timm.layers.set_fused_attn(True)"
            )

    @property
    def needs_positions(self) -> bool:
        """Where there is a bias, of the blocks or shared by them."""
        return self._biased

    @property
    def merges_positions(self) -> bool:
        """A bias is one of two places of the grid."""
        return not self._biased

    @property
    def drops_patches(self) -> bool:
        """Never."""
        return False

    def embed(self, images: Tensor) -> Embedded:
        """See `Family`; the model has no method of its own for positions."""
        model = self.model
        patches, grid = embed(model.patch_embed, images)
        tokens = torch.cat([model.cls_token.expand(len(images), -1, -1), patches], dim=1)
        tokens = model.pos_drop(tokens if model.pos_embed is None else tokens + model.pos_embed)
        return Embedded(lambda: patches, tokens, grid)

    def pre_norm(self, tokens: Tensor) -> Tensor:
        """There is none."""
        return tokens

    def options(self, blocks: Sequence[nn.Module], inputs: BlockInputs | None) -> list[dict[str, Any]]:
        """One argument of the blocks takes the shared bias, and whatever else is added to the attention logits."""
        bias = None if inputs is None else inputs.bias
        if self.model.rel_pos_bias is not None:
            shared = self.model.rel_pos_bias()[None]
            bias = shared if bias is None else shared + bias
        return [{} if bias is None else {"shared_rel_pos_bias": bias}] * len(blocks)


FAMILIES: tuple[type[Family], ...] = (Family, EvaFamily, BeitFamily, NaFlexFamily)


def _scale(block: Any, half: int, output: Tensor) -> Tensor:
    """Layer scale of one half of a block, where it has it: a module in some families, a parameter in others."""
    layer = getattr(block, f"ls{half}", None)
    if layer is not None:
        return layer(output)
    gamma = getattr(block, f"gamma_{half}", None)
    return output if gamma is None else gamma * output


def _check_multiple(size: tuple[int, int], patch: tuple[int, int]) -> None:
    if size[0] % patch[0] or size[1] % patch[1]:
        raise ImageError(f"images are {size[0]}x{size[1]}, no multiple of the patch {patch[0]}x{patch[1]}; resize them")
