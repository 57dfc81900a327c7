"""One adapter a family of timm's models; see `vwt.models.family` for what an adapter is."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from vwt.errors import ModelError
from vwt.models.family import Abilities, Embedded, Family, check_multiple, embed, lost_places
from vwt.tokens.attention import BlockInputs, fuses
from vwt.tokens.patches import patchify


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
            raise lost_places(self.model)
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
            check_multiple(size, self.model.embeds.patch_size)

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
        # Pixel after pixel, each with its channels, as timm before 1.0.27 always does.
        if embeds.is_linear and getattr(embeds, "channels_last", True):
            patches = patches.unflatten(-1, (images.shape[1], -1)).transpose(-1, -2).flatten(-2)
        return embeds.norm(F.linear(patches, embeds.proj.weight.flatten(1), embeds.proj.bias))

    @property
    def _mixed(self) -> bool:
        return bool(self.model.rope_is_mixed)


class BiasedFamily(Family):
    """What families have in common whose attention adds a bias for the relative position of each two patches."""

    # A bias is one of two places of the grid, and a token of several patches has several. Exporters take the number of
    # images, for each of which a bias is picked, for a constant.
    ABILITIES = Abilities(strategies="that keep patches", schedules=False, export=False)
    SHARED: str  # the argument of a block that takes the bias that all blocks share

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._biased = self.shared_bias() is not None or any(self.has_bias(block) for block in self.blocks)
        if self._biased and not all(fuses(block) for block in self.blocks):
            raise ModelError(
                f"this {type(model).__name__} adds a bias for relative positions in attention that is not fused; "
                "create it after timm.layers.set_fused_attn(True)"
            )

    def has_bias(self, block: Any) -> bool:
        """Whether a block has a bias of its own."""
        raise NotImplementedError

    def shared_bias(self) -> Tensor | None:
        """The bias (1, H, F, F) that all blocks share, if there is one."""
        raise NotImplementedError

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
        """See `Family`; the models have no method of their own for positions."""
        patches, grid = embed(self.model.patch_embed, images)
        return Embedded(lambda: patches, self.with_positions(patches), grid)

    def with_positions(self, patches: Tensor) -> Tensor:
        """Embeddings of patches (B, N, D) to tokens (B, P + N, D), with prefix tokens and position."""
        if self.model.cls_token is None:
            return patches
        return torch.cat([self.model.cls_token.expand(len(patches), -1, -1), patches], dim=1)

    def pre_norm(self, tokens: Tensor) -> Tensor:
        """There is none."""
        return tokens

    def options(self, blocks: Sequence[nn.Module], inputs: BlockInputs | None) -> list[dict[str, Any]]:
        """One argument of the blocks takes the shared bias, and whatever else is added to the attention logits."""
        bias, shared = None if inputs is None else inputs.bias, self.shared_bias()
        if shared is not None:
            bias = shared if bias is None else shared + bias
        return [{} if bias is None else {self.SHARED: bias}] * len(blocks)


class BeitFamily(BiasedFamily):
    """timm's Beit: a bias from a table."""

    MODEL = Beit
    ABOUT = "BEiT, BEiTv2"
    SHARED = "shared_rel_pos_bias"

    def has_bias(self, block: Any) -> bool:
        """See `BiasedFamily`."""
        return block.attn.relative_position_bias_table is not None

    def shared_bias(self) -> Tensor | None:
        """See `BiasedFamily`."""
        return None if self.model.rel_pos_bias is None else self.model.rel_pos_bias()[None]

    def with_positions(self, patches: Tensor) -> Tensor:
        """See `BiasedFamily`."""
        tokens, position = super().with_positions(patches), self.model.pos_embed
        return self.model.pos_drop(tokens if position is None else tokens + position)


class RelPosFamily(BiasedFamily):
    """timm's VisionTransformerRelPos: a bias from a table or an MLP, and no positions beside it."""

    MODEL = VisionTransformerRelPos
    ABOUT = "ViT with relative positions"
    SHARED = "shared_rel_pos"

    def has_bias(self, block: Any) -> bool:
        """See `BiasedFamily`."""
        return block.attn.rel_pos is not None

    def shared_bias(self) -> Tensor | None:
        """See `BiasedFamily`."""
        return None if self.model.shared_rel_pos is None else self.model.shared_rel_pos.get_bias()


FAMILIES: tuple[type[Family], ...] = (Family, EvaFamily, BeitFamily, RelPosFamily, NaFlexFamily)
