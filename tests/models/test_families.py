"""Many architectures, cut small and with random weights: the same promises for each, whatever reduces its tokens."""

import copy
from functools import partial
from inspect import signature

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block

from tests.matrix import matrix
from vwt import Absorb, Codebook, InterImage, IntraImage, Merge, Prune, PruningSchedule, VWTokenizer
from vwt.errors import ModelError
from vwt.models.spec import PatchSpec
from vwt.models.support import find_support
from vwt.tokens.patches import patchify


def gated_block(dim, num_heads, **options):
    block = Block(dim, num_heads, **options)
    block.attn = Attention(dim, num_heads, qkv_bias=True, gated=True)
    return block


# Options where those of `make_model` do not do; `image` is the size of the images where it is not the model's.
ARCHITECTURES = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch8_224": {"img_size": 32},
    "vit_base_patch32_224": {"img_size": 128},
    "vit_base_patch16_clip_224": {},
    "vit_base_patch16_siglip_224": {},
    "vit_so400m_patch14_siglip_gap_224": {"img_size": 56},
    "vit_small_patch14_dinov2": {"img_size": 56},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56},
    "vit_huge_patch14_gap_224": {"img_size": 56},
    "vit_medium_patch16_gap_256": {},
    "vit_mediumd_patch16_reg4_gap_256": {},
    "vit_betwixt_patch16_reg4_gap_256": {},
    "vit_base_patch16_rpn_224": {},
    "vit_small_patch16_18x2_224": {},
    "vit_intern300m_patch14_448": {"img_size": 56},
    "vit_dlittle_patch16_reg1_gap_256": {"num_heads": 2},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "eva_large_patch14_196": {"img_size": 56},
    "aimv2_large_patch14_224": {"img_size": 56},
    "flexivit_small": {"dynamic_img_size": True, "image": (64, 96)},
    "test_vit": {},
    "test_vit3": {},
    **({"gated": {"block_fn": gated_block}} if "gated" in signature(Attention.__init__).parameters else {}),
    "eva_giant_patch14_224": {"img_size": 56},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "eva02_base_patch16_clip_224": {},
    "vit_medium_patch16_rope_reg1_gap_256": {},
    "vit_small_patch16_rope_224": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_small_patch16_rope_mixed_ape_224": {"dynamic_img_size": True, "image": (48, 80)},
    "vit_small_patch16_dinov3": {"image": (48, 80)},
    "vit_small_plus_patch16_dinov3": {},
    "vit_pe_core_tiny_patch16_384": {},
    "vit_pe_spatial_tiny_patch16_512": {},
    "beit_base_patch16_224": {},
    "beitv2_base_patch16_224": {},
    "naflexvit_base_patch16_gap": {},
    "naflexvit_base_patch16_siglip": {"image": (48, 80)},
    "naflexvit_base_patch16_parfac_gap": {},
    "vit_relpos_small_patch16_224": {},
    "vit_relpos_base_patch16_cls_224": {},
    "vit_relpos_base_patch32_plus_rpn_256": {"img_size": 128},
    "vit_srelpos_small_patch16_224": {},
    "vit_tiny_r_s16_p8_224": {"img_size": 128},
    "vit_small_r26_s32_224": {"img_size": 128},
    "vit_small_resnet26d_224": {"img_size": 128},
    "beit3_base_patch16_224": {},
    "vit_base_patch16_xp_224": {},
    "vit_base_patch14_reg1_tipsv2": {"img_size": 56},
    "vit_base_patch16_radio_v3": {},
    "vit_base_patch16_224_miil": {},
    "vit_base_patch16_clip_quickgelu_224": {},
    "vit_so150m_patch16_reg4_map_256": {},
    "vit_base_patch8_224": {"img_size": 32},
    "vit_base_patch16_384": {"img_size": 64, "in_chans": 4},
    "deit_base_distilled_patch16_384": {"dynamic_img_size": True, "image": (48, 80)},
    "vit_small_patch16_lingbot": {},
    "vit_small_patch16_dinov3_qkvb": {},
    "vit_pe_lang_large_patch14_448": {"img_size": 56},
    "eva_giant_patch14_clip_224": {"img_size": 56, "in_chans": 1},
    "vit_betwixt_patch16_rope_reg4_gap_256": {},
    "vit_base_patch16_rope_ape_224": {},
    "naflexvit_base_patch16_map": {},
    "naflexvit_so150m2_patch16_reg1_gap": {},
}
# Of these all cases are tested at once; of the others in `make test-all`.
QUICK = {
    "vit_base_patch16_clip_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_medium_patch16_gap_256",
    "vit_base_patch16_rpn_224",
    "vit_small_patch16_18x2_224",
    "deit_tiny_distilled_patch16_224",
    "aimv2_large_patch14_224",
    "flexivit_small",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_rope_mixed_ape_224",
    "vit_small_patch16_dinov3",
    "beit_base_patch16_224",
    "naflexvit_base_patch16_siglip",
    "vit_relpos_base_patch16_cls_224",
    "vit_tiny_r_s16_p8_224",
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def make_model(name, **options):
    """Attention far from uniform, so that equally important tokens are not a matter of rounding."""
    torch.manual_seed(0)
    arguments = {"num_classes": 10, "img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, **options}
    model = timm.create_model("vit_tiny_patch16_224" if name == "gated" else name, **arguments).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    channels = arguments.get("in_chans", 3)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.5,) * channels, "std": (0.5,) * channels}
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=matrix(ARCHITECTURES, *QUICK))
def pair(request):
    """A model, and five images for it that repeat their first patch ever more often."""
    options = dict(ARCHITECTURES[request.param])
    size = options.pop("image", None)
    model = make_model(request.param, **options)
    patch, channels = patch_size(model), options.get("in_chans", 3)
    size = size or (options.get("img_size", 64),) * 2
    images = torch.randn(5, channels, *size, generator=torch.Generator().manual_seed(3))
    for image, repeats in zip(images, (2, 4, 5, 3, 5), strict=True):
        patches = patchify(image[None], patch)[0]
        columns = size[1] // patch[1]
        for place in range(repeats):
            row, column = (2 * place // columns) * patch[0], (2 * place % columns) * patch[1]
            image[:, row : row + patch[0], column : column + patch[1]] = patches[0].view(channels, *patch)
    return model, images


def patch_size(model):
    return PatchSpec.of(model).patch_size


def make_inter(model, images):
    words = patchify(images, patch_size(model))[:, 0]
    count, spec = torch.ones(len(words), dtype=torch.int64), PatchSpec.of(model)
    return InterImage(Codebook(words, count, count, "pixel", spec.patch_size, spec.mean, spec.std), 1e-3)


STRATEGIES = {"none": lambda *_: None, "intra": lambda *_: IntraImage(0.3), "inter": make_inter}
SCHEDULES = {"none": {}, "prune": {1: Prune(2)}, "merge": {1: Merge(2)}, "absorb": {1: Absorb(2)}}
REDUCED = [(strategy, schedule) for strategy in STRATEGIES for schedule in SCHEDULES][1:]


@torch.inference_mode()
@pytest.mark.parametrize("batch", matrix([1, 5], 5))
def test_unreduced_is_the_model(pair, batch):
    model, images = pair[0], pair[1][:batch]
    fast, expected = VWTokenizer(model), model(images)
    assert torch.equal(fast(images), expected)
    assert torch.equal(fast.forward_features(images), model.forward_features(images))
    packed, words = fast.pack(images)
    output = fast.backbone.classify(fast.backbone.pre_norm(packed), words)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6 * float(expected.abs().max()) * 4)


