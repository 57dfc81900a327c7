from functools import partial

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.matrix import matrix
from vwt import Codebook, InterImage, IntraImage, VWTokenizer
from vwt.errors import ImageError, ModelError
from vwt.models.backbone import Backbone
from vwt.models.create import create_model
from vwt.tokens.packing import Packed
from vwt.tokens.patches import patchify
from vwt.tokens.words import group_words

# What a supported model can be made of; `image` is the size of the images where it is not the model's 64 x 64.
OPTIONS = {
    "class_token": {},
    "no_class_token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 4},
    "registers_only": {"class_token": False, "reg_tokens": 3, "global_pool": "avg", "pool_include_prefix": True},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "distilled_dynamic": {"name": "deit_tiny_distilled_patch16_224", "dynamic_img_size": True, "image": (48, 80)},
    "no_embed_class": {"no_embed_class": True, "reg_tokens": 4},
    "no_position": {"pos_embed": "none"},
    "clip": {"pre_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-5), "act_layer": "quick_gelu"},
    "layer_scale": {"init_values": 0.5},
    "qk_norm": {"qk_norm": True},
    "rms_norm": {"norm_layer": "rmsnorm"},
    "embed_norm": {"embed_norm_layer": "layernorm"},
    "avg": {"global_pool": "avg"},
    "max": {"global_pool": "max"},
    "avgmax": {"global_pool": "avgmax"},
    "avg_with_prefix": {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2},
    "avgmax_with_prefix": {"global_pool": "avgmax", "pool_include_prefix": True, "reg_tokens": 2},
    "no_pooling": {"global_pool": ""},
    "fc_norm": {"fc_norm": True},
    "no_fc_norm": {"global_pool": "avg", "fc_norm": False},
    "no_final_norm": {"final_norm": False},
    "dynamic_img_size": {"dynamic_img_size": True, "image": (96, 48)},
    "dynamic_img_pad": {"dynamic_img_size": True, "dynamic_img_pad": True, "image": (50, 70)},
    "no_head": {"num_classes": 0},
    "map": {"global_pool": "map"},
    "map_with_prefix": {"global_pool": "map", "class_token": False, "reg_tokens": 2, "pool_include_prefix": True},
    "prr": {"global_pool": "prr"},
    "no_square": {"img_size": (48, 96), "image": (48, 96)},
    "patch_8": {"patch_size": 8},
    "patch_14": {"patch_size": 14, "img_size": 70, "image": (70, 70)},
    "patch_32": {"patch_size": 32, "img_size": 128, "image": (128, 128)},
    "patch_no_square": {"patch_size": (8, 16)},
    "cut": {"img_size": 70, "image": (70, 70)},
    "grey": {"in_chans": 1, "pretrained_cfg_overlay": {"mean": (0.5,), "std": (0.5,)}},
}
# Of the others, `make test` compares the answers with a loop, and leaves the rest to `make test-all`.
QUICK = {
    "class_token", "registers_only", "distilled_dynamic", "no_position", "clip", "avgmax_with_prefix", "map",
    "dynamic_img_pad", "no_square", "grey",
}  # fmt: skip
by_option = pytest.mark.parametrize("option", matrix(OPTIONS, *QUICK))
ARGUMENTS = {"num_classes": 10, "img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}


def make_model(name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**ARGUMENTS, **options}).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def make_pair(option):
    """A model, and three images for it."""
    options = dict(OPTIONS[option])
    image = options.pop("image", (64, 64))
    model = make_model(**options)
    return model, torch.randn(3, model.in_chans, *image, generator=torch.Generator().manual_seed(3))


def make_strategy(model, images):
    """A strategy that gives each image a number of tokens of its own: a few words near random patches."""
    grid = model.patch_embed.dynamic_feat_size(images.shape[2:])
    words = patchify(images, model.patch_embed.patch_size, grid)[0, :3]
    count, cfg = torch.ones(len(words), dtype=torch.int64), model.pretrained_cfg
    codebook = Codebook(words, count, count, "pixel", model.patch_embed.patch_size, cfg["mean"], cfg["std"])
    return InterImage(codebook, 0.99)


def slow_forward(model, images, words):
    """What the model says of each image by itself, with the patches of each token replaced by their mean."""
    outputs = []
    for image, group in zip(images, words.group, strict=True):
        tokens, prefix = model._pos_embed(model.patch_embed(image[None])), model.num_prefix_tokens
        patches = tokens[:, prefix:]
        means = [patches[:, group == token].mean(1) for token in range(group.max() + 1)]
        encoded = model.norm(model.blocks(model.norm_pre(torch.cat([tokens[:, :prefix], torch.stack(means, 1)], 1))))
        outputs.append(model.forward_head(torch.cat([encoded[:, :prefix], encoded[:, prefix + group]], 1)))
    return torch.cat(outputs)


# -- supported models --------------------------------------------------------------------------------------------------


@torch.inference_mode()
@by_option
def test_no_strategy_is_the_model_bit_for_bit(option):
    model, images = make_pair(option)
    fast = VWTokenizer(model)
    assert torch.equal(fast(images), model(images))
    assert torch.equal(fast.forward_features(images), model.forward_features(images))


@torch.inference_mode()
@pytest.mark.parametrize("option", OPTIONS)
def test_reduced_equals_a_loop(option):
    """Every token is weighed by its patches: pooling over tokens is pooling over the full grid."""
    model, images = make_pair(option)
    fast = VWTokenizer(model, make_strategy(model, images))
    words = fast.tokenize(images)
    assert len(set(words.lengths)) > 1
    assert max(words.lengths) < words.group.shape[1]
    torch.testing.assert_close(fast(images), slow_forward(model, images, words), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@by_option
@pytest.mark.parametrize("make", [lambda *_: IntraImage(0.5), make_strategy], ids=["intra", "inter"])
def test_the_output_is_that_of_the_full_grid(option, make):
    model, images = make_pair(option)
    fast = VWTokenizer(model, make(model, images))
    features = fast.forward_features(images)
    assert features.shape == model.forward_features(images).shape
    torch.testing.assert_close(fast(images), model.forward_head(features), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@by_option
def test_dropping_nothing_is_the_model(option):
    model, images = make_pair(option)
    fast = VWTokenizer(model, IntraImage(0.0))
    torch.testing.assert_close(fast(images), model(images), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@by_option
def test_embed(option):
    model, images = make_pair(option)
    backbone = Backbone(model)
    patches, tokens, (rows, columns) = backbone.embed(images)
    assert patches.shape == (3, rows * columns, 48)
    assert tokens.shape == (3, backbone.prefix + rows * columns, 48)
    assert torch.equal(patches, model.patch_embed(images).flatten(1, -2))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pool", ["avg", "avgmax"])
def test_pooling_in_half_precision(pool, dtype):
    """The sum over 401 patches overflows float16, and bfloat16 has no 401; their mean is an ordinary number."""
    model = make_model(global_pool=pool).to(dtype)
    labels = torch.tensor([[0] * 399 + [1] * 2])
    words = group_words(labels, 2, (1, 401))
    packed = Packed(torch.randn(3, 48, generator=torch.Generator().manual_seed(0)).mul(300).to(dtype), (3,))
    backbone = Backbone(model)
    expected = model.forward_head(backbone.to_grid(packed, words))
    torch.testing.assert_close(backbone.head(packed, words), expected, atol=0.02, rtol=0.02)


# -- refused models ----------------------------------------------------------------------------------------------------


META = torch.device("meta")


def make_on_meta(name):
    with META:
        return timm.create_model(name)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("SwinTransformer", "swin_tiny_patch4_window7_224"),
        ("Hiera", "hiera_tiny_224"),
        ("ConvNeXt", "test_convnext"),
        ("ByobNet", "mobilevit_xs"),
        ("ResNet", "test_resnet"),
        ("Cait", "cait_xxs24_224"),
    ],
)
def test_other_classes_are_refused_by_name(name, model):
    families = "VisionTransformer, Eva, Beit, VisionTransformerRelPos, NaFlexVit"
    message = rf"\.{name} is not supported: it is of no family .*{families}"
    with pytest.raises(ModelError, match=message):
        Backbone(make_on_meta(model))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nn.Sequential, r"Sequential is not supported, but its part '0' is, a VisionTransformer: wrap that part"),
        (nn.DataParallel, r"DataParallel is not supported, but its part 'module' is, a VisionTransformer"),
        (
            partial(torch.compile, backend="eager"),
            r"OptimizedModule .*compiled; wrap it first, and compile the wrapper",
        ),
        (torch.jit.script, r"RecursiveScriptModule .*scripted or traced; wrap it first"),
    ],
)
def test_what_holds_a_model_is_refused(small_vit, make, message):
    with pytest.raises(ModelError, match=message):
        VWTokenizer(make(small_vit), IntraImage(0.5))


