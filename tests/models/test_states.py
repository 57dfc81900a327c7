"""Models in the states that people bring them in: right, or one clear line."""

import pytest
import timm
import torch
from torch import nn

from vwt import Absorb, IntraImage, Neighbours, VWTokenizer
from vwt.errors import ImageError, ModelError

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def make_model(name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    return timm.create_model(name, img_size=64, depth=3, num_classes=10, **options).eval()


def reduced(model):
    """One wrapper whose images differ in their tokens, and one whose images do not."""
    return VWTokenizer(model, Neighbours(threshold=0.5)), VWTokenizer(model, IntraImage(0.5), {1: Absorb(3)})


@torch.inference_mode()
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_quantised(config):
    quantization = pytest.importorskip("torchao.quantization")
    model = make_model()
    expected = VWTokenizer(model, IntraImage(0.5))(IMAGES)
    quantization.quantize_(model, getattr(quantization, config)())
    assert torch.equal(VWTokenizer(model)(IMAGES), model(IMAGES))
    assert (VWTokenizer(model, IntraImage(0.5))(IMAGES) - expected).norm() < 0.1 * expected.norm()
    assert all(fast(IMAGES).shape == (2, 10) for fast in reduced(model))


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it, as LoRA puts it into a model."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight = layer, layer.weight
        self.down, self.up = nn.Linear(layer.in_features, 4, bias=False), nn.Linear(4, layer.out_features, bias=False)

    def forward(self, tokens):
        return self.layer(tokens) + self.up(self.down(tokens))


def test_adapters_are_trained_and_merged():
    model = make_model()
    for block in model.blocks:
        block.attn.qkv, block.mlp.fc1 = Adapted(block.attn.qkv), Adapted(block.mlp.fc1)
    for fast in reduced(model):
        model.zero_grad()
        fast(IMAGES).sum().backward()
        assert all(block.attn.qkv.up.weight.grad.abs().sum() > 0 for block in model.blocks)
    apart = [fast(IMAGES) for fast in reduced(model)]
    with torch.no_grad():
        for block in model.blocks:
            for part, name in ((block.attn, "qkv"), (block.mlp, "fc1")):
                own = getattr(part, name)
                own.layer.weight += own.up.weight @ own.down.weight
                setattr(part, name, own.layer)
    for fast, output in zip(reduced(model), apart, strict=True):
        torch.testing.assert_close(fast(IMAGES), output, atol=1e-4, rtol=1e-4)


def test_peft():
    """A model with LoRA, a wrapper with LoRA, and LoRA merged answer alike; of peft's model, its part."""
    peft = pytest.importorskip("peft", reason="peft is not installed; pip install peft")
    config = peft.LoraConfig(r=4, target_modules=["qkv", "fc1"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(make_model(), config).eval()
    with pytest.raises(ModelError, match=r"its part 'base_model\.model' is, a VisionTransformer: wrap that part"):
        VWTokenizer(adapted)
    model = adapted.base_model.model
    for fast in reduced(model):
        model.zero_grad()
        fast(IMAGES).sum().backward()
        trained = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        assert len(trained) == 3 * 2 * 2
        assert all("lora" in name for name in trained)
        assert all(grad.abs().sum() > 0 for grad in trained.values())
    apart = [fast(IMAGES) for fast in reduced(model)]
    for fast, output in zip(reduced(adapted.merge_and_unload()), apart, strict=True):
        torch.testing.assert_close(fast(IMAGES), output, atol=1e-4, rtol=1e-4)
    assert peft.get_peft_model(VWTokenizer(make_model(), IntraImage(0.5)), config)(IMAGES).shape == (2, 10)


def test_half():
    model = make_model().half()
    with torch.inference_mode():
        assert all(fast(IMAGES.half()).dtype == torch.float16 for fast in reduced(model))
    with pytest.raises(ImageError, match=r"images are torch\.float32, the model is torch\.float16; cast one"):
        VWTokenizer(model, IntraImage(0.5))(IMAGES)


def test_compiled():
    model = make_model()
    with pytest.raises(ModelError, match="the model is compiled; wrap it first, and compile the wrapper"):
        VWTokenizer(torch.compile(model))
    expected = [fast(IMAGES) for fast in reduced(model)]
    model.compile(backend="eager")  # in place; its parts are called as they are
    for fast, output in zip(reduced(model), expected, strict=True):
        torch.testing.assert_close(fast(IMAGES), output)


@torch.inference_mode()
def test_data_parallel():
    model = make_model()
    with pytest.raises(ModelError, match=r"DataParallel is not supported, but its part 'module' is, .*wrap that"):
        VWTokenizer(nn.DataParallel(model))
    for fast in reduced(model):
        torch.testing.assert_close(nn.DataParallel(fast)(IMAGES), fast(IMAGES))


def test_meta():
    with torch.device("meta"):
        model = make_model()
    fast = VWTokenizer(model, schedule={1: Absorb(3)})
    assert fast.backbone.depth == 3
    for images in (IMAGES, IMAGES.to("meta")):
        with pytest.raises(ModelError, match="is on the meta device, without weights; load them"):
            fast(images)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "in_chans": 1}, (1, 64, 64)),
        ("vit_tiny_patch16_224", {"img_size": 64, "in_chans": 4}, (4, 64, 64)),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, (3, 48, 80)),
        ("vit_tiny_patch16_224", {"img_size": (48, 80)}, (3, 48, 80)),
        pytest.param("vit_tiny_patch16_384", {}, (3, 384, 384), marks=pytest.mark.slow),
        pytest.param("vit_small_patch14_dinov2", {"num_classes": 10}, (3, 518, 518), marks=pytest.mark.slow),
    ],
)
def test_images_of_other_sizes_and_channels(name, options, shape):
    model = timm.create_model(name, depth=2, embed_dim=48, num_heads=3, **options).eval()
    images = torch.randn(2, *shape)
    assert torch.equal(VWTokenizer(model)(images), model(images))
    patches = VWTokenizer(model).tokenize(images).counts[0]
    fast = VWTokenizer(model, Neighbours(0.3), {0: Absorb(0.5)})
    assert fast.tokenize(images).counts.tolist() == [patches - int(0.3 * patches)] * 2
    assert fast(images).shape == model(images).shape
    assert fast.forward_features(images).shape == model.forward_features(images).shape
