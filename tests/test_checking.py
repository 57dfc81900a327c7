import copy

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from vwt import IntraImage, PruningSchedule, VWTokenizer
from vwt.backbones import Backbone
from vwt.errors import ModelError

ARGUMENTS = {"num_classes": 10, "img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3}


class Same(VisionTransformer):
    """Another class, the same forward pass."""


class OtherPosition(VisionTransformer):
    def forward_features(self, x, **options):
        tokens = self._pos_embed(self.patch_embed(x)).flip(1)
        return self.norm(self.blocks(self.norm_pre(tokens)))


class Between(VisionTransformer):
    def forward_features(self, x, **options):
        tokens = self._pos_embed(self.patch_embed(x))
        for index, block in enumerate(self.blocks):
            tokens = block(tokens if index != 2 else tokens.roll(1, dims=1))
        return self.norm(tokens)


class Skipping(VisionTransformer):
    def forward_features(self, x, **options):
        tokens = self._pos_embed(self.patch_embed(x))
        return self.norm(self.blocks[2](self.blocks[0](tokens)))


class Twice(VisionTransformer):
    def forward_features(self, x, **options):
        tokens = self._pos_embed(self.patch_embed(x))
        return self.norm(self.blocks(self.blocks(tokens)))


class OtherHead(VisionTransformer):
    def forward(self, x, **options):
        return self.forward_head(self.forward_features(x)).softmax(-1)


class Masked(VisionTransformer):
    """It calls its blocks with something that its family does not."""

    def forward_features(self, x, **options):
        return super().forward_features(x, attn_mask=torch.eye(17)[None, None])


class OwnBlock(Block):
    """Run as a whole, whatever it does."""

    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x, attn_mask=attn_mask).tanh()


def make_model(cls=VisionTransformer, **options):
    torch.manual_seed(0)
    model = cls(**{**ARGUMENTS, **options}).eval()
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 64, 64)}
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.inference_mode()
@pytest.mark.parametrize("options", [{"cls": Same}, {"block_fn": OwnBlock}], ids=["class", "block"])
def test_what_computes_the_same_is_supported_whatever_its_class(options):
    model, images = make_model(**options), torch.randn(2, 3, 64, 64)
    assert torch.equal(VWTokenizer(model)(images), model(images))
    assert VWTokenizer(model, IntraImage(0.5), PruningSchedule({1: 3}))(images).shape == (2, 10)


@pytest.mark.parametrize(
    ("cls", "part"),
    [
        (OtherPosition, "what enters the first block"),
        (Between, "what enters block 2 of 3"),
        (Skipping, "block 1 of 3, which its forward pass does not call once"),
        (Twice, "block 0 of 3, which its forward pass does not call once"),
        (OtherHead, "the norm after the blocks or the head"),
        (Masked, r"block 0 of 3 \(Block\)"),
    ],
)
def test_another_forward_pass_is_refused_where_it_parts(cls, part):
    with pytest.raises(ModelError, match=rf"{cls.__name__} does not compute .*VisionTransformer: they part in {part};"):
        VWTokenizer(make_model(cls), IntraImage(0.5))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_block_that_changed_is_named(monkeypatch, index):
    """As if a new release of timm computed the halves of a block in another way."""
    model, forward = make_model(), Block.forward

    def other(block, x, **options):
        return forward(block, x, **options) * (1.01 if block is model.blocks[index] else 1)

    monkeypatch.setattr(Block, "forward", other)
    with pytest.raises(ModelError, match=rf"they part in block {index} of 3 \(Block\)"):
        Backbone(model)


def test_unchecked_is_the_users_word():
    images = torch.randn(2, 3, 64, 64)
    with pytest.raises(ModelError):
        VWTokenizer(make_model(OtherHead))
    assert VWTokenizer(make_model(OtherHead), IntraImage(0.5), check=False)(images).shape == (2, 10)


def test_the_check_is_one_forward_of_one_image():
    shapes = []

    class Counting(VisionTransformer):
        def forward(self, x, **options):
            shapes.append(tuple(x.shape))
            return super().forward(x, **options)

    VWTokenizer(make_model(Counting), IntraImage(0.5))
    assert shapes == [(1, 3, 64, 64)]
    VWTokenizer(make_model(Counting), IntraImage(0.5), check=False)
    assert len(shapes) == 1


def test_nothing_is_computed_on_the_meta_device():
    with torch.device("meta"):
        model = make_model(OtherHead)
    assert VWTokenizer(model).backbone.depth == 3


@pytest.mark.parametrize("cls", [VisionTransformer, OtherHead, Skipping])
def test_the_check_leaves_no_trace(cls):
    model = make_model(cls, drop_path_rate=0.3, proj_drop_rate=0.3, patch_drop_rate=0.2).train()
    model.blocks[1].eval()

    def trace():
        return (
            [module.training for module in model.modules()],
            {name: set(module.__dict__) for name, module in model.named_modules()},
            [len(m._forward_hooks) + len(m._forward_hooks_with_kwargs) for m in model.modules()],
            [parameter.grad is None for parameter in model.parameters()],
            torch.random.get_rng_state().tolist(),
            torch.is_grad_enabled(),
        )

    before, state = trace(), copy.deepcopy(model.state_dict())
    try:
        Backbone(model)
    except ModelError:
        assert cls is not VisionTransformer
    assert trace() == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_cannot_run_leaves_no_trace_either():
    class Failing(VisionTransformer):
        def forward(self, x, **options):
            raise RuntimeError("out of order")

    model = make_model(Failing).train()
    with pytest.raises(RuntimeError, match="out of order"):
        Backbone(model)
    assert all(module.training and not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_in_another_precision(dtype):
    Backbone(make_model().to(dtype))
    with pytest.raises(ModelError, match="the head"):
        Backbone(make_model(OtherHead).to(dtype))


def test_weights_that_are_not_numbers_are_not_the_forward_pass():
    model = make_model()
    nn.init.constant_(model.patch_embed.proj.weight, torch.nan)
    Backbone(model)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_wrapped_in_any_grad_mode(mode):
    model = make_model()
    with mode():
        fast = VWTokenizer(model, IntraImage(0.5))
    fast(torch.randn(2, 3, 64, 64)).sum().backward()
    assert fast.model.blocks[0].attn.qkv.weight.grad.any()


def test_a_checkpointing_model_is_checked():
    model = timm.create_model("vit_small_patch16_rope_224", **ARGUMENTS)
    model.set_grad_checkpointing()
    Backbone(model)