def test_another_patch_embedding_is_refused_by_name(small_vit):
    small_vit.patch_embed = nn.Sequential(small_vit.patch_embed)
    with pytest.raises(ModelError, match=r"makes its patches with Sequential, .* not supported.*PatchEmbed"):
        Backbone(small_vit)


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 64, 64), r"shape \(3, 64, 64\); expected \(batch, 3, height, width\).*images\[None\]"),
        (torch.zeros(1, 1, 3, 64, 64), r"shape \(1, 1, 3, 64, 64\); expected \(batch, 3, height, width\)"),
        (torch.zeros(2, 1, 64, 64), r"shape \(2, 1, 64, 64\); expected \(batch, 3, height, width\)"),
        (torch.zeros(2, 64, 64, 3), r"shape \(2, 64, 64, 3\); expected \(batch, 3, height, width\)"),
        (torch.zeros(2, 3, 32, 64), "are 32x64, the model takes 64x64.*resize"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "uint8, the model is torch.float32; .*normalise"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.float64), "float64, the model is torch.float32; cast"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.float16), "float16, the model is torch.float32; cast"),
        (torch.zeros(2, 3, 64, 64).numpy(), "ndarray.*expected .*[Tt]ensor"),
    ],
)
@pytest.mark.parametrize("strategy", [None, IntraImage(0.5)], ids=["full", "intra"])
def test_images_that_do_not_fit(images, message, strategy):
    fast = VWTokenizer(make_model(), strategy)
    for call in (fast, fast.forward_features, fast.tokenize):
        with pytest.raises(ImageError, match=message):
            call(images)


