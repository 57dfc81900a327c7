"""Images to patches to features, in pixel or embedding space.

Patches are in row-major order of the grid. In pixel space a patch is its normalised pixels, channel first
(C, ph, pw) and flattened; in embedding space it is the output of the model's patch projection, without position.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vwt.errors import ModelError

Space = Literal["pixel", "embedding"]
SPACES: tuple[Space, ...] = ("pixel", "embedding")


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
            from vwt.hf import describe

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
        digest = hashlib.sha256()
        for name, tensor in state:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().to(dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        checksums[str(dtype).removeprefix("torch.")] = digest.hexdigest()
    return checksums


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Images (B, C, H, W) uint8 in [0, 255] to float32 as the model was trained: x / 255, minus mean, over std."""
    scale, shift = torch.tensor([(1 / (255 * s), -m / s) for m, s in zip(mean, std, strict=True)]).T
    scale, shift = (t.to(images.device).view(1, -1, 1, 1) for t in (scale, shift))
    return images.float().mul_(scale).add_(shift)


def patchify(images: Tensor, patch_size: tuple[int, int], grid: tuple[int, int] | None = None) -> Tensor:
    """Images (B, C, H, W) to flattened patches (B, N, C·ph·pw).

    Where the image is no multiple of the patch, `grid` says how many patches the model sees: the image is padded with
    zeros or cut at the right and the bottom, as the projection does.

    >>> patchify(torch.arange(16.0).view(1, 1, 4, 4), (2, 2))[0, 1]
    tensor([2., 3., 6., 7.])
    """
    batch, channels, height, width = images.shape
    ph, pw = patch_size
    rows, columns = grid or (height // ph, width // pw)
    if (rows * ph, columns * pw) != (height, width):
        images = F.pad(images, (0, columns * pw - width, 0, rows * ph - height))
    cells = images.reshape(batch, channels, rows, ph, columns, pw)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * ph * pw)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`: flattened patches (B, N, C·ph·pw) to images (B, C, H, W)."""
    batch, (ph, pw), (rows, columns) = patches.shape[0], patch_size, grid
    cells = patches.reshape(batch, rows, columns, -1, ph, pw)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, rows * ph, columns * pw)


def embed(patch_embed: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Images (B, C, H, W) to the raw output of the patch projection, and the grid (rows, columns).

    The output is (B, N, D), or (B, rows, columns, D) for models that take any image size.
    """
    output = patch_embed(images)
    if output.ndim == 4:
        return output, (output.shape[1], output.shape[2])
    rows, columns = patch_embed.dynamic_feat_size(images.shape[-2:])  # type: ignore[operator]
    return output, (int(rows), int(columns))
