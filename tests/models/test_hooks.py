"""Hooks of blocks are called as by the model itself, also where a block runs in two halves."""

import pytest
import timm
import torch

from vwt import Absorb, Neighbours, Prune, VWTokenizer
from vwt.models.hooks import with_hooks

MODELS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "mean": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "rotary": ("vit_small_patch16_dinov3", {}),
}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    name, options = MODELS[request.param]
    model = timm.create_model(name, img_size=64, depth=3, embed_dim=48, num_heads=3, num_classes=5, **options).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def watch(model):
    """What blocks are called with, and give, as their hooks see it."""
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, given: seen.append((block, given[0].shape[1])))
        block.register_forward_hook(lambda block, given, output: seen.append((block, output.shape[1])))
    return seen


@torch.inference_mode()
def test_hooks_see_what_enters_and_leaves_each_block(model):
    fast = VWTokenizer(model, schedule={1: Absorb(6)})
    expected, seen, prefix = fast(IMAGES), watch(model), model.num_prefix_tokens
    torch.testing.assert_close(fast(IMAGES), expected)
    first, second, third = model.blocks
    counts = [(first, 16), (first, 16), (second, 16), (second, 10), (third, 10), (third, 10)]
    assert seen == [(block, prefix + count) for block, count in counts]


@torch.inference_mode()
def test_hooks_of_images_of_different_counts_see_one_sequence(model):
    images = IMAGES.clone()
    images[0, :, :32, :32] = 0.5  # four equal patches
    fast = VWTokenizer(model, Neighbours(0.2), {1: Prune(0.5)})
    counts = fast.tokenize(images).lengths
    seen = watch(model)
    fast(images)
    total = sum(counts) + 2 * model.num_prefix_tokens
    assert [block for block, _ in seen] == [block for block in model.blocks for _ in range(2)]
    assert seen[2][1] in (total, total // 2)
    assert seen[3][1] < seen[2][1]


@torch.inference_mode()
@pytest.mark.parametrize("index", [1, 2])
def test_what_hooks_change_is_changed(model, index):
    """Of a block that reduces, and of the last one, as of any other."""
    fast = VWTokenizer(model, schedule={1: Absorb(6)})
    block, before = model.blocks[index], fast(IMAGES)
    handles = [
        block.register_forward_pre_hook(lambda block, given, options: ((given[0] * 2,), options), with_kwargs=True),
        block.register_forward_hook(lambda block, given, output: output * torch.linspace(0, 1, 48)),
    ]
    assert (fast(IMAGES) - before).abs().max() > 1e-3
    VWTokenizer(model, schedule={1: Absorb(6)})  # the check has the hooks too
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(fast(IMAGES), before)


@torch.inference_mode()
def test_hooks_of_blip():
    """Its blocks are always run half after half."""
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 64, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3}
    model = transformers.BlipVisionModel(transformers.BlipVisionConfig(num_hidden_layers=3, **sizes)).eval()
    seen = []
    for block in model.encoder.layers:
        block.register_forward_hook(lambda block, given, output: seen.append((block, output.shape[1])))
    VWTokenizer(model, schedule={1: Absorb(6)}, check=False)(IMAGES)
    assert seen == list(zip(model.encoder.layers, (17, 11, 11), strict=True))


def test_hooks_of_the_backward_pass(model):
    seen = []
    for block in model.blocks:
        block.register_full_backward_hook(lambda block, inputs, outputs: seen.append((block, inputs[0].shape[1])))
    fast = VWTokenizer(model, schedule={1: Prune(6)})
    fast(IMAGES).sum().backward()
    prefix = model.num_prefix_tokens
    counts = zip(reversed(model.blocks), (10, 16, 16), strict=True)
    assert seen == [(block, prefix + count) for block, count in counts]


def test_a_block_without_hooks_is_left_alone(model):
    def forward(tokens):
        return tokens

    assert with_hooks(model.blocks[0], forward) is forward
    before = dict(model.blocks[0].__dict__)
    model.blocks[0].register_forward_hook(lambda *_: None)
    with_hooks(model.blocks[0], forward)
    assert model.blocks[0].__dict__.keys() == before.keys()
    assert "forward" not in model.blocks[0].__dict__
