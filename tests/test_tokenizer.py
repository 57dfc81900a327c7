import copy
import itertools
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import ResPostBlock
from timm.optim import create_optimizer_v2
from torch import nn

from tests.matrix import matrix
from vwt import Absorb, Codebook, InterImage, IntraImage, Merge, Prune, PruningSchedule, VWTokenizer
from vwt.errors import ArgumentError, MismatchError, ModelError
from vwt.models.spec import PatchSpec
from vwt.tokens.packing import Packed
from vwt.tokens.patches import patchify
from vwt.tokens.words import Words, group_words, unmerge

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def make_images():
    """Four images of 160 x 160 pixels that repeat their first patch ever more often: each has tokens of its own."""
    images = torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    for repeats, image in enumerate(images):
        image[:, : 32 * repeats] = image[:, :16, :16].repeat(1, 2 * repeats, 10)
    return images


def make_inter(model, space, threshold=1e-3):
    """A codebook of the first patch of each image, and of strangers."""
    spec = PatchSpec.of(model)
    with torch.no_grad():
        features = patchify(make_images(), spec.patch_size) if space == "pixel" else model.patch_embed(make_images())
        features = features.flatten(1, -2)[:, 0] if space == "embedding" else features[:, 0]
    words = torch.cat([features, torch.randn(6, features.shape[-1], generator=torch.Generator().manual_seed(1))])
    count = torch.ones(len(words), dtype=torch.int64)
    projection = spec.projection if space == "embedding" else {}
    codebook = Codebook(words, count, count, space, spec.patch_size, spec.mean, spec.std, projection)
    return InterImage(codebook, threshold)


STRATEGIES = {
    "none": lambda model: None,
    "intra": lambda model: IntraImage(0.4),
    "inter_pixel": lambda model: make_inter(model, "pixel"),
    "inter_embedding": lambda model: make_inter(model, "embedding"),
}


@pytest.fixture
def images():
    return make_images()


@pytest.fixture(params=matrix(STRATEGIES, "intra", "inter_pixel"))
def fast(request, small_vit):
    return VWTokenizer(small_vit, STRATEGIES[request.param](small_vit))


@pytest.fixture
def inter(small_vit):
    return VWTokenizer(small_vit, make_inter(small_vit, "pixel"))


# -- what it answers ---------------------------------------------------------------------------------------------------


def test_tokenize_says_which_patches_make_which_token(small_vit, images):
    counts = {name: VWTokenizer(small_vit, make(small_vit)).tokenize(images) for name, make in STRATEGIES.items()}
    assert all(isinstance(words, Words) and words.grid == (10, 10) for words in counts.values())
    assert {name: words.lengths for name, words in counts.items()} == {
        "none": (100,) * 4,
        "intra": (60,) * 4,
        "inter_pixel": (100, 81, 61, 41),
        "inter_embedding": (100, 81, 61, 41),
    }


@torch.inference_mode()
def test_every_image_is_answered_as_if_alone(fast, images):
    together, alone = fast(images), torch.cat([fast(image[None]) for image in images])
    torch.testing.assert_close(together, alone, **CLOSE)
    features = torch.cat([fast.forward_features(image[None]) for image in images])
    torch.testing.assert_close(fast.forward_features(images), features, **CLOSE)


@torch.inference_mode()
def test_the_order_of_images_does_not_matter(fast, images):
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(fast(images[order]), fast(images)[order], **CLOSE)
    assert torch.equal(fast.tokenize(images[order]).group, fast.tokenize(images).group[order])


@torch.inference_mode()
def test_forward_is_the_head_on_the_features(fast, images):
    features = fast.forward_features(images)
    assert features.shape == (4, 101, 64)
    torch.testing.assert_close(fast.forward_head(features), fast(images), **CLOSE)
    pooled = fast.forward_head(features, pre_logits=True)
    assert torch.equal(pooled, fast.model.forward_head(features, pre_logits=True))


