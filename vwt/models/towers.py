"""One adapter a family of Hugging Face transformers' vision towers; see `vwt.models.hf` for which there are.

As in `vwt.models.families`, nothing of a forward pass is copied, and what an adapter says is checked when a model is
wrapped.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, cat, nn
from transformers.image_processing_base import ImageProcessingMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.clip.modeling_clip import (
    CLIPEncoderLayer,
    CLIPForImageClassification,
    CLIPVisionModel,
    CLIPVisionModelOutput,
    CLIPVisionModelWithProjection,
)
from transformers.models.dinov2.modeling_dinov2 import Dinov2ForImageClassification, Dinov2Layer, Dinov2Model
from transformers.models.siglip.modeling_siglip import (
    SiglipEncoderLayer,
    SiglipForImageClassification,
    SiglipVisionModel,
)
from transformers.models.vit.modeling_vit import ViTForImageClassification, ViTLayer, ViTModel

from vwt.errors import ArgumentError, ImageError, ModelError
from vwt.models.families import Embedded, Family
from vwt.tokens.attention import BlockInputs, Half

CLIP_NORMALISATION = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


IMAGENET_NORMALISATION = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


HALF_NORMALISATION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


class Tower(Family):
    """What the vision towers have in common.

    Class attributes of each say which classes it takes, what its blocks are, and the names of their parts.
    """

    INSIDE = ""  # where the tower is in models of another class than MODEL
    OTHERS: tuple[type[nn.Module], ...] = ()
    BLOCK: type[nn.Module]
    NORMS: tuple[str, str]
    ATTENTION: str
    PROJECTION: str  # within the embeddings
    NORMALISATION: Mapping[str, tuple[float, ...]] | None = None  # where all checkpoints have the same

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.tower: Any = model if isinstance(model, self.MODEL) else getattr(model, self.INSIDE)
        self.config: Any = self.tower.config
        self._check_attention()
        for config in (self.model.config, self.config):
            for name in ("output_hidden_states", "output_attentions"):
                if getattr(config, name, False):
                    raise ModelError(
                        f"this {type(model).__name__} returns more than reduced tokens have; set model.config.{name} = "
                        "False"
                    )

    def _check_attention(self) -> None:
        attention = getattr(self.config, "_attn_implementation", None)
        if attention != "sdpa":
            raise ModelError(
                f"this {type(self.model).__name__} attends with {attention!r}, which vwt cannot tell where an image "
                'ends; create it with attn_implementation="sdpa", or call model.set_attn_implementation("sdpa")'
            )

    # -- calling -------------------------------------------------------------------------------------------------------

    def arguments(self, images: Tensor | None, options: dict[str, Any]) -> Tensor | None:
        """See `Family`; what says only what happens anyway may be given."""
        options = dict(options)
        if images is None:
            images = options.pop("pixel_values", None)
        idle = {name for name, value in options.items() if value is None or value is (name == "return_dict")}
        options = {name: value for name, value in options.items() if name not in idle}
        if options:
            raise ArgumentError(
                f"{type(self.model).__name__} on fewer tokens takes pixel_values alone, without {', '.join(options)}; "
                "call it without, or the model itself as .model; for the hidden states of its blocks on the full grid, "
                "call forward_intermediates(images)"
            )
        return images

    def with_loss(self, output: Any, labels: Tensor) -> Any:
        """See `Family`; classifiers compute it of their logits."""
        if not self.has_classes:
            return super().with_loss(output, labels)
        loss = self.model.loss_function(labels, output[0], self.model.config)
        output = ImageClassifierOutput(loss=loss, logits=output[0])
        return output if self.model.config.return_dict else output.to_tuple()

    def forward_features(self, images: Tensor) -> Tensor:
        """See `Family`."""
        return self.tower(images).last_hidden_state

    # -- images --------------------------------------------------------------------------------------------------------

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """See `Family`.

        The normalisation is that of `model.pretrained_cfg` where it has been set, else that of the image processor
        that is stored beside the model's weights, else that of all models of the family, if they have one.
        """
        model = self.model if self.parent is None else self.parent.model
        name = model.config.name_or_path
        known = {"architecture": name or type(model).__name__, "interpolation": "bicubic"}
        cfg = {**known, **(getattr(model, "pretrained_cfg", None) or {}), "input_size": self.input_shape}
        if cfg.get("mean") and cfg.get("std"):
            return cfg
        return {**cfg, **(_stored_normalisation(name) or self.NORMALISATION or {})}

    @property
    def patch_size(self) -> tuple[int, int]:
        """See `Family`."""
        height, width = self.projection.kernel_size
        return int(height), int(width)

    # -- embedding -----------------------------------------------------------------------------------------------------

    @property
    def patch_embed(self) -> nn.Module:
        """See `Family`."""
        return self.projection

    @property
    def projection(self) -> Any:
        """See `Family`."""
        return self.tower.embeddings.get_submodule(self.PROJECTION)

    def project(self, images: Tensor) -> Tensor:
        """See `Family`."""
        return self.projection(images).flatten(2).mT

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """See `Family`."""
        size = self.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.channels, height, width

    @property
    def channels(self) -> int:
        """See `Family`."""
        return int(self.projection.in_channels)

    @property
    def prefix(self) -> int:
        """The class token."""
        return 1

    @property
    def drops_patches(self) -> bool:
        """Never."""
        return False

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """See `Family`."""
        height, width = self.patch_size
        return size[0] // height, size[1] // width

    def check_size(self, size: tuple[int, int]) -> None:
        """See `Family`."""
        expected = self.input_shape[1:]
        if size != expected:
            raise ImageError(
                f"images are {size[0]}x{size[1]}, the model takes {expected[0]}x{expected[1]}; resize them"
            )

    def embed(self, images: Tensor) -> Embedded:
        """See `Family`; the model does not hand out the projection's output, so that it is made anew where needed."""
        grid = self.grid((images.shape[2], images.shape[3]))
        return Embedded(partial(self.project, images), self.tower.embeddings(images), grid)

    # -- blocks --------------------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> Any:
        """See `Family`."""
        return self.tower.encoder.layers

    @property
    def checkpoints(self) -> bool:
        """Blocks see to it themselves, and only in train mode."""
        return False

    @property
    def packable(self) -> bool:
        """See `Family`."""
        return not self.blocks.training and self.config._attn_implementation == "sdpa"

    def pre_norm(self, tokens: Tensor) -> Tensor:
        """There is none."""
        return tokens

    def final_norm(self, tokens: Tensor) -> Tensor:
        """See `Family`."""
        return self.tower.layernorm(tokens)

    def options(self, blocks: Sequence[nn.Module], inputs: BlockInputs | None) -> list[dict[str, Any]]:
        """See `Family`."""
        return [{"attention_mask": None if inputs is None else inputs.bias}] * len(blocks)

    def calls(self, blocks: Sequence[nn.Module], inputs: BlockInputs | None) -> Sequence[Callable[[Tensor], Tensor]]:
        """See `Family`; a block always wants to hear of a mask."""
        return [partial(block, **own) for block, own in zip(blocks, self.options(blocks, inputs), strict=True)]

    def scale(self, block: Any, half: int, output: Tensor) -> Tensor:
        """What a block does with the output of its attention (half 1) or MLP (half 2) before adding it."""
        return output

    def halves(self, block: Any) -> tuple[Half, Half]:
        """See `Family`."""
        whole = type(block) is not self.BLOCK

        def attention(tokens: Tensor, inputs: BlockInputs | None) -> Tensor:
            (options,) = self.options([block], inputs)
            if whole:
                return block(tokens, **options)
            output, _ = getattr(block, self.ATTENTION)(getattr(block, self.NORMS[0])(tokens), **options)
            return tokens + self.scale(block, 1, output)

        def mlp(tokens: Tensor, inputs: BlockInputs | None) -> Tensor:
            if whole:
                return tokens
            return tokens + self.scale(block, 2, block.mlp(getattr(block, self.NORMS[1])(tokens)))

        return attention, mlp

    # -- head ----------------------------------------------------------------------------------------------------------

    @property
    def pool(self) -> str:
        """See `Family`."""
        return "token"

    @property
    def pools_prefix(self) -> bool:
        """Never."""
        return False

    @property
    def returns_features(self) -> bool:
        """Classifiers return logits alone."""
        return not hasattr(self.model, "classifier")

    def head(self, tokens: Tensor, features: Tensor | None = None) -> Any:
        """See `Family`."""
        if not self.returns_features:
            output: Any = ImageClassifierOutput(logits=self.model.classifier(self.classified(tokens)))
        elif self.model is self.tower:
            output = BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=self.pooled(tokens))
        else:
            embeds = self.model.visual_projection(self.pooled(tokens))
            output = CLIPVisionModelOutput(image_embeds=embeds, last_hidden_state=features)
        return output if self.model.config.return_dict else output.to_tuple()

    @property
    def has_classes(self) -> bool:
        """See `Family`."""
        return not self.returns_features

    def vectors(self, output: Any) -> Tensor:
        """See `Family`; projected embeddings come first, pooled ones second, and some have neither."""
        if self.has_classes or self.model is not self.tower:
            return output[0]
        return output[1] if len(output) > 1 else output[0].mean(dim=1)

    def pooled(self, tokens: Tensor) -> Tensor | None:
        """The tower's pooler on encoded tokens."""
        return tokens[:, 0]

    def classified(self, tokens: Tensor) -> Tensor:
        """What a classifier reads of encoded tokens."""
        return tokens[:, 0]


