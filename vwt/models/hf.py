"""Hugging Face transformers' models; imported only where a model is one of theirs."""

from typing import Any

import transformers
from torch import nn
from transformers.image_processing_base import ImageProcessingMixin

from vwt.errors import ModelError
from vwt.models.blip import BlipTower
from vwt.models.image_text import IMAGE_TEXT_MODELS, VISION, ImageTextModel
from vwt.models.towers import CLIPTower, Dinov2Tower, SiglipTower, Tower, ViTTower

TOWERS: tuple[type[Tower], ...] = (CLIPTower, BlipTower, ViTTower, Dinov2Tower, SiglipTower)


def classes_of(tower: type[Tower]) -> list[type[nn.Module]]:
    """The classes of models that an adapter takes: towers, classifiers, and models of images and text."""
    family = tower.MODEL.__module__
    return [tower.MODEL, *tower.OTHERS, *(kind for kind in IMAGE_TEXT_MODELS if kind.__module__ == family)]


def tower_of(model: nn.Module) -> Tower:
    """The adapter of a model of transformers; of one of images and text, that of its vision tower.

    Raises:
        ModelError: if there is none; says what to do.
    """
    if isinstance(model, tuple(IMAGE_TEXT_MODELS)):
        tower = tower_of(getattr(model, VISION))
        tower.parent = ImageTextModel(model, tower.arguments)
        return tower
    for kind in TOWERS:
        if isinstance(model, (kind.MODEL, *kind.OTHERS)):
            return kind(model)
    raise ModelError(unsupported(type(model)))


def unsupported(kind: type) -> str:
    """Why models of a class cannot be wrapped."""
    names = ", ".join(one.__name__ for tower in TOWERS for one in classes_of(tower))
    return (
        f"{kind.__module__}.{kind.__name__} is not supported; of transformers, vwt takes {names}; of another model of "
        "images and text, wrap the vision tower: model.vision_model = VWTokenizer(model.vision_model, ...)"
    )


def find_class(name: str) -> type[nn.Module] | None:
    """The class of models that has a name in transformers, if there is one."""
    try:
        kind = getattr(transformers, name, None)
    except (ImportError, RuntimeError):  # one that needs what is not installed
        return None
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None


def describe(model: Any) -> tuple[Any, dict[str, Any]]:
    """The patch projection of a model, and what of timm's pretrained_cfg is known of it.

    The normalisation is that of `model.pretrained_cfg` where it has been set, else that of the image processor that is
    stored beside the model's weights, else that of all models of its family, if they have one.
    """
    tower = tower_of(model)
    name = model.config.name_or_path
    known = {"architecture": name or type(model).__name__, "input_size": tower.input_shape, "interpolation": "bicubic"}
    cfg = {**known, **(getattr(model, "pretrained_cfg", None) or {})}
    if cfg.get("mean") and cfg.get("std"):
        return tower.projection, cfg
    stored = _stored_normalisation(name) if name else None
    return tower.projection, {**cfg, **(stored or tower.NORMALISATION or {})}


def _stored_normalisation(name: str) -> dict[str, Any] | None:
    """Mean and std of the image processor of a checkpoint, if it is on this machine."""
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name, local_files_only=True)
    except (OSError, ValueError):
        return None
    mean, std = processor.get("image_mean"), processor.get("image_std")
    return {"mean": tuple(mean), "std": tuple(std)} if mean and std else None