@torch.inference_mode()
def test_features_without_unmerging(fast, images):
    words = fast.tokenize(images)
    packed, same = fast.forward_features(images, unmerge=False)
    assert isinstance(packed, Packed)
    assert torch.equal(same.group, words.group)
    assert packed.lengths == tuple(1 + count for count in words.lengths)
    features = fast.forward_features(images)
    for run, full, group in zip(packed.split(), features, words.group, strict=True):
        seen = group >= 0
        torch.testing.assert_close(run[0], full[0], **CLOSE)
        torch.testing.assert_close(run[1 + group[seen]], full[1:][seen], **CLOSE)


@torch.inference_mode()
def test_reduction_changes_something(inter, images):
    """Or else all of these tests could pass by running the whole model."""
    change = (inter(images) - inter.model(images)).abs().amax(1)
    assert change[0] < 1e-5
    assert (change[1:] > 1e-3).all()


@torch.inference_mode()
@pytest.mark.parametrize("name", STRATEGIES)
def test_no_images(images, name):
    """As the model answers, where its images are all of one size."""
    model = timm.create_model("test_vit", num_classes=10, img_size=160, dynamic_img_size=False).eval()
    fast = VWTokenizer(model, STRATEGIES[name](model))
    assert fast(images[:0]).shape == model(images[:0]).shape == (0, 10)
    assert fast.forward_features(images[:0]).shape == (0, 101, 64)
    assert fast.tokenize(images[:0]).lengths == ()


@torch.inference_mode()
@pytest.mark.parametrize("layout", ["channels_last", "strided", "expanded"])
def test_the_layout_of_the_images_does_not_matter(fast, images, layout):
    if layout == "channels_last":
        other = images.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        other = images.repeat_interleave(2, dim=3)[..., ::2]
    else:
        images, other = images[:1].repeat(3, 1, 1, 1), images[:1].expand(3, -1, -1, -1)
    assert torch.equal(fast.tokenize(images).group, fast.tokenize(other).group)
    torch.testing.assert_close(fast(images), fast(other), **CLOSE)


def test_the_images_are_not_changed(fast, images):
    fast(images)
    assert torch.equal(images, make_images())


class EveryOther(nn.Module):
    """A strategy of the user's own: every other patch makes one token with the patch before it."""

    space, fixed_count, size_exponent = "embedding", False, 0.0

    def bind(self, spec):
        return self

    def forward(self, features, grid):
        labels = torch.arange(features.shape[1]).div(2, rounding_mode="floor").expand(len(features), -1)
        return group_words(labels, features.shape[1], grid)


@torch.inference_mode()
def test_a_strategy_of_ones_own(small_vit, images):
    fast = VWTokenizer(small_vit, EveryOther())
    assert fast.tokenize(images).lengths == (50,) * 4
    tokens = small_vit._pos_embed(small_vit.patch_embed(images))
    pairs = torch.cat([tokens[:, :1], tokens[:, 1:].unflatten(1, (50, 2)).mean(2)], dim=1)
    expected = small_vit.forward_head(small_vit.norm(small_vit.blocks(pairs)))
    torch.testing.assert_close(fast(images), expected, **CLOSE)


# -- the model is not changed ------------------------------------------------------------------------------------------


def test_the_model_is_not_changed(small_vit, images):
    def view():
        return (
            type(small_vit),
            {name: set(module.__dict__) for name, module in small_vit.named_modules()},
            {name: type(module) for name, module in small_vit.named_modules()},
            {name: id(tensor) for name, tensor in small_vit.named_parameters()},
            [hooks for module in small_vit.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)],
            small_vit.forward.__func__,
        )

    before, state = view(), copy.deepcopy(small_vit.state_dict())
    expected = small_vit(images)
    VWTokenizer(small_vit, make_inter(small_vit, "pixel"))(images)
    assert view() == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in small_vit.state_dict().items())
    assert torch.equal(small_vit(images), expected)