class CLIPTower(Tower):
    """CLIP: a norm before the blocks; the one after them is the pooler's."""

    MODEL = CLIPVisionModel
    ABOUT = "CLIP; images of one size"
    OTHERS = (CLIPVisionModelWithProjection, CLIPForImageClassification)
    INSIDE = "vision_model"
    BLOCK = CLIPEncoderLayer
    NORMS = ("layer_norm1", "layer_norm2")
    ATTENTION = "self_attn"
    PROJECTION = "patch_embedding"
    NORMALISATION = CLIP_NORMALISATION

    def pre_norm(self, tokens: Tensor) -> Tensor:
        """See `Family`."""
        return self.tower.pre_layrnorm(tokens)

    def final_norm(self, tokens: Tensor) -> Tensor:
        """There is none."""
        return tokens

    @property
    def pool(self) -> str:
        """A classifier reads the mean of the patches."""
        return "token" if self.returns_features else "avg"

    def pooled(self, tokens: Tensor) -> Tensor:
        """See `Tower`."""
        return self.tower.post_layernorm(tokens[:, 0])

    def classified(self, tokens: Tensor) -> Tensor:
        """The mean, which comes after the class token."""
        return tokens[:, 1]


class ViTTower(Tower):
    """ViT, as Google trained it, and DINO."""

    MODEL = ViTModel
    ABOUT = "ViT, DINO; images of one size"
    OTHERS = (ViTForImageClassification,)
    INSIDE = "vit"
    BLOCK = ViTLayer
    NORMS = ("layernorm_before", "layernorm_after")
    ATTENTION = "attention"
    PROJECTION = "patch_embeddings.projection"

    @property
    def blocks(self) -> Any:
        """See `Family`."""
        return self.tower.layers

    def scale(self, block: Any, half: int, output: Tensor) -> Tensor:
        """See `Tower`."""
        return block.dropout(output)

    def pooled(self, tokens: Tensor) -> Tensor | None:
        """See `Tower`; it may have none."""
        return None if self.tower.pooler is None else self.tower.pooler(tokens)


