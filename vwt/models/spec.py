"""What a model says of itself: its family, and how it cuts and sees patches."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vwt.errors import ModelError
from vwt.models.families import FAMILIES, Family


@dataclass(frozen=True)
class PatchSpec:
    """How a model cuts and sees patches; what a codebook must agree with.

    Attributes:
        model: the model's name, for messages and provenance.
        patch_size: (height, width) in pixels.
        mean: per channel, of the normalisation that the model expects of images in [0, 1].
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
            ModelError: if the model has no patch embedding or no known normalisation.
        """
        patch_embed: Any = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)
        cfg = getattr(model, "pretrained_cfg", None) or {}
        remedy = "create it with timm.create_model, or"
        if from_transformers(model):
            from vwt.models.hf import describe

            patch_embed, cfg = describe(model)
            proj, size, remedy = patch_embed, patch_embed.kernel_size, "save its image processor beside its weights, or"
        elif patch_embed is None or not hasattr(patch_embed, "patch_size"):
            raise ModelError(
                f"{type(model).__name__} has no patch embedding (`patch_embed.patch_size`); "
                "visual words need a Vision Transformer of timm or transformers"
            )
        else:
            proj, size = getattr(patch_embed, "proj", None), patch_embed.patch_size
        if not cfg.get("mean") or not cfg.get("std"):
            raise ModelError(
                f"the normalisation of this {type(model).__name__} is unknown; {remedy} "
                "set model.pretrained_cfg = {'mean': ..., 'std': ...}"
            )
        patch_size = size if isinstance(size, tuple) else (size, size)
        channels = _channels(proj, patch_size)
        if channels is None or hasattr(patch_embed, "backbone"):
            raise ModelError(
                f"the patch projection of this {type(model).__name__} ({type(patch_embed).__name__}) is no plain "
                "convolution over pixels, one patch a step; visual words need one, as in VisionTransformer"
            )
        if len(cfg["mean"]) != channels:
            raise ModelError(
                f"this {type(model).__name__} takes {channels} channels, but its pretrained_cfg has a mean of "
                f"{len(cfg['mean'])}; set model.pretrained_cfg['mean'] and ['std'] to those of its images"
            )
        height, width = patch_size
        name = str(cfg.get("architecture") or type(model).__name__)
        tag = cfg.get("tag")
        return cls(
            model=f"{name}.{tag}" if tag else name,
            patch_size=(int(height), int(width)),
            mean=tuple(float(m) for m in cfg["mean"]),
            std=tuple(float(s) for s in cfg["std"]),
            projection=projection_checksums(proj if hasattr(model, "embeds") else patch_embed),
        )


def from_transformers(model: Any) -> bool:
    """Whether a model is one of transformers, or a subclass of one; it is not imported to say so."""
    return any(kind.__module__.split(".")[0] == "transformers" for kind in type(model).__mro__)


def _channels(projection: Any, patch_size: tuple[int, int]) -> int | None:
    """Channels of the pixels that a patch projection sees one patch a step; None if it does something else."""
    if isinstance(projection, nn.Conv2d) and projection.kernel_size == projection.stride == patch_size:
        return projection.in_channels
    pixels = patch_size[0] * patch_size[1]
    if isinstance(projection, nn.Linear) and projection.in_features % pixels == 0:
        return projection.in_features // pixels
    return None


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
    for family in FAMILIES:
        if isinstance(model, family.MODEL):
            return family(model)
    if from_transformers(model):
        from vwt.models.hf import tower_of

        return tower_of(model)
    if isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict | nn.DataParallel):
        raise ModelError(f"{kind} is not supported: it only holds models; wrap the Vision Transformer inside it")
    names = ", ".join(family.MODEL.__name__ for family in FAMILIES)
    raise ModelError(
        f"{kind} is not supported: it is of no family that vwt knows, in which all blocks attend over one sequence of "
        f"patches, without windows, pooling or convolutions; take one of timm's {names} (see `vwt models`), or "
        "transformers' CLIP, BLIP, ViT, DINOv2 or SigLIP"
    )
