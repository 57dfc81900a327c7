"""What the adapters of Hugging Face transformers' vision towers have in common.

As in `vwt.models.family`, nothing of a forward pass is copied, and what an adapter says is checked when a model is
wrapped.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.image_processing_base import ImageProcessingMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.clip.modeling_clip import CLIPVisionModelOutput

from vwt.errors import ArgumentError, ImageError, ModelError
from vwt.models.family import Embedded, Family
from vwt.tokens.attention import BlockInputs, Half, drops_paths


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
        """See `Family`; options that ask for the default behaviour may be given."""
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
        """See `Family`; the model does not return the projection's output, which is computed again if needed."""
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
        return not drops_paths(self.blocks) and self.config._attn_implementation == "sdpa"

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
        """See `Family`; a block has to be given a mask, or None."""
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