class Dinov2Tower(Tower):
    """DINOv2: layer scale, and images of any size."""

    MODEL = Dinov2Model
    ABOUT = "DINOv2"
    OTHERS = (Dinov2ForImageClassification,)
    INSIDE = "dinov2"
    BLOCK = Dinov2Layer
    NORMS = ("norm1", "norm2")
    ATTENTION = "attention"
    PROJECTION = "patch_embeddings.projection"
    NORMALISATION = IMAGENET_NORMALISATION

    def check_size(self, size: tuple[int, int]) -> None:
        """See `Family`."""
        height, width = self.patch_size
        if size[0] < height or size[1] < width:
            raise ImageError(f"images are {size[0]}x{size[1]}, less than one patch {height}x{width}; resize them")

    @property
    def blocks(self) -> Any:
        """See `Family`."""
        return self.tower.encoder.layer

    def scale(self, block: Any, half: int, output: Tensor) -> Tensor:
        """See `Tower`."""
        return block.drop_path(getattr(block, f"layer_scale{half}")(output))

    @property
    def pool(self) -> str:
        """A classifier reads the class token and the mean of the patches."""
        return "token" if self.returns_features else "avg"

    def classified(self, tokens: Tensor) -> Tensor:
        """See `Tower`."""
        return cat([tokens[:, 0], tokens[:, 1]], dim=1)


class SiglipTower(Tower):
    """SigLIP: no class token; a pooler that attends the patches, or a classifier of their mean."""

    MODEL = SiglipVisionModel
    ABOUT = "SigLIP; images of one size"
    OTHERS = (SiglipForImageClassification,)
    INSIDE = "vision_model"
    BLOCK = SiglipEncoderLayer
    NORMS = ("layer_norm1", "layer_norm2")
    ATTENTION = "self_attn"
    PROJECTION = "patch_embedding"
    NORMALISATION = HALF_NORMALISATION

    @property
    def prefix(self) -> int:
        """None."""
        return 0

    def final_norm(self, tokens: Tensor) -> Tensor:
        """See `Family`."""
        return self.tower.post_layernorm(tokens)

    @property
    def pool(self) -> str:
        """See `Family`."""
        return "" if self.returns_features else "avg"

    def pooled(self, tokens: Tensor) -> Tensor | None:
        """See `Tower`; it may have none."""
        return self.tower.head(tokens) if self.tower.use_head else None


def _stored_normalisation(name: str) -> dict[str, Any] | None:
    """Mean and std of the image processor of a checkpoint, if it is on this machine."""
    if not name:
        return None
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name, local_files_only=True)
    except (OSError, ValueError):
        return None
    mean, std = processor.get("image_mean"), processor.get("image_std")
    return {"mean": tuple(mean), "std": tuple(std)} if mean and std else None
