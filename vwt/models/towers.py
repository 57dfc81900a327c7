"""One adapter a family of transformers' vision towers; see `vwt.models.tower`, and `vwt.models.hf` for a list."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, cat, nn
from transformers.models.clip.modeling_clip import (
    CLIPEncoderLayer,
    CLIPForImageClassification,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from transformers.models.deit.modeling_deit import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTForImageClassificationWithTeacherOutput,
    DeiTLayer,
    DeiTModel,
)
from transformers.models.dinov2.modeling_dinov2 import Dinov2ForImageClassification, Dinov2Layer, Dinov2Model
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersLayer,
    Dinov2WithRegistersModel,
)
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTLayer, DINOv3ViTModel
from transformers.models.ijepa.modeling_ijepa import IJepaForImageClassification, IJepaLayer, IJepaModel
from transformers.models.siglip.modeling_siglip import (
    SiglipEncoderLayer,
    SiglipForImageClassification,
    SiglipVisionModel,
)
from transformers.models.vit.modeling_vit import ViTForImageClassification, ViTLayer, ViTModel

from vwt.errors import ImageError
from vwt.models.family import Embedded, Family, lost_places
from vwt.models.tower import Tower
from vwt.tokens.attention import BlockInputs

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

    MODEL: type[nn.Module] = ViTModel
    ABOUT = "ViT, DINO; images of one size"
    OTHERS: tuple[type[nn.Module], ...] = (ViTForImageClassification,)
    INSIDE = "vit"
    BLOCK: type[nn.Module] = ViTLayer
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


class DeiTTower(ViTTower):
    """DeiT: a distillation token after the class token, and perhaps a classifier of each."""

    MODEL = DeiTModel
    ABOUT = "DeiT; images of one size"
    OTHERS = (DeiTForImageClassification, DeiTForImageClassificationWithTeacher)
    INSIDE = "deit"
    BLOCK = DeiTLayer
    NORMALISATION = IMAGENET_NORMALISATION

    @property
    def prefix(self) -> int:
        """The class token and the distillation token."""
        return 2

    @property
    def returns_features(self) -> bool:
        """See `Tower`."""
        return self.model is self.tower

    @property
    def _distilled(self) -> bool:
        return isinstance(self.model, DeiTForImageClassificationWithTeacher)

    def with_loss(self, output: Any, labels: Tensor) -> Any:
        """See `Family`; two classifiers compute none."""
        return Family.with_loss(self, output, labels) if self._distilled else super().with_loss(output, labels)

    def head(self, tokens: Tensor, features: Tensor | None = None) -> Any:
        """See `Family`; two classifiers answer with their mean."""
        if not self._distilled:
            return super().head(tokens, features)
        own, distilled = self.model.cls_classifier(tokens[:, 0]), self.model.distillation_classifier(tokens[:, 1])
        output = DeiTForImageClassificationWithTeacherOutput((own + distilled) / 2, own, distilled)
        return output if self.model.config.return_dict else output.to_tuple()


class IJepaTower(ViTTower):
    """I-JEPA: no class token; a classifier reads the mean of the patches."""

    MODEL = IJepaModel
    ABOUT = "I-JEPA; images of one size"
    OTHERS = (IJepaForImageClassification,)
    INSIDE = "ijepa"
    BLOCK = IJepaLayer
    NORMALISATION = IMAGENET_NORMALISATION

    @property
    def prefix(self) -> int:
        """None."""
        return 0

    @property
    def pool(self) -> str:
        """See `Family`; a pooler would read the first patch."""
        return "" if self.returns_features else "avg"


class Dinov2Tower(Tower):
    """DINOv2: layer scale, and images of any size."""

    MODEL: type[nn.Module] = Dinov2Model
    ABOUT = "DINOv2"
    OTHERS: tuple[type[nn.Module], ...] = (Dinov2ForImageClassification,)
    INSIDE = "dinov2"
    BLOCK: type[nn.Module] = Dinov2Layer
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
        """See `Tower`; the mean comes last."""
        return cat([tokens[:, 0], tokens[:, -1]], dim=1)


class Dinov2WithRegistersTower(Dinov2Tower):
    """DINOv2 with registers, which come after the class token."""

    MODEL: type[nn.Module] = Dinov2WithRegistersModel
    ABOUT = "DINOv2 with registers"
    OTHERS: tuple[type[nn.Module], ...] = (Dinov2WithRegistersForImageClassification,)
    INSIDE = "dinov2_with_registers"
    BLOCK: type[nn.Module] = Dinov2WithRegistersLayer

    @property
    def prefix(self) -> int:
        """The class token and the registers."""
        return 1 + int(self.config.num_register_tokens)


class DINOv3Tower(Dinov2WithRegistersTower):
    """DINOv3: rotary positions, which each block is given."""

    MODEL = DINOv3ViTModel
    ABOUT = "DINOv3"
    OTHERS = ()
    BLOCK = DINOv3ViTLayer
    PROJECTION = "patch_embeddings"

    @property
    def blocks(self) -> Any:
        """See `Family`."""
        return self.tower.model.layer

    @property
    def needs_positions(self) -> bool:
        """Always."""
        return True

    def embed(self, images: Tensor) -> Embedded:
        """See `Family`."""
        cos, sin = self.tower.rope_embeddings(images)
        grid = self.grid((images.shape[2], images.shape[3]))
        return Embedded(partial(self.project, images), self.tower.embeddings(images), grid, cat([sin, cos], dim=-1))

    def options(self, blocks: Sequence[nn.Module], inputs: BlockInputs | None) -> list[dict[str, Any]]:
        """See `Family`."""
        if inputs is None or inputs.rotary is None:
            raise lost_places(self.model)
        sin, cos = inputs.rotary.chunk(2, dim=-1)
        return [{"attention_mask": inputs.bias, "position_embeddings": (cos, sin)}] * len(blocks)

    def final_norm(self, tokens: Tensor) -> Tensor:
        """See `Family`."""
        return self.tower.norm(tokens)


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
