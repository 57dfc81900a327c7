import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from vwt import Codebook, InterImage, IntraImage, VWTokenizer
from vwt.errors import ArgumentError, MismatchError, ModelError
from vwt.packing import Packed
from vwt.patches import PatchSpec, patchify
from vwt.words import Words, group_words

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


@pytest.fixture(params=STRATEGIES)
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

    space, fixed_count = "embedding", False

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


@pytest.mark.parametrize("name", ["forward_intermediates", "get_intermediate_layers"])
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
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
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
    with pytest.raises(ArgumentError, match=r"strategy is .*; expected InterImage\(\.\.\.\), IntraImage\(\.\.\.\)"):
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