def test_a_strategy_serves_several_models(small_vit, images):
    strategy = make_inter(small_vit, "pixel")
    other = timm.create_model("test_vit", num_classes=10, depth=2).eval()
    other.pretrained_cfg["mean"] = (0.4, 0.4, 0.4)
    first = VWTokenizer(small_vit, strategy)
    expected = first(images)
    VWTokenizer(other, strategy)(images)
    assert torch.equal(first(images), expected)


# -- a module like the model -------------------------------------------------------------------------------------------


def test_attributes_of_the_model(fast):
    for name in ("num_features", "num_classes", "pretrained_cfg", "default_cfg", "num_prefix_tokens", "embed_dim"):
        assert getattr(fast, name) == getattr(fast.model, name)
    assert fast.patch_embed is fast.model.patch_embed
    assert fast.get_classifier() is fast.model.head


def test_an_unknown_attribute(fast):
    with pytest.raises(AttributeError, match="no_such_thing"):
        fast.no_such_thing  # noqa: B018
    assert not hasattr(fast, "no_such_thing")


@pytest.mark.parametrize("name", ["prune_intermediate_layers", "get_intermediate_layers"])
def test_methods_that_know_nothing_of_reduced_tokens_are_refused(fast, name):
    with pytest.raises(AttributeError, match=rf"knows nothing of reduced tokens; .* call it as \.model\.{name}"):
        getattr(fast, name)


def test_another_classifier(inter, images):
    inter.reset_classifier(7)
    assert inter.num_classes == 7
    assert inter(images).shape == (4, 7)


def test_train_and_eval(small_vit):
    fast = VWTokenizer(small_vit, IntraImage(0.4))
    assert not fast.training
    fast.train()
    assert small_vit.training
    assert VWTokenizer(small_vit).training
    fast.eval()
    assert not small_vit.training


def test_the_state_dict_is_the_models(fast):
    state = fast.state_dict()
    assert list(state) == list(fast.model.state_dict())
    assert all(state[name].data_ptr() == tensor.data_ptr() for name, tensor in fast.model.state_dict().items())


@pytest.mark.parametrize("strict", [True, False])
def test_state_dicts_load_both_ways(fast, strict):
    other = timm.create_model("test_vit", num_classes=10).eval()
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    result = fast.load_state_dict(state, strict=strict)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(tensor, state[name]) for name, tensor in fast.model.state_dict().items())
    nn.init.zeros_(other.head.weight)
    other.load_state_dict(fast.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def test_state_dicts_within_another_module(small_vit):
    """Names of the outer module that are also the model's are not taken for the model's."""

    class Outer(nn.Module):
        def __init__(self, vit):
            super().__init__()
            self.head, self.vit, self.norm = nn.Linear(3, 3), vit, nn.LayerNorm(3)

    plain, wrapped = Outer(copy.deepcopy(small_vit)), Outer(VWTokenizer(small_vit, IntraImage(0.4)))
    assert set(wrapped.state_dict()) == set(plain.state_dict())
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    wrapped.load_state_dict(plain.state_dict())
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in wrapped.state_dict().items())
    plain.load_state_dict(wrapped.state_dict())


def test_a_state_dict_that_does_not_fit(inter):
    state = inter.state_dict()
    del state["head.bias"]
    with pytest.raises(RuntimeError, match=r"head\.bias"):
        inter.load_state_dict(state)
    with pytest.raises(RuntimeError, match='"stranger"'):
        inter.load_state_dict({**inter.state_dict(), "stranger": torch.zeros(1)})


@torch.inference_mode()
def test_a_deep_copy_gives_the_same_and_stands_alone(fast, images):
    twin, expected = copy.deepcopy(fast), fast(images)
    assert list(twin.state_dict()) == list(fast.state_dict())
    nn.init.zeros_(fast.model.head.weight)
    assert torch.equal(twin(images), expected)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", matrix([torch.float16, torch.bfloat16], torch.bfloat16))
def test_half_precision(fast, images, dtype):
    expected, words = fast(images), fast.tokenize(images)
    half = copy.deepcopy(fast).to(dtype)
    output = half(images.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.05)
    assert half.tokenize(images.to(dtype)).lengths == words.lengths


