"""The adapter of a model, and its patch specification: patch size, normalisation and projection."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from vwt.errors import ModelError
from vwt.models.families import FAMILIES
from vwt.models.family import Family, Normalisation
from vwt.tokens.patches import normalise


@dataclass(frozen=True)
class PatchSpec:
    """Patch size, normalisation and patch projection of a model, with which a codebook must agree.

    Attributes:
        model: the model's name, for messages and provenance.
        patch_size: (height, width) in pixels.
        mean: per channel, of the normalisation that the model expects of images in [0, 1]; empty if it is unknown.
        std: per channel, likewise.
        projection: sha256 of the patch projection's weights by dtype, from the model's own dtype downwards.
    """

    model: str
    patch_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    projection: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> "PatchSpec":
        """Read the spec off a model of timm or transformers.

        Raises:
            ModelError: if the model is not supported.
        """
        family = family_of(model)
        mean, std = family.normalisation or ((), ())
        return cls(family.name, family.patch_size, mean, std, projection_checksums(family.patch_embed))

    @property
    def normalisation(self) -> Normalisation:
        """Mean and std; raises ModelError if they are unknown."""
        return _known((self.mean, self.std) if self.mean else None, self.model)


def prepare(images: Tensor, model: nn.Module) -> Tensor:
    """Images (B, C, H, W) uint8 as a model takes them: normalised, on its device and in its dtype.

    Raises:
        ModelError: if the model is not supported, or its normalisation is unknown.
    """
    family = family_of(model)
    mean, std = _known(family.normalisation, family.name)
    weight = family.projection.weight
    return normalise(images.to(weight.device), mean, std).to(weight.dtype)


def _known(normalisation: Normalisation | None, name: str) -> Normalisation:
    if normalisation is None:
        raise ModelError(
            f"the normalisation of {name} is unknown: it has no mean and std with one number for each channel of its "
            "images; set model.pretrained_cfg = {'mean': ..., 'std': ...}, or, of a model of transformers, save its "
            "image processor beside its weights"
        )
    return normalisation


def projection_checksums(patch_embed: nn.Module) -> dict[str, str]:
    """Checksums of a patch projection's weights, by dtype: their own and the lower precisions they may be cast to.

    Two projections are the same if a dtype that both have has the same checksum. So a codebook built with a float32
    model is recognised by the same model in bfloat16.
    """
    state = sorted(patch_embed.state_dict().items())
    own = next((t.dtype for _, t in state if t.is_floating_point()), torch.float32)
    lower = (torch.float16, torch.bfloat16) if own not in (torch.float16, torch.bfloat16) else ()
    checksums = {}
    for dtype in (own, *lower):
        cast = {name: tensor.detach().cpu().to(dtype) for name, tensor in state}
        checksums[str(dtype).removeprefix("torch.")] = weights_checksum(cast)
    return checksums


def weights_checksum(state: Mapping[str, Tensor]) -> str:
    """sha256 of the names and bytes of tensors, in the order of the mapping."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def family_of(model: Any) -> Family:
    """The adapter of a model.

    Raises:
        ModelError: if there is none; says what to do.
    """
    kind = f"{type(model).__module__}.{type(model).__name__}"
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(f"{kind} is not supported: the model is scripted or traced; wrap it first, and export after")
    if hasattr(model, "_orig_mod"):
        raise ModelError(f"{kind} is not supported: the model is compiled; wrap it first, and compile the wrapper")
    adapter = _adapter_of(type(model))
    if adapter is not None:
        return adapter(model)
    for name, part in model.named_modules() if isinstance(model, nn.Module) else ():
        if _adapter_of(type(part)) is not None:
            raise ModelError(
                f"{kind} is not supported, but its part {name!r} is, a {type(part).__name__}: wrap that part"
            )
    if _from_transformers(type(model)):
        from vwt.models import hf

        raise ModelError(hf.unsupported(type(model)))
    if isinstance(model, VisionTransformerSAM):
        raise ModelError(
            f"{kind} is not supported: its blocks attend within windows, and add a bias for the row and the column of "
            "each place, both of the full grid; take another Vision Transformer of the same weights (`vwt models`)"
        )
    names = ", ".join(family.MODEL.__name__ for family in FAMILIES)
    raise ModelError(
        f"{kind} is not supported: it is of no family that vwt knows, in which all blocks attend over one sequence of "
        f"patches, without windows, pooling or convolutions; take one of timm's {names} (see `vwt models`), or "
        "transformers' CLIP, BLIP, ViT, DINOv2 or SigLIP"
    )


def _adapter_of(kind: type) -> Callable[[nn.Module], Family] | None:
    """The adapter of a class of models, None if there is none; transformers is imported for its own classes only."""
    for family in FAMILIES:
        if issubclass(kind, family.MODEL):
            return family
    if not _from_transformers(kind):
        return None
    from vwt.models import hf

    return hf.adapter_of(kind)


def _from_transformers(kind: type) -> bool:
    return any(base.__module__.split(".")[0] == "transformers" for base in kind.__mro__)