def test_images_must_be_multiples_of_the_patch_unless_padded():
    model, images = make_model(dynamic_img_size=True), torch.zeros(2, 3, 50, 70)
    with pytest.raises(ImageError, match="are 50x70, no multiple of the patch 16x16"):
        Backbone(model).check(images)
    Backbone(make_model(dynamic_img_size=True, dynamic_img_pad=True)).check(images)


def test_any_float_dtype_under_autocast():
    backbone, images = Backbone(make_model()), torch.zeros(2, 3, 64, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        backbone.check(images)
        with pytest.raises(ImageError, match="uint8"):
            backbone.check(images.to(torch.uint8))


# -- create_model ------------------------------------------------------------------------------------------------------


def test_create_model_without_weights():
    model = create_model("test_vit", weights=False)
    assert isinstance(model, VisionTransformer)
    assert not model.training


def test_create_model_from_a_checkpoint(small_vit, tmp_path):
    source = timm.create_model("test_vit")
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model = create_model("test_vit", tmp_path / "weights.safetensors")
    assert not model.training
    assert all(torch.equal(weight, source.state_dict()[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("weights", [True, False])
def test_create_model_of_an_unknown_name(weights):
    with pytest.raises(ModelError, match=r"no model 'vit_giant_patch0'; see timm\.list_models"):
        create_model("vit_giant_patch0", weights=weights)


def test_create_model_without_a_checkpoint_file(tmp_path):
    with pytest.raises(ModelError, match=r"no checkpoint file at .*missing\.safetensors"):
        create_model("test_vit", tmp_path / "missing.safetensors")


def test_create_model_from_no_checkpoint(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"weights\.safetensors holds no weights for test_vit"):
        create_model("test_vit", tmp_path / "weights.safetensors")


def test_create_model_from_a_checkpoint_of_another_model(tmp_path):
    save_file(timm.create_model("test_vit2").state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match=r"weights\.safetensors holds no weights for test_vit"):
        create_model("test_vit", tmp_path / "weights.safetensors")


def test_create_model_while_the_hub_is_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"no pretrained weights for test_vit: .*--checkpoint"):
        create_model("test_vit")
