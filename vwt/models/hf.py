"""Hugging Face transformers' models; imported only where a model is one of theirs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import transformers
from torch import nn

from vwt.errors import ModelError
from vwt.models.blip import BlipTower
from vwt.models.family import Abilities
from vwt.models.image_text import IMAGE_TEXT_MODELS, VISION, ImageTextModel
from vwt.models.tower import Tower
from vwt.models.towers import (
    CLIPTower,
    DeiTTower,
    Dinov2Tower,
    Dinov2WithRegistersTower,
    DINOv3Tower,
    IJepaTower,
    SiglipTower,
    ViTTower,
)
from vwt.models.vision_language import TOWER, TOWER_CLASSES, VISION_LANGUAGE_MODELS, VisionLanguageModel

TOWERS: tuple[type[Tower], ...] = (
    CLIPTower,
    BlipTower,
    ViTTower,
    DeiTTower,
    IJepaTower,
    Dinov2Tower,
    Dinov2WithRegistersTower,
    DINOv3Tower,
    SiglipTower,
)

# What is nearest to a model that cannot be wrapped, by the module of its class.
INSTEAD = {
    "vit_mae": "it masks and shuffles its patches at random: load its weights as transformers' ViTModel",
    "siglip2": "its images come as patches, of any number: load a checkpoint of one image size as SiglipVisionModel, "
    "another as timm's NaFlexVit",
    "timm_wrapper": "it holds a model of timm: wrap that, its .timm_model",
    "beit": "its attention has a bias for relative positions: load its weights as timm's Beit, which takes strategies",
    "sam": "most of its blocks attend within windows of the grid, which fewer tokens do not fill",
}


def classes_of(tower: type[Tower]) -> list[type[nn.Module]]:
    """The classes of models that an adapter takes: towers, classifiers, and models of images and text."""
    family = tower.MODEL.__module__
    return [tower.MODEL, *tower.OTHERS, *(kind for kind in IMAGE_TEXT_MODELS if kind.__module__ == family)]


def adapter_of(kind: type) -> Callable[[nn.Module], Tower] | None:
    """The adapter of a class of models; of a vision-language model, that of its vision tower. None if there is none."""
    if issubclass(kind, tuple(VISION_LANGUAGE_MODELS)):
        return _vision_tower_read_by_layers
    if issubclass(kind, tuple(IMAGE_TEXT_MODELS)):
        return _vision_tower_of
    return next((tower for tower in TOWERS if issubclass(kind, (tower.MODEL, *tower.OTHERS))), None)


def _vision_tower_of(model: nn.Module) -> Tower:
    vision = getattr(model, VISION)
    adapter = adapter_of(type(vision))
    if adapter is None:
        raise ModelError(unsupported(type(vision)))
    tower = adapter(vision)
    tower.parent = ImageTextModel(model, tower.arguments)
    return tower


def _vision_tower_read_by_layers(model: Any) -> Tower:
    vision = getattr(model.model, TOWER)
    adapter = adapter_of(type(vision))
    if adapter is None or not isinstance(vision, TOWER_CLASSES):
        names = " or ".join(kind.__name__ for kind in TOWER_CLASSES)
        raise ModelError(
            f"this {type(model).__name__} has a {type(vision).__name__} as its vision tower, which is not supported; "
            f"expected a {names}"
        )
    tower = adapter(vision)
    tower.parent = VisionLanguageModel(model)
    return tower


def describe() -> dict[type[nn.Module], tuple[str, Abilities]]:
    """The classes of models that can be wrapped, what there is to say of each, and what can be done with it."""
    towers = {kind: (tower.ABOUT, _abilities(tower, kind)) for tower in TOWERS for kind in classes_of(tower)}
    prompts = Abilities(export=False, tune="on prompts")
    return towers | {kind: (about, prompts) for kind, about in VISION_LANGUAGE_MODELS.items()}


def _abilities(tower: type[Tower], kind: type[nn.Module]) -> Abilities:
    """Models of images and text are tuned and exported by their vision towers."""
    own = tower.ABILITIES
    return replace(own, export=False, tune=f"by its {VISION}") if kind in IMAGE_TEXT_MODELS else own


def unsupported(kind: type) -> str:
    """Why models of a class cannot be wrapped."""
    instead = INSTEAD.get(kind.__module__.split(".")[-2])
    if instead is not None:
        return f"{kind.__module__}.{kind.__name__} is not supported: {instead}"
    names = ", ".join(one.__name__ for one in describe())
    return (
        f"{kind.__module__}.{kind.__name__} is not supported; of transformers, vwt takes {names}; of a model that "
        "holds one of these, wrap that part; or see whether timm has the same weights in one of its families "
        "(`vwt models` lists them)"
    )


def find_class(name: str) -> type[nn.Module] | None:
    """The class of models that has a name in transformers, if there is one."""
    try:
        kind = getattr(transformers, name, None)
    except (ImportError, RuntimeError):  # one that needs what is not installed
        return None
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None