@torch.inference_mode()
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_model_in_half_precision_is_wrapped_alike(small_vit, images, name):
    strategy = STRATEGIES[name](small_vit)
    after = VWTokenizer(copy.deepcopy(small_vit), strategy).bfloat16()
    before = VWTokenizer(small_vit.bfloat16(), strategy)
    assert torch.equal(before(images.bfloat16()), after(images.bfloat16()))


@torch.inference_mode()
def test_autocast(fast, images):
    expected = fast(images)
    with torch.autocast("cpu", torch.bfloat16):
        output = fast(images)
        assert fast.strategy is not None or torch.equal(output, fast.model(images))
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.05)


def test_the_gradient_reaches_every_parameter(fast, images):
    images.requires_grad_()
    F.cross_entropy(fast(images), torch.arange(4)).backward()
    for name, parameter in fast.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert fast.model.patch_embed.proj.weight.grad.any()
    assert images.grad.any()


def test_gradients_are_those_of_each_image_alone(fast, images):
    weight = fast.model.blocks[0].attn.qkv.weight
    together = torch.autograd.grad(fast(images).square().sum(), weight)[0]
    alone = sum(torch.autograd.grad(fast(image[None]).square().sum(), weight)[0] for image in images)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_gradient_checkpointing_changes_no_gradient(fast, images, mode):
    fast.train(mode)
    weight = fast.model.blocks[0].attn.qkv.weight
    expected = torch.autograd.grad(fast(images).square().sum(), weight)[0]
    fast.set_grad_checkpointing()
    torch.testing.assert_close(torch.autograd.grad(fast(images).square().sum(), weight)[0], expected, **CLOSE)


def test_with_and_without_autograd(fast, images):
    expected = fast(images)
    assert expected.requires_grad
    with torch.inference_mode():
        output = fast(images)
    assert not output.requires_grad
    torch.testing.assert_close(output, expected, **CLOSE)


# -- what it refuses ---------------------------------------------------------------------------------------------------


def test_wrapping_twice_is_refused(inter):
    with pytest.raises(ArgumentError, match=r"wrapped already; wrap its \.model"):
        VWTokenizer(inter, IntraImage(0.5))


def test_an_unsupported_model_is_refused():
    with pytest.raises(ModelError, match="Linear is not supported"):
        VWTokenizer(nn.Linear(2, 2), IntraImage(0.5))


@pytest.mark.parametrize("strategy", ["intra", 0.5, IntraImage, InterImage, nn.Identity()], ids=repr)
def test_another_kind_of_strategy_is_refused(small_vit, strategy):
    with pytest.raises(
        ArgumentError,
        match=r"strategy is .*; expected Neighbours\(\.\.\.\), InterImage\(\.\.\.\), IntraImage",
    ):
        VWTokenizer(small_vit, strategy)


@pytest.mark.parametrize("space", ["pixel", "embedding"])
def test_a_codebook_for_another_patch_size_is_refused(small_vit, space):
    other = timm.create_model("test_vit", patch_size=32)
    with pytest.raises(MismatchError, match=r"\(16, 16\).*\(32, 32\)"):
        VWTokenizer(other, make_inter(small_vit, space))


def test_a_codebook_for_another_projection_is_refused(small_vit):
    strategy = make_inter(small_vit, "embedding")
    nn.init.normal_(small_vit.patch_embed.proj.weight)
    with pytest.raises(MismatchError, match="patch projection"):
        VWTokenizer(small_vit, strategy)


def test_an_embedding_codebook_for_another_normalisation_is_refused(small_vit):
    strategy = make_inter(small_vit, "embedding")
    small_vit.pretrained_cfg["mean"] = (0.4, 0.4, 0.4)
    with pytest.raises(MismatchError, match="normalisation"):
        VWTokenizer(small_vit, strategy)


