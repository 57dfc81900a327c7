"""One adapter a family of transformers' vision towers; see `vwt.models.tower`, and `vwt.models.hf` for a list."""

from typing import Any

from torch import Tensor, cat
from transformers.models.clip.modeling_clip import (
    CLIPEncoderLayer,
    CLIPForImageClassification,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from transformers.models.dinov2.modeling_dinov2 import Dinov2ForImageClassification, Dinov2Layer, Dinov2Model
from transformers.models.siglip.modeling_siglip import (
    SiglipEncoderLayer,
    SiglipForImageClassification,
    SiglipVisionModel,
)
from transformers.models.vit.modeling_vit import ViTForImageClassification, ViTLayer, ViTModel

from vwt.errors import ImageError
from vwt.models.tower import Tower

CLIP_NORMALISATION = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


IMAGENET_NORMALISATION = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


HALF_NORMALISATION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


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