@torch.inference_mode()
@pytest.mark.parametrize(("strategy", "schedule"), matrix(REDUCED, ("intra", "prune"), ("inter", "absorb")))
def test_reduced(pair, strategy, schedule):
    model, images = pair
    make = partial(VWTokenizer, model, STRATEGIES[strategy](model, images), PruningSchedule(SCHEDULES[schedule]))
    names = {part for name, _ in model.named_parameters() for part in name.split(".")}
    if names & {"relative_position_bias_table", "rel_pos", "shared_rel_pos"} and (
        strategy == "inter" or schedule != "none"
    ):
        with pytest.raises(ModelError, match="a token of several patches has no single position"):
            make()(images)
        return
    if names & {"lambda_q1", "attns"} and schedule != "none":
        with pytest.raises(ModelError, match="call fused attention once, not 2 times"):
            make()(images)
        return
    fast, prefix, patches = make(), model.num_prefix_tokens, patchify(images, patch_size(model)).shape[1]
    entering = fast.tokenize(images).lengths
    removed = 0 if schedule == "none" else 2
    assert (len(set(entering)) > 1) == (strategy == "inter")

    output, features = fast(images), fast.forward_features(images)
    assert features.shape == model.forward_features(images).shape
    torch.testing.assert_close(fast.forward_head(features), output, atol=1e-4, rtol=1e-4)
    assert (output - model(images)).abs().max() > 1e-4

    packed, words = fast.forward_features(images, unmerge=False)
    assert words.lengths == tuple(count - removed for count in entering)
    assert packed.lengths == tuple(prefix + count for count in words.lengths)
    for run, image in zip(packed.split(), features, strict=True):
        assert torch.equal(run[:prefix], image[:prefix])
        assert len(run) < prefix + patches

    alone = [fast(image[None]) for image in images]
    torch.testing.assert_close(output, torch.cat(alone), **CLOSE)
    for image, one in zip(images, fast.forward_features(images), strict=True):
        torch.testing.assert_close(fast.forward_features(image[None])[0], one, **CLOSE)