def test_patch_dropout_in_train_mode_is_refused(images):
    """Only in train mode, and only with a strategy: else the model does what it always does."""
    model = timm.create_model("test_vit", num_classes=10, patch_drop_rate=0.5).train()
    fast = VWTokenizer(model, IntraImage(0.4))
    with pytest.raises(ModelError, match=r"patch_drop_rate.*\.eval\(\)"):
        fast(images)
    assert fast.eval()(images).shape == (4, 10)
    plain, outputs = VWTokenizer(model.train()), []
    for module in (plain, model):
        torch.manual_seed(0)
        outputs.append(module(images))
    assert torch.equal(*outputs)
    model.patch_drop = torch.nn.Identity()  # as the message says
    assert fast.train()(images).requires_grad


# -- fewer tokens inside the blocks ------------------------------------------------------------------------------------

SCHEDULES = {
    "prune": {1: 30},
    "merge": {1: Merge(20)},
    "absorb": {1: Absorb(30)},
    "several": {0: Merge(0.2), 2: 10, 5: Merge(5)},
}
MODELS = {
    "token": {},
    "avg": {"global_pool": "avg"},
    "max": {"global_pool": "max", "reg_tokens": 2},
    "avgmax": {"global_pool": "avgmax", "pool_include_prefix": True},
    "all": {"global_pool": ""},
    "no_prefix": {"class_token": False, "reg_tokens": 0, "global_pool": "avg"},
    "distilled": {"name": "deit_tiny_distilled_patch16_224", "img_size": 160, "num_heads": 2},
    "norms": {"qk_norm": True, "init_values": 0.5, "pre_norm": True},
    "res_post": {"block_fn": ResPostBlock, "init_values": 0.5},
}


