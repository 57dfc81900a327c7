"""Vision-language models of transformers: CLIP, SigLIP, and BLIP with its text models.

Nothing of their forward passes or of `generate` is copied either. They run as they are, on a shallow copy that shares
all that the model has, but for two parts: its vision tower answers with what is made of fewer tokens, on the full grid,
and its text model, where that attends the image, is handed the fewer tokens themselves. A token counts there as often
as patches that it stands for, which is as if the full grid were attended.
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
EncodeImages: TypeAlias = Callable[[Tensor], tuple[Any, Callable[[], tuple[Tensor, Tensor]] | None]]


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

    tower, reads_layers, layers = VISION, False, None

    def __init__(self, model: nn.Module, arguments: Callable[[Tensor | None, dict[str, Any]], Tensor | None]) -> None:
        self.model, self.arguments = model, arguments
        self.methods, self.text_model = next(own for kind, own in IMAGE_TEXT_MODELS.items() if isinstance(model, kind))

    def main_input(self, method: str) -> str:
        """Images, of all methods."""
        return "pixel_values"

    def call(self, method: str, encode: EncodeImages, options: dict[str, Any]) -> Any:
        """One of `methods`, as the model's class has it, with options by name."""
        shallow = copy.copy(self.model)
        vision = _VisionProxy(encode, self.arguments)
        parts: dict[str, Any] = {VISION: vision}
        if self.text_model is not None:
            parts[self.text_model] = _TextProxy(
                _with_cross_attention_mask(getattr(self.model, self.text_model)), vision
            )
        shallow.__dict__.update(parts)  # found before the modules of these names, which the model shares
        return getattr(type(self.model), method)(shallow, **options)


class _VisionProxy:
    """In the place of the vision tower; remembers the tokens of its last images."""

    def __init__(
        self, encode_images: EncodeImages, arguments: Callable[[Tensor | None, dict[str, Any]], Tensor | None]
    ) -> None:
        self.encode_images, self.arguments = encode_images, arguments
        self.attended: Callable[[], tuple[Tensor, Tensor]] | None = None

    def __call__(self, pixel_values: Tensor | None = None, **options: Any) -> Any:
        output, self.attended = self.encode_images(self.arguments(pixel_values, options))  # type: ignore[arg-type]
        return output


class _TextProxy:
    """In the place of a text model: its cross attention gets the reduced tokens in the place of the image tokens."""

    def __init__(self, model: Any, vision: _VisionProxy) -> None:
        self.model, self.vision = model, vision

    def __call__(self, **options: Any) -> Any:
        return self.model(**self._attending(options))

    def generate(self, **options: Any) -> Any:
        return self.model.generate(**self._attending(options))

    def _attending(self, options: dict[str, Any]) -> dict[str, Any]:
        if self.vision.attended is None or options.get("encoder_hidden_states") is None:
            return options
        tokens, bias = self.vision.attended()
        return {**options, "encoder_hidden_states": tokens, "encoder_attention_mask": bias}


def _with_cross_attention_mask(module: nn.Module) -> nn.Module:
    """A shallow copy of a text model whose cross attention reads the mask of the image.

    The layers of transformers 5.23 hand it to their cross attention as `attention_mask`, where that reads
    `encoder_attention_mask`, so that whatever is given is ignored without a word.
    """
    shallow = copy.copy(module)
    shallow._modules = {name: child and _with_cross_attention_mask(child) for name, child in module._modules.items()}
    if isinstance(module, BlipTextSelfAttention):
        shallow.forward = partial(_attend, module.forward)
    return shallow


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