@torch.inference_mode()
def test_half_precision_errs_by_its_choice_of_patches(monkeypatch):
    """Patches that are all but equally important are ranked by rounding; what follows the choice is as exact as ever.

    So in a residual post-norm model of random weights, whose blocks change next to nothing.
    """
    torch.manual_seed(0)
    sizes = {"num_classes": 10, "img_size": 112, "depth": 3, "embed_dim": 96, "num_heads": 3}
    model = timm.create_model("vit_base_patch16_rpn_224", **sizes).eval()
    images, schedule = torch.randn(4, 3, 112, 112), {1: Absorb(20)}
    half = copy.deepcopy(model).bfloat16()
    expected, chosen, assign = VWTokenizer(model, schedule=schedule)(images), [], Absorb.assign

    def error(output):
        return float((output.float() - expected).norm() / expected.norm())

    def keep(*arguments):
        chosen.append(assign(*arguments))
        return chosen[-1]

    monkeypatch.setattr(Absorb, "assign", keep)
    VWTokenizer(model, schedule=schedule, check=False)(images)
    fast = VWTokenizer(half, schedule=schedule, check=False)
    assert error(fast(images.bfloat16())) > 0.02
    monkeypatch.setattr(Absorb, "assign", lambda *_: chosen[0])
    assert error(fast(images.bfloat16())) < 0.01


REFUSED = {
    "samvit_base_patch16": "VisionTransformerSAM is not supported: its blocks attend within windows, and add a bias",
    "swin_tiny_patch4_window7_224": "SwinTransformer",
    "swinv2_tiny_window8_256": "SwinTransformerV2",
    "hiera_tiny_224": "Hiera",
    "cait_xxs24_224": "Cait",
    "crossvit_9_240": "CrossVit",
    "xcit_nano_12_p8_224": "Xcit",
    "volo_d1_224": "VOLO",
    "pit_ti_224": "PoolingVisionTransformer",
    "tnt_s_patch16_224": "TNT",
    "twins_svt_small": "Twins",
    "coat_tiny": "CoaT",
    "convit_tiny": "ConVit",
    "levit_128": "LevitDistilled",
    "mvitv2_tiny": "MultiScaleVit",
    "davit_tiny": "DaVit",
    "maxvit_tiny_tf_224": "MaxxVit",
    "mixer_s16_224": "MlpMixer",
    "convnext_tiny": "ConvNeXt",
    "resnet18": "ResNet",
}


@pytest.mark.parametrize("name", matrix(REFUSED, "samvit_base_patch16", "cait_xxs24_224"))
def test_refused_by_name(name):
    reason = find_support(name).reason
    assert f".{REFUSED[name]}" in reason
    assert " is not supported: " in reason
