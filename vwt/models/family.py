"""What an adapter says of a model: where its embedding, blocks, norms, pooling and head are.

Nothing of a model's forward pass is copied here. What an adapter says is checked against the model when that is wrapped
(see `vwt.models.checking`). The adapters are in `vwt.models.families` (timm) and `vwt.models.towers` (transformers).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

from timm.layers import HybridEmbed, PatchEmbed
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import RelPosBlock, ResPostRelPosBlock
from torch import Tensor, nn

from vwt.errors import ArgumentError, ImageError, ModelError
from vwt.tokens.attention import BlockInputs, Half, packable


def embed(patch_embed: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Images (B, C, H, W) to the raw output of the patch projection, and the grid (rows, columns).

    The output is (B, N, D), or (B, rows, columns, D) for models that take any image size.
    """
    output = patch_embed(images)
    if output.ndim == 4:
        return output, (output.shape[1], output.shape[2])
    rows, columns = patch_embed.dynamic_feat_size(images.shape[-2:])  # type: ignore[operator]
    return output, (int(rows), int(columns))


_PRE_NORM = (Block, EvaBlock, BeitBlock, RelPosBlock)


_POST_NORM = (ResPostBlock, EvaBlockPostNorm, ResPostRelPosBlock)


# Mean and standard deviation of images in [0, 1], one number a channel.
Normalisation: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]


class Parent(Protocol):
    """A vision-language model whose vision tower is reduced; `vwt.models.image_text`, `vwt.models.vision_language`."""

    model: Any
    tower: str  # the name of the vision tower in it
    methods: tuple[str, ...]  # that can be called
    reads_layers: bool  # its language model reads the tower's hidden states in the place of placeholders

    @property
    def layers(self) -> Sequence[int] | None:
        """Which hidden states of the tower; None where it is the tower's output."""
        ...

    def main_input(self, method: str) -> str:
        """The name of what a method is given first, without a name."""
        ...

    def call(self, method: str, encode: Any, options: dict[str, Any]) -> Any:
        """One of `methods` with options by name; `encode` gives what the reduced tower answers to images."""
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


@dataclass(frozen=True)
class Abilities:
    """What can be done with the models of a family; `vwt models` shows it.

    Attributes:
        strategies: which can choose their tokens.
        schedules: whether their blocks can make tokens fewer.
        features: whether encoded tokens come back on the full grid.
        export: whether they can be written for another runtime.
        training: whether they can be trained on fewer tokens.
        tune: whether `vwt.tune` takes them, or what it takes of them.
    """

    strategies: str = "all"
    schedules: bool = True
    features: bool = True
    export: bool = True
    training: bool = True
    tune: bool | str = True


class Family:
    """timm's VisionTransformer, and what other families have in common with it.

    Args:
        model: of the class that `MODEL` is.

    Raises:
        ModelError: for a variant of it that cannot be reduced.
    """

    MODEL: type[nn.Module] = VisionTransformer
    ABOUT = "DeiT, DeiT-3, CLIP, SigLIP, DINO, DINOv2, I-JEPA, ..."
    ABILITIES = Abilities()
    parent: "Parent | None" = None  # the vision-language model that was wrapped, if this is its vision tower

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self._check_patches(getattr(model, "patch_embed", None))

    def _check_patches(self, patch_embed: nn.Module | None) -> None:
        if type(patch_embed) not in (PatchEmbed, HybridEmbed):
            raise ModelError(
                f"this {type(self.model).__name__} makes its patches with {type(patch_embed).__name__}, which is not "
                "supported; supported are timm's PatchEmbed, one convolution over pixels, and HybridEmbed"
            )

    def forward(self, images: Tensor) -> Any:
        """The output of the model itself."""
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
        height, width = self.model.patch_embed.feat_ratio(as_scalar=False)
        return int(height), int(width)

    # -- embedding -----------------------------------------------------------------------------------------------------

    @property
    def patch_embed(self) -> nn.Module:
        """The module whose weights decide what `project` makes of a patch."""
        return self.model.patch_embed

    @property
    def projection(self) -> Any:
        """The layer of it that is given pixels."""
        patch_embed = self.model.patch_embed
        if type(patch_embed) is PatchEmbed and isinstance(patch_embed.proj, nn.Conv2d):
            return patch_embed.proj
        return next(layer for layer in patch_embed.modules() if isinstance(layer, nn.Conv2d))

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
        expected, patch = patch_embed.img_size, self.patch_size
        if expected is not None and patch_embed.strict_img_size and size != tuple(expected):
            raise ImageError(
                f"images are {size[0]}x{size[1]}, the model takes {expected[0]}x{expected[1]}; resize them, or create "
                f"the model with img_size={size} or dynamic_img_size=True"
            )
        padded = patch_embed.strict_img_size or patch_embed.dynamic_img_pad
        if expected is not None and not padded:
            check_multiple(size, patch)

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
        """Whether the model's output holds the encoded tokens of the full grid, beside the output of the head."""
        return False

    def head(self, tokens: Tensor, features: Tensor | None = None) -> Any:
        """Encoded tokens (B, n, C), and the full grid (B, P + N, C) if `returns_features`, to the model's output."""
        return self.model.forward_head(tokens)

    # -- the output ---------------------------------------------------------------------------------------------------

    @property
    def has_classes(self) -> bool:
        """Whether the output is logits of classes; else it is embeddings."""
        return bool(getattr(self.model, "num_classes", 1))

    def vectors(self, output: Any) -> Tensor:
        """The model's output to the logits of its classes, or, without classes, its embeddings: (B, D)."""
        return output


def _scale(block: Any, half: int, output: Tensor) -> Tensor:
    """Layer scale of one half of a block, where it has it: a module in some families, a parameter in others."""
    layer = getattr(block, f"ls{half}", None)
    if layer is not None:
        return layer(output)
    gamma = getattr(block, f"gamma_{half}", None)
    return output if gamma is None else gamma * output


def check_multiple(size: tuple[int, int], patch: tuple[int, int]) -> None:
    """Raise ImageError unless images of height and width are made of whole patches."""
    if size[0] % patch[0] or size[1] % patch[1]:
        raise ImageError(f"images are {size[0]}x{size[1]}, no multiple of the patch {patch[0]}x{patch[1]}; resize them")


def lost_places(model: nn.Module) -> ModelError:
    """What is said of tokens without the places that a model with rotary positions needs."""
    return ModelError(
        f"{type(model).__name__} turns its tokens by their places, which these have lost; hand on `Packed` as "
        "`VWTokenizer.pack` gives it, and cut it with `Packed.take`"
    )
