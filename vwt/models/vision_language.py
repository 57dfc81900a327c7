"""transformers' vision-language models whose language model reads image features in the place of placeholders.

LLaVA, LLaVA-NeXT and PaliGemma. Nothing of their forward passes or of `generate` is copied. The model's own
`get_image_features` runs on a shallow copy whose vision tower answers with fewer tokens, on the full grid; run once
more on the numbers of the patches in the place of features, it says which feature is of which patch, through whatever
cropping and arranging of tiles it does. Of the features of one token one is kept, the placeholders in the prompt are
cut to these, and the model gets both as `mm_encoder_outputs`, which transformers has for features made beforehand.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import LlavaNextForConditionalGeneration
from transformers.models.paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
from transformers.models.siglip.modeling_siglip import SiglipVisionModel

from vwt.errors import ArgumentError
from vwt.models.image_tokens import ImageTokens, place_tokens
from vwt.models.prompts import cut_prompts
from vwt.tokens.words import Words

TOWER = "vision_tower"  # within the model that holds tower and language model, `model.model`

TOWER_CLASSES: tuple[type[nn.Module], ...] = (CLIPVisionModel, SiglipVisionModel)

VISION_LANGUAGE_MODELS: Mapping[type[nn.Module], str] = {
    LlavaForConditionalGeneration: "LLaVA with a CLIP or SigLIP tower; images of one size",
    LlavaNextForConditionalGeneration: "LLaVA-NeXT with a CLIP or SigLIP tower; images of any size, as tiles",
    PaliGemmaForConditionalGeneration: "PaliGemma; images of one size",
}

Encode = Callable[[Tensor, Any], tuple[list[Tensor], Words]]  # see `vwt.models.layers`


class VisionLanguageModel:
    """A model of `VISION_LANGUAGE_MODELS` whose language model reads fewer image tokens; it is not changed.

    Args:
        model: the model.
    """

    tower, reads_layers = f"model.{TOWER}", True
    methods: tuple[str, ...] = ("forward", "generate", "get_image_features", "processor_inputs")

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.joins = isinstance(model, PaliGemmaForConditionalGeneration)  # the features of all images, as one tensor

    @property
    def layers(self) -> list[int] | None:
        """The hidden states of the tower that it reads, as its configuration says."""
        layer = getattr(self.model.config, "vision_feature_layer", None)
        return [layer] if isinstance(layer, int) else layer

    def main_input(self, method: str) -> str:
        """As of the model's own methods."""
        return "pixel_values" if method == "get_image_features" else "input_ids"

    def call(self, method: str, encode: Encode | None, options: dict[str, Any]) -> Any:
        """One of `methods`, with options by name.

        Args:
            method: its name; or "tokenize", which gives the Words of images, given as for `get_image_features`.
            encode: what the vision tower answers; None where nothing is reduced.
            options: as the processor gives them, and whatever else the model's own method takes.
        """
        if method not in ("get_image_features", "tokenize"):
            if options.get("pixel_values") is None:
                encode = None  # a prompt without images
            elif options.get("input_ids") is None:
                raise ArgumentError(
                    f"{method} is given pixel_values without input_ids, the prompt with its image tokens; give both, "
                    "as the model's processor makes them"
                )
        if encode is None:
            return options if method == "processor_inputs" else getattr(self.model, method)(**options)
        return getattr(self, f"_{method}")(encode, options)

    # -- the model's methods -------------------------------------------------------------------------------------------

    def _forward(self, encode: Encode, options: dict[str, Any]) -> Any:
        return self._reader()(**self._cut(encode, options))

    def _generate(self, encode: Encode, options: dict[str, Any]) -> Any:
        inputs = self._cut(encode, options)
        given, ids = options["input_ids"], inputs["input_ids"]
        gone = given.shape[1] - ids.shape[1]
        for name in ("max_length", "min_length"):  # these count the prompt
            if inputs.get(name) is not None:
                inputs[name] -= gone
        answer = self._reader().generate(**inputs)
        sequences = answer if isinstance(answer, Tensor) else answer.sequences
        # The prompt as it was given, so that what follows it is where the caller looks for it.
        prompts = given.repeat_interleave(sequences.shape[0] // max(given.shape[0], 1), dim=0).to(sequences.device)
        sequences = torch.cat([prompts, sequences[:, ids.shape[1] :]], dim=1)
        if isinstance(answer, Tensor):
            return sequences
        answer.sequences = sequences
        return answer

    def _get_image_features(self, encode: Encode, options: dict[str, Any]) -> Any:
        output, _ = self._look(encode, options)
        return output if options.get("return_dict", True) else output.to_tuple()

    def _tokenize(self, encode: Encode, options: dict[str, Any]) -> Words:
        return self._look(encode, options)[1].words

    def _processor_inputs(self, encode: Encode, options: dict[str, Any]) -> dict[str, Any]:
        inputs = self._cut(encode, options)
        if self.joins:
            inputs = _join_features(inputs)
        return inputs

    # -- images --------------------------------------------------------------------------------------------------------

    def _cut(self, encode: Encode, options: dict[str, Any]) -> dict[str, Any]:
        """Inputs of the model whose images are encoded, and whose placeholders are cut to what is left of these."""
        output, tokens = self._look(encode, options)
        rest = {name: value for name, value in options.items() if name not in self._image_inputs}
        config = self.model.config
        padding = config.get_text_config().pad_token_id
        cut = cut_prompts(rest, tokens.kept, config.image_token_id, 0 if padding is None else padding)
        return {**cut, "mm_encoder_outputs": {"image": output}}

    @property
    def _image_inputs(self) -> set[str]:
        return set(inspect.signature(self.model.model.get_image_features).parameters) - {"kwargs"}

    def _look(self, encode: Encode, options: dict[str, Any]) -> tuple[BaseModelOutputWithPooling, ImageTokens]:
        """Features (n, D) of each image's tokens that are left, as the model's own method gives them, and which."""
        given = {name: options[name] for name in self._image_inputs & options.keys()}
        tower = _Tower(encode)
        features = self._features(given, {TOWER: tower})
        assert tower.words is not None
        patch = torch.cat(self._features(given, tower.numbered()))[:, 0].long()
        tokens = place_tokens(tower.words, patch)
        kept = [
            own[keep] for own, keep in zip(features, tokens.kept.split([len(own) for own in features]), strict=True)
        ]
        return BaseModelOutputWithPooling(last_hidden_state=tower.last, pooler_output=kept), tokens  # type: ignore[arg-type]

    def _features(self, given: dict[str, Any], parts: dict[str, Any]) -> list[Tensor]:
        """What the model's `get_image_features` makes of images with other parts in the place of its own."""
        shallow = copy.copy(self.model.model)
        shallow.__dict__.update(parts)  # found before the modules of these names, which the model shares
        return list(type(shallow).get_image_features(shallow, **given, return_dict=True).pooler_output)

    def _reader(self) -> Any:
        """The model, or a shallow copy that takes the features of images one by one."""
        if not self.joins:
            return self.model
        shallow = copy.copy(self.model)
        shallow.forward = wraps(self.model.forward)(partial(_forward_joined, self.model.forward))
        return shallow


class _Tower:
    """In the place of the vision tower; remembers the Words of its last images."""

    def __init__(self, encode: Encode) -> None:
        self.encode = encode
        self.words: Words | None = None

    def __call__(self, pixel_values: Tensor, **options: Any) -> SimpleNamespace:
        layers = options.get("output_hidden_states")
        self.layers = [layers] if isinstance(layers, int) else layers
        self.states, self.words = self.encode(pixel_values, self.layers)
        self.last = self.states[-1]
        return self._answer(self.states)

    def _answer(self, states: list[Tensor]) -> SimpleNamespace:
        named = None if self.layers is None else dict(zip(self.layers, states, strict=True))
        return SimpleNamespace(hidden_states=named, last_hidden_state=states[-1])

    def numbered(self) -> dict[str, Any]:
        """Parts of a model whose features are the numbers of the patches that they are of, -1 for no patch."""
        assert self.words is not None
        batch, patches = self.words.group.shape
        number = torch.arange(batch * patches, device=self.last.device, dtype=torch.float64).view(batch, patches, 1)
        prefix = number.new_full((batch, self.last.shape[1] - patches, 1), -1.0)
        states = [torch.cat([prefix, number], dim=1)] * len(self.states)
        return {
            TOWER: lambda *images, **options: self._answer(states),
            "multi_modal_projector": lambda features: features,
            "image_newline": number.new_full((len(states),), -1.0),  # LLaVA-NeXT ends each row of patches with it
        }


def _join_features(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs with the features (n, D) of images as one tensor: (images, n, D), or (1, T, D) where n differs."""
    output = inputs["mm_encoder_outputs"]["image"]
    features = output.pooler_output
    if not isinstance(features, Tensor):
        equal = len({len(own) for own in features}) <= 1
        features = torch.stack(features) if equal else torch.cat(features)[None]
    return {**inputs, "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}


def _forward_joined(forward: Callable[..., Any], *arguments: Any, **inputs: Any) -> Any:
    """A forward pass, of inputs that have the features of images one by one, as `generate` repeats them for beams."""
    if (inputs.get("mm_encoder_outputs") or {}).get("image") is not None:
        inputs = _join_features(inputs)
    return forward(*arguments, **inputs)
