import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vwt import Codebook, InterImage, IntraImage, Neighbours, VWTokenizer
from vwt.errors import ModelError
from vwt.models.spec import PatchSpec, family_of, prepare, projection_checksums
from vwt.tokens.patches import normalise

SMALL = {"img_size": 64, "depth": 1, "embed_dim": 48, "num_heads": 3, "num_classes": 10}


def projection(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Conv2d(3, 5, 4, 4)


def share_a_checksum(one: nn.Module, other: nn.Module) -> bool:
    return bool(projection_checksums(one).items() & projection_checksums(other).items())


def test_spec_of_a_timm_model():
    model = timm.create_model("test_vit.r160_in1k")
    spec = PatchSpec.of(model)
    assert spec.model == "test_vit.r160_in1k"
    assert (spec.patch_size, spec.mean, spec.std) == ((16, 16), (0.5,) * 3, (0.5,) * 3)
    assert spec.projection == projection_checksums(model.patch_embed)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("test_resnet", "ResNet is not supported: it is of no family"),
        ("xcit_nano_12_p16_224", "Xcit is not supported"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer is not supported"),
    ],
)
def test_spec_refuses_what_cannot_be_wrapped(name, why):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ModelError, match=why):
        PatchSpec.of(model)


@pytest.mark.parametrize("cfg", [{}, {"mean": (0.5,) * 3}, {"mean": (0.5,), "std": (0.5,)}])
def test_a_normalisation_is_asked_for_where_it_is_used(small_vit, cfg):
    small_vit.pretrained_cfg = cfg
    for strategy in (IntraImage(0.5), Neighbours(0.3)):
        assert len(VWTokenizer(small_vit, strategy)(torch.randn(2, *family_of(small_vit).input_shape))) == 2
    height, width = family_of(small_vit).patch_size
    count = torch.ones(2, dtype=torch.int64)
    words = torch.randn(2, 3 * height * width)
    book = Codebook(words, count, count, "pixel", (height, width), (0.5,) * 3, (0.5,) * 3, projection={})
    for use in (
        lambda: VWTokenizer(small_vit, InterImage(book)),
        lambda: prepare(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), small_vit),
    ):
        with pytest.raises(ModelError, match=r"normalisation of VisionTransformer is unknown.*; set model\.pre"):
            use()


def test_images_of_one_channel():
    """timm leaves the normalisation of three channels in their pretrained_cfg."""
    model = timm.create_model("vit_tiny_patch16_224", in_chans=1, **SMALL).eval()
    assert VWTokenizer(model, Neighbours(0.3))(torch.randn(2, 1, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_images_are_normalised_in_the_models_dtype(dtype):
    model = timm.create_model("vit_tiny_patch16_224", **SMALL).eval().to(dtype)
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    expected = normalise(images, model.pretrained_cfg["mean"], model.pretrained_cfg["std"]).to(dtype)
    assert torch.equal(prepare(images, model), expected)
    assert expected.dtype == dtype


@torch.inference_mode()
@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "vit_small_patch16_rope_224", "beit_base_patch16_224", "naflexvit_base_patch16_gap"],
)
def test_project_is_what_the_model_projects(name):
    size = {} if "naflex" in name else {"img_size": 64}
    family = family_of(timm.create_model(name, depth=1, embed_dim=48, num_heads=3, **size).eval())
    images = torch.randn(2, *family.input_shape)
    projected = family.project(images)
    assert projected.shape == (2, images[0, 0].numel() // 256, 48)
    assert torch.equal(projected, family.embed(images).project())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_projection_is_recognised_in_another_dtype(dtype):
    assert share_a_checksum(projection(), projection().to(dtype))
    assert not share_a_checksum(projection(), projection(seed=1).to(dtype))


@given(st.sampled_from(["weight", "bias"]), st.integers(0, 4))
def test_projection_is_not_recognised_when_a_value_differs(name, index):
    other = projection()
    with torch.no_grad():
        other.get_parameter(name)[index] += 0.1
    assert not share_a_checksum(projection(), other)


def test_what_is_no_model_is_refused():
    with pytest.raises(ModelError, match=r"builtins\.str is not supported: it is of no family"):
        family_of("vit_tiny_patch16_224")