def make_model(name="test_vit", **options):
    """A model whose attention is far from uniform, so that equally important tokens are not a matter of rounding."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 10, "embed_dim": 64, "depth": 6, **options}).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def make_reduced(strategy, schedule, **options):
    model = make_model(**options)
    return VWTokenizer(model, STRATEGIES[strategy](model), PruningSchedule(SCHEDULES[schedule]))


REDUCED = matrix(
    ["-".join(case) for case in itertools.product(STRATEGIES, SCHEDULES)],
    "none-several",
    "intra-merge",
    "inter_pixel-absorb",
    "inter_embedding-prune",
)


@pytest.fixture(params=REDUCED)
def reduced(request):
    return make_reduced(*request.param.split("-"))


def count_left(counts, schedule):
    """Tokens of images when all blocks are done."""
    left = []
    for count in counts:
        for _, reduction in sorted(PruningSchedule(schedule).items()):
            count -= reduction.removed(count)
        left.append(count)
    return tuple(left)


@torch.inference_mode()
def test_an_empty_schedule_is_the_model_bit_for_bit(fast, images):
    empty = VWTokenizer(fast.model, fast.strategy, PruningSchedule({}))
    assert torch.equal(empty(images), fast(images))
    if fast.strategy is None:
        assert torch.equal(empty(images), fast.model(images))
        assert torch.equal(empty.forward_features(images), fast.model.forward_features(images))


@torch.inference_mode()
def test_a_schedule_changes_something(reduced, images):
    plain = VWTokenizer(reduced.model, reduced.strategy)
    change = (reduced(images) - plain(images)).abs().amax(1)
    assert (change[:2] > 1e-3).all()  # the others repeat patches, which lose little by becoming one
    assert torch.equal(reduced.tokenize(images).group, plain.tokenize(images).group)  # what enters the first block


@torch.inference_mode()
def test_every_image_is_reduced_as_if_alone(reduced, images):
    alone = torch.cat([reduced(image[None]) for image in images])
    torch.testing.assert_close(reduced(images), alone, **CLOSE)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(reduced(images[order]), alone[order], **CLOSE)
    features = torch.cat([reduced.forward_features(image[None]) for image in images])
    torch.testing.assert_close(reduced.forward_features(images), features, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "strategy"),
    matrix(
        itertools.product(MODELS, STRATEGIES),
        *((name, "inter_embedding") for name in MODELS),
        ("avg", "none"),
        ("all", "intra"),
        ("token", "inter_pixel"),
    ),
)
def test_reduced_forward_is_the_head_on_the_features(images, name, strategy):
    """Each patch of the full grid takes the value of its token, and each token is pooled as often as it has patches."""
    fast = make_reduced(strategy, "several", **MODELS[name])
    features = fast.forward_features(images)
    assert features.shape == (4, fast.num_prefix_tokens + 100, 64)
    torch.testing.assert_close(fast.forward_head(features), fast(images), atol=1e-4, rtol=1e-4)
    assert len(features[0].unique(dim=0)) < 80


@torch.inference_mode()
def test_the_words_of_what_is_left(reduced, images):
    before, plain = reduced.tokenize(images), VWTokenizer(reduced.model, reduced.strategy)
    packed, after = reduced.forward_features(images, unmerge=False)
    left = count_left(before.lengths, reduced.schedule)
    assert max(left) < max(before.lengths)
    assert after.lengths == tuple(after.counts.tolist()) == left
    assert packed.lengths == tuple(1 + count for count in left)
    assert after.grid == (10, 10)
    assert torch.equal(after.group < 0, before.group < 0)
    for image, count in enumerate(left):
        group, weight, former = after.group[image], after.weight[image], before.group[image]
        seen = group >= 0
        assert set(group[seen].tolist()) == set(range(count))
        sums = torch.zeros(count).index_add(0, group[seen], weight[seen])
        torch.testing.assert_close(sums, torch.ones(count))
        if not any(isinstance(reduction, Absorb) for reduction in reduced.schedule.values()):
            # Each patch has an equal share of its token, as nothing counts more than once in a mean.
            torch.testing.assert_close(weight[seen].reciprocal(), group[seen].bincount()[group[seen]].float())
        # Patches of one word stay together.
        assert len(set(zip(former[seen].tolist(), group[seen].tolist(), strict=True))) == before.lengths[image]
    merged = torch.cat([run[1:] for run in packed.split()])
    features = reduced.forward_features(images)
    assert torch.equal(unmerge(merged, after), features[:, 1:])
    assert not torch.equal(features, plain.forward_features(images))


@torch.inference_mode()
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_reducing_no_images(images, schedule):
    fast = make_reduced("none", schedule, img_size=160, dynamic_img_size=False)
    assert fast(images[:0]).shape == (0, 10)
    assert fast.forward_features(images[:0]).shape == (0, 101, 64)
    packed, words = fast.forward_features(images[:0], unmerge=False)
    assert packed.lengths == words.lengths == ()


@torch.inference_mode()
@pytest.mark.filterwarnings("ignore:PruningSchedule.* removed none of the tokens")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_images_that_are_one_word_have_nothing_to_lose(images, schedule):
    """A batch of them is dense: as many tokens for each image, though too few."""
    blank = images[:2, :, :16, :16].repeat(1, 1, 10, 10)
    fast = make_reduced("inter_pixel", schedule)
    assert fast.tokenize(blank).lengths == (1, 1)
    expected = fast(blank)
    if schedule != "absorb":  # after which attention counts a word by its patches, whether it absorbed any or not
        torch.testing.assert_close(expected, VWTokenizer(fast.model, fast.strategy)(blank), **CLOSE)
    together = fast(torch.cat([blank, images]))
    torch.testing.assert_close(together, torch.cat([expected, fast(images)]), **CLOSE)


def test_the_model_is_not_changed_by_a_schedule(images):
    model = make_model()
    state, expected = copy.deepcopy(model.state_dict()), model(images)
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    fast = VWTokenizer(model, None, PruningSchedule(SCHEDULES["several"]))
    fast(images)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(images), expected)
    assert list(fast.state_dict()) == list(state)


@torch.inference_mode()
def test_a_deep_copy_reduces_alike(images):
    fast = make_reduced("intra", "several")
    assert torch.equal(copy.deepcopy(fast)(images), fast(images))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", matrix([torch.float16, torch.bfloat16], torch.bfloat16))
def test_reduced_in_half_precision(reduced, images, dtype):
    """Which tokens go is a matter of rounding; how many is not, and the answer is near."""
    expected = reduced(images)
    half = reduced.to(dtype)
    output = half(images.to(dtype))
    assert output.dtype == dtype
    assert output.isfinite().all()
    assert F.cosine_similarity(output.float(), expected).min() > 0.95
    packed, _ = half.forward_features(images.to(dtype), unmerge=False)
    assert packed.values.dtype == dtype
    assert packed.lengths == tuple(
        1 + count for count in count_left(half.tokenize(images.to(dtype)).lengths, half.schedule)
    )


@torch.inference_mode()
def test_reduced_in_autocast(reduced, images):
    expected = reduced(images)
    with torch.autocast("cpu", torch.bfloat16):
        output = reduced(images)
    assert output.dtype == torch.bfloat16
    assert F.cosine_similarity(output.float(), expected).min() > 0.95


def test_the_gradient_reaches_every_parameter_through_reductions(reduced, images):
    images.requires_grad_()
    F.cross_entropy(reduced(images), torch.arange(4)).backward()
    for name, parameter in reduced.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert images.grad.any()


@pytest.mark.parametrize(
    ("strategy", "blocks", "mode"),
    matrix(
        itertools.product(["none", "inter_pixel"], [(1,), (0, 5)], [True, False]),
        ("none", (1,), False),
        ("inter_pixel", (0, 5), True),
    ),
)
def test_gradient_checkpointing_changes_no_gradient_through_reductions(images, strategy, blocks, mode):
    model = make_model()
    schedule = PruningSchedule({block: (Prune, Merge)[place % 2](9) for place, block in enumerate(reversed(blocks))})
    fast = VWTokenizer(model, STRATEGIES[strategy](model), schedule).train(mode)
    weight = model.blocks[0].attn.qkv.weight
    expected = torch.autograd.grad(fast(images).square().sum(), weight)[0]
    fast.set_grad_checkpointing()
    gradient = torch.autograd.grad(fast(images).square().sum(), weight)[0]
    assert gradient.any()
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", ["none", "inter_pixel"])
def test_training_with_dropout_and_reductions(images, strategy):
    fast = make_reduced(strategy, "several", proj_drop_rate=0.2, drop_path_rate=0.2, attn_drop_rate=0.2).train()
    torch.manual_seed(0)
    first = fast(images)
    F.cross_entropy(first, torch.arange(4)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in fast.model.parameters())
    assert not torch.equal(fast(images), first)


@pytest.mark.parametrize("schedule", [{3: 56}, 56, [(3, 56)], Prune(5), PruningSchedule, "3"], ids=repr)
def test_another_kind_of_schedule_is_refused(small_vit, schedule):
    with pytest.raises(
        ArgumentError, match=r"schedule is .*; expected vwt\.PruningSchedule\(\{block: tokens to remove"
    ):
        VWTokenizer(small_vit, schedule=schedule)


@torch.inference_mode()
def test_any_mapping_of_blocks_to_reductions_is_a_schedule(small_vit, images):
    reductions = {3: Merge(20), 1: Prune(30)}
    expected = VWTokenizer(small_vit, schedule=PruningSchedule(reductions))(images)
    assert torch.equal(VWTokenizer(small_vit, schedule=reductions)(images), expected)
    with pytest.raises(ArgumentError, match=r"names block -1; expected one of the model's 6"):
        VWTokenizer(small_vit, schedule={-1: Prune(30)})


def test_a_schedule_in_the_place_of_a_strategy_is_refused(small_vit):
    with pytest.raises(ArgumentError, match="strategy is PruningSchedule"):
        VWTokenizer(small_vit, PruningSchedule({3: 5}))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_schedule_for_more_blocks_is_refused_when_wrapping(small_vit, name):
    with pytest.raises(ArgumentError, match="names block 6; expected one of the model's 6, from 0 to 5"):
        VWTokenizer(small_vit, STRATEGIES[name](small_vit), PruningSchedule({6: 5}))


@pytest.mark.parametrize(
    ("strategy", "schedule", "message"),
    [
        ("none", {1: 99}, r"Prune\(99\) in block 1 removes 99 of the 100 patch tokens .*; expected 1 to 98"),
        ("none", {1: 0.001}, r"Prune\(0\.001\) in block 1 removes 0 of the 100 patch tokens .*; expected 1 to 98"),
        ("intra", {1: Merge(31)}, r"Merge\(31\) in block 1 removes 31 of the 60 patch tokens .*; expected 1 to 30"),
        ("intra", {1: 50, 2: 9}, r"Prune\(9\) in block 2 removes 9 of the 10 patch tokens .*; expected 1 to 8"),
    ],
)
def test_a_schedule_for_more_tokens_is_refused_at_the_first_call(small_vit, images, strategy, schedule, message):
    fast = VWTokenizer(small_vit, STRATEGIES[strategy](small_vit), PruningSchedule(schedule))
    for call in (fast, fast.forward_features):
        with pytest.raises(ArgumentError, match=message) as error:
            call(images)
        assert "\n" not in str(error.value)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["inter_pixel", "inter_embedding"])
def test_a_schedule_for_more_tokens_than_some_images_have(small_vit, images, name):
    fast = VWTokenizer(small_vit, STRATEGIES[name](small_vit), PruningSchedule({1: 70}))
    packed, _ = fast.forward_features(images, unmerge=False)
    assert packed.lengths == (1 + 30, 1 + 11, 1 + 2, 1 + 2)
    torch.testing.assert_close(fast(images), torch.cat([fast(image[None]) for image in images]), **CLOSE)


# -- what removes nothing says so --------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize(
    ("make", "schedule", "what"),
    [
        (lambda model: IntraImage(0.0), {}, "IntraImage removed none of the tokens of the first 4 images .100 patches"),
        (lambda model: make_inter(model, "pixel", 0.0), {}, "InterImage removed none"),
    ],
)
def test_a_strategy_that_removes_nothing_warns_once(small_vit, make, schedule, what):
    images = torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(5))
    fast = VWTokenizer(small_vit, make(small_vit), PruningSchedule(schedule))
    with pytest.warns(UserWarning, match=what):
        fast(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(images)


@torch.inference_mode()
def test_a_schedule_that_removes_nothing_warns_once(small_vit, images):
    blank = images[:2, :, :16, :16].repeat(1, 1, 10, 10)
    fast = VWTokenizer(small_vit, make_inter(small_vit, "pixel"), PruningSchedule({1: 30}))
    with pytest.warns(UserWarning, match=r"PruningSchedule\(\{1: Prune\(30\)\}\) removed none"):
        fast(blank)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(blank)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["none", "intra", "inter_pixel"])
def test_what_removes_something_does_not_warn(small_vit, images, name):
    schedule = {} if name == "none" else {1: 5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VWTokenizer(small_vit, STRATEGIES[name](small_vit), PruningSchedule(schedule))(images)


def test_a_reduction_that_does_not_happen_is_warned_of():
    """The head reads the class token: of the last block, only that goes through the MLP."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5).eval()
    fast = VWTokenizer(model, schedule=PruningSchedule({1: Absorb(4)}))
    with pytest.warns(UserWarning, match="removed none of the tokens"):
        fast(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("options", [{"layer_decay": 0.7}, {}], ids=["layer_decay", "weight_decay"])
def test_optimizers_of_timm_group_the_parameters_as_those_of_the_model(small_vit, options):
    def groups(module):
        optimizer = create_optimizer_v2(module, opt="adamw", lr=0.1, weight_decay=0.05, **options)
        names = {id(parameter): name for name, parameter in small_vit.named_parameters()}
        return [
            ({names[id(p)] for p in group["params"]}, group["weight_decay"], group.get("lr_scale"))
            for group in optimizer.param_groups
        ]

    expected = groups(small_vit)
    assert any("pos_embed" in names and not decay for names, decay, _ in expected)
    assert groups(VWTokenizer(small_vit, IntraImage(0.5))) == expected
