"""The feature map back: what leaves the blocks, on the full grid."""

from itertools import product

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet

from tests.matrix import matrix
from tests.test_tokenizer import SCHEDULES, STRATEGIES, make_images, make_model
from vwt import IntraImage, Prune, PruningSchedule, VWTokenizer
from vwt.errors import ArgumentError
from vwt.tokens.words import fill, unmerge

CALLS = {
    "defaults": {},
    "some": {"indices": [0, 3]},
    "backwards": {"indices": (4, -6)},
    "last two": {"indices": 2},
    "all normed": {"norm": True},
    "lists": {"output_fmt": "NLC", "indices": [1, 5]},
    "prefix": {"return_prefix_tokens": True, "indices": [2]},
    "only": {"intermediates_only": True, "indices": [2, 4]},
    "early": {"stop_early": True, "indices": [1, 3]},
    "early and only": {"stop_early": True, "intermediates_only": True, "return_prefix_tokens": True, "indices": 1},
}

NO_PREFIX = {"class_token": False, "global_pool": "avg", "reg_tokens": 0}


def same_shapes(one, other):
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape
    return type(one) is type(other) and len(one) == len(other) and all(map(same_shapes, one, other))


def flat(nested):
    return [nested] if isinstance(nested, torch.Tensor) else [tensor for part in nested for tensor in flat(part)]


@pytest.fixture
def images():
    return make_images()


@torch.inference_mode()
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("options", matrix([{}, NO_PREFIX], {}), ids=["1", "0"])
def test_unreduced_is_what_the_model_returns(images, name, options):
    model = make_model(**options)
    got, expected = (one.forward_intermediates(images, **CALLS[name]) for one in (VWTokenizer(model), model))
    assert same_shapes(got, expected)
    assert all(map(torch.equal, flat(got), flat(expected)))


@torch.inference_mode()
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("options", matrix([{}, NO_PREFIX], {}), ids=["1", "0"])
@pytest.mark.filterwarnings("ignore:IntraImage removed none")
def test_dropping_nothing_is_what_the_model_returns(images, name, options):
    """By the way that reduced tokens take."""
    model = make_model(**options)
    got, expected = (
        one.forward_intermediates(images, **CALLS[name]) for one in (VWTokenizer(model, IntraImage(0.0)), model)
    )
    assert same_shapes(got, expected)
    for one, other in zip(flat(got), flat(expected), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("schedule", "strategy"),
    matrix(product(SCHEDULES, STRATEGIES), *((name, "inter_pixel") for name in SCHEDULES), ("several", "intra")),
)
def test_the_last_map_is_that_of_the_features(images, strategy, schedule):
    model = make_model()
    fast = VWTokenizer(model, STRATEGIES[strategy](model), PruningSchedule(SCHEDULES[schedule]))
    features = fast.forward_features(images)
    final, maps = fast.forward_intermediates(images, norm=True, return_prefix_tokens=True)
    torch.testing.assert_close(final, features, atol=1e-5, rtol=1e-5)
    last, prefix = maps[-1]
    torch.testing.assert_close(last.flatten(2).mT, features[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prefix, features[:, :1], atol=1e-5, rtol=1e-5)
    assert [one.shape for one, _ in maps] == [(4, 64, 10, 10)] * 6


@torch.inference_mode()
@pytest.mark.parametrize("strategy", ["none", "intra", "inter_pixel"])
def test_each_map_has_the_tokens_of_its_depth(images, strategy):
    """What is scheduled for a block shows in the map that leaves it, not before."""
    model = make_model()
    fast = VWTokenizer(model, STRATEGIES[strategy](model), PruningSchedule({1: Prune(9), 3: Prune(5)}))
    entering = fast.tokenize(images).lengths
    maps = fast.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    expected = [tuple(n - gone for n in entering) for gone in (0, 9, 9, 14, 14, 14)]
    counts = [tuple(len(image.unique(dim=0)) for image in features) for features in maps]
    assert counts == expected


@torch.inference_mode()
def test_a_dropped_patch_has_the_value_of_what_stands_for_it(images):
    model = make_model()
    fast = VWTokenizer(model, IntraImage(0.4), PruningSchedule({2: Prune(9)}))
    before, nearest = fast.tokenize(images), fill(fast.tokenize(images))
    first, last = fast.forward_intermediates(images, [0, 5], output_fmt="NLC", intermediates_only=True)
    packed, words = fast.backbone.run(fast.backbone.pre_norm(fast.pack(images)[0]), stop=1)[0], nearest
    tokens = torch.cat([run[1:] for run in packed.split()])
    torch.testing.assert_close(first, unmerge(tokens, words))
    for image in range(4):
        dropped = (before.group[image] < 0).nonzero()[:, 0]
        for patch in dropped.tolist():
            kept = [p for p in range(100) if before.group[image, p] >= 0]
            stands = min(kept, key=lambda p: ((p // 10 - patch // 10) ** 2 + (p % 10 - patch % 10) ** 2, p))
            assert torch.equal(first[image, patch], first[image, stands])
            assert torch.equal(last[image, patch], last[image, stands])


@torch.inference_mode()
@pytest.mark.parametrize("norm", [True, False])
def test_feature_getter_net(images, norm):
    model = make_model()
    fast = VWTokenizer(model, IntraImage(0.4))
    net = FeatureGetterNet(fast, out_indices=(1, 4), norm=norm)
    maps = net(images)
    assert [tuple(one.shape) for one in maps] == [(4, 64, 10, 10)] * 2
    assert net.feature_info.channels() == [64, 64]
    assert net.feature_info.reduction() == [16, 16]
    expected = fast.forward_intermediates(images, [1, 4], norm=norm, intermediates_only=True)
    assert all(map(torch.equal, maps, expected))
    assert len(model.blocks) == 6  # nothing is pruned away: the model is not changed


@torch.inference_mode()
def test_images_of_any_size():
    model = timm.create_model("test_vit", num_classes=10, dynamic_img_size=True).eval()
    fast = VWTokenizer(model, IntraImage(0.4))
    (one,) = fast.forward_intermediates(torch.randn(2, 3, 64, 96), 1, intermediates_only=True)
    assert one.shape == (2, 64, 4, 6)


def test_gradients_through_the_map(images):
    fast = VWTokenizer(make_model(), IntraImage(0.4), PruningSchedule({1: Prune(9)}))
    (one,) = fast.forward_intermediates(images.requires_grad_(), 1, intermediates_only=True)
    one.square().sum().backward()
    assert images.grad.any()
    assert fast.model.patch_embed.proj.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_fmt": "NHWC"}, "output_fmt is 'NHWC'; expected 'NCHW' or 'NLC'"),
        ({"attn_mask": None}, "takes no attn_mask where tokens are reduced"),
        ({"output_dict": True, "is_causal": False}, "takes no output_dict, is_causal where tokens are reduced"),
    ],
)
def test_what_it_does_not_take(images, options, message):
    fast = VWTokenizer(make_model(), IntraImage(0.4))
    with pytest.raises(ArgumentError, match=message):
        fast.forward_intermediates(images, **options)


def test_an_index_that_is_none(images):
    fast = VWTokenizer(make_model(), IntraImage(0.4))
    with pytest.raises(AssertionError, match="6"):
        fast.forward_intermediates(images, [6])
