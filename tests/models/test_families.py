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
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def make_model(name, **options):
    """Attention far from uniform, so that equally important tokens are not a matter of rounding."""
    torch.manual_seed(0)
    arguments = {"num_classes": 10, "img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, **options}
    model = timm.create_model("vit_tiny_patch16_224" if name == "gated" else name, **arguments).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request):
    """A model, and five images for it that repeat their first patch ever more often."""
    options = dict(ARCHITECTURES[request.param])
    size = options.pop("image", None)
    model = make_model(request.param, **options)
    patch = patch_size(model)
    size = size or (options.get("img_size", 64),) * 2
    images = torch.randn(5, 3, *size, generator=torch.Generator().manual_seed(3))
    for image, repeats in zip(images, (2, 4, 5, 3, 5), strict=True):
        patches = patchify(image[None], patch)[0]
        columns = size[1] // patch[1]
        for place in range(repeats):
            row, column = (2 * place // columns) * patch[0], (2 * place % columns) * patch[1]
            image[:, row : row + patch[0], column : column + patch[1]] = patches[0].view(3, *patch)
    return model, images


def patch_size(model):
    return (model.patch_embed if hasattr(model, "patch_embed") else model.embeds).patch_size


def make_inter(model, images):
    words = patchify(images, patch_size(model))[:, 0]
    count, cfg = torch.ones(len(words), dtype=torch.int64), model.pretrained_cfg
    return InterImage(Codebook(words, count, count, "pixel", patch_size(model), cfg["mean"], cfg["std"]), 1e-3)


STRATEGIES = {"none": lambda *_: None, "intra": lambda *_: IntraImage(0.3), "inter": make_inter}
SCHEDULES = {"none": {}, "prune": {1: Prune(2)}, "merge": {1: Merge(2)}, "absorb": {1: Absorb(2)}}
REDUCED = [(strategy, schedule) for strategy in STRATEGIES for schedule in SCHEDULES][1:]


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 5])
def test_unreduced_is_the_model(pair, batch):
    model, images = pair[0], pair[1][:batch]
    fast, expected = VWTokenizer(model), model(images)
    assert torch.equal(fast(images), expected)
    assert torch.equal(fast.forward_features(images), model.forward_features(images))
    packed, words = fast.pack(images)
    output = fast.backbone.classify(fast.backbone.pre_norm(packed), words)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6 * float(expected.abs().max()) * 4)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("strategy", "schedule"), matrix(REDUCED, ("none", "merge"), ("intra", "prune"), ("inter", "absorb"))
)
def test_reduced(pair, strategy, schedule):
    model, images = pair
    make = partial(VWTokenizer, model, STRATEGIES[strategy](model, images), PruningSchedule(SCHEDULES[schedule]))
    names = {part for name, _ in model.named_parameters() for part in name.split(".")}
    if "relative_position_bias_table" in names and (strategy == "inter" or schedule != "none"):
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
