"""transformers' models of images and text, of which a vision tower is a part: CLIP, SigLIP, and BLIP with its captions.

Nothing of their forward passes or of `generate` is copied either. They run as they are, on a twin that shares all that
the model has, but for two parts: its vision tower answers with what is made of fewer tokens, on the full grid, and its
text model, where that attends the image, is handed the fewer tokens themselves. A token counts there as often as
patches that it stands for, which is as if the full grid were attended.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn
from transformers.models.blip.modeling_blip import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.siglip.modeling_siglip import SiglipModel

# Images to the tower's answer, and, if they were reduced, what gives tokens (B, n, C) and the bias (B, 1, 1, n) with
# which to attend them.
See: TypeAlias = Callable[[Tensor], tuple[Any, Callable[[], tuple[Tensor, Tensor]] | None]]


VISION = "vision_model"


_EMBEDDING = ("forward", "get_image_features", "get_text_features")


# Methods that can be called, and the text model that attends the image, if one does.
IMAGE_TEXT_MODELS: Mapping[type[nn.Module], tuple[tuple[str, ...], str | None]] = {
    CLIPModel: (_EMBEDDING, None),
    SiglipModel: (_EMBEDDING, None),
    BlipForConditionalGeneration: (("forward", "generate"), "text_decoder"),
    BlipForQuestionAnswering: (("forward", "generate"), "text_encoder"),
    BlipForImageTextRetrieval: (("forward",), "text_encoder"),
}


class ImageTextModel:
    """A model of images and text whose vision tower is reduced; it is not changed.

    Args:
        model: of one of `IMAGE_TEXT_MODELS`.
        arguments: picks the images from what the vision tower is called with, see `Family.arguments`.
    """

    def __init__(self, model: nn.Module, arguments: Callable[[Tensor | None, dict[str, Any]], Tensor | None]) -> None:
        self.model, self.arguments = model, arguments
        self.methods, self.reader = next(own for kind, own in IMAGE_TEXT_MODELS.items() if isinstance(model, kind))

    def call(self, method: str, see: See, options: dict[str, Any]) -> Any:
        """One of `methods`, as the model's class has it, with options by name."""
        twin = copy.copy(self.model)
        eyes = _VisionProxy(see, self.arguments)
        parts: dict[str, Any] = {VISION: eyes}
        if self.reader is not None:
            parts[self.reader] = _TextProxy(_heeding_masks(getattr(self.model, self.reader)), eyes)
        twin.__dict__.update(parts)  # found before the modules of these names, which the model shares
        return getattr(type(self.model), method)(twin, **options)


class _VisionProxy:
    """In the place of the vision tower; remembers what it saw."""

    def __init__(self, see: See, arguments: Callable[[Tensor | None, dict[str, Any]], Tensor | None]) -> None:
        self.see, self.arguments = see, arguments
        self.attended: Callable[[], tuple[Tensor, Tensor]] | None = None

    def __call__(self, pixel_values: Tensor | None = None, **options: Any) -> Any:
        output, self.attended = self.see(self.arguments(pixel_values, options))  # type: ignore[arg-type]
        return output


class _TextProxy:
    """In the place of a text model: attends what was seen, whatever it is told to attend of the image."""

    def __init__(self, model: Any, eyes: _VisionProxy) -> None:
        self.model, self.eyes = model, eyes

    def __call__(self, **options: Any) -> Any:
        return self.model(**self._attending(options))

    def generate(self, **options: Any) -> Any:
        return self.model.generate(**self._attending(options))

    def _attending(self, options: dict[str, Any]) -> dict[str, Any]:
        if self.eyes.attended is None or options.get("encoder_hidden_states") is None:
            return options
        tokens, bias = self.eyes.attended()
        return {**options, "encoder_hidden_states": tokens, "encoder_attention_mask": bias}


def _heeding_masks(module: nn.Module) -> nn.Module:
    """A twin of a text model that heeds the mask of the image.

    The layers of transformers 5.23 hand it to their cross attention as `attention_mask`, where that reads
    `encoder_attention_mask`, so that whatever is given is ignored without a word.
    """
    twin = copy.copy(module)
    twin._modules = {name: child and _heeding_masks(child) for name, child in module._modules.items()}
    if isinstance(module, BlipTextSelfAttention):
        twin.forward = partial(_attend, module.forward)
    return twin


def _attend(
    attention: Callable[..., Any],
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **options: Any,
) -> Any:
    if encoder_hidden_states is not None and encoder_attention_mask is None:
        encoder_attention_mask = attention_mask
    return attention(
        hidden_states,
        attention_mask=attention_mask,
        encoder_hidden_states=encoder_hidden_states,
        encoder_attention_mask=encoder_attention_mask,
        **options,
    )
