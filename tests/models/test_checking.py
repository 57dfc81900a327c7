import copy
import threading
import types
from contextlib import nullcontext

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.overrides import TorchFunctionMode

from vwt import IntraImage, PruningSchedule, VWTokenizer
from vwt.errors import ModelError
from vwt.models.backbone import Backbone
from vwt.models.checking import check_parts

ARGUMENTS = {"num_classes": 10, "img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3}


class Same(VisionTransformer):
    """Another class, the same forward pass."""


class OtherPosition(VisionTransformer):
    def forward_features(self, x, **options):
        tokens = self._pos_embed(self.patch_embed(x)).flip(1)
        return self.norm(self.blocks(self.norm_pre(tokens)))


class Longer(VisionTransformer):
    def forward_features(self, x, **options):
        tokens = self._pos_embed(self.patch_embed(x))
        return self.norm(self.blocks(self.norm_pre(torch.cat([tokens, tokens[:, :3]], dim=1))))


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
        (Longer, "what enters the first block"),
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
        check_parts(Backbone(model))


class Casting(VisionTransformer):
    """It computes a part of its forward pass under a context of its own."""

    part, context = "blocks", staticmethod(lambda: torch.autocast("cpu", torch.bfloat16))

    def forward_features(self, x, **options):
        tokens = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        with self.context() if self.part == "blocks" else nullcontext():
            tokens = self.blocks(tokens)
        return self.norm(tokens)

    def forward(self, x, **options):
        features = self.forward_features(x)
        with self.context() if self.part == "head" else nullcontext():
            return self.forward_head(features)


class Doubling(TorchFunctionMode):
    """Linear layers come out twice as large."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {})) * (2 if func is nn.functional.linear else 1)


@pytest.mark.parametrize("context", [Casting.context, Doubling], ids=["autocast", "mode"])
@pytest.mark.parametrize(("part", "named"), [("blocks", r"block 0 of 3 \(Block\)"), ("head", "the head")])
def test_a_context_of_the_forward_pass_is_no_context_of_its_parts(monkeypatch, context, part, named):
    monkeypatch.setattr(Casting, "context", staticmethod(context))
    monkeypatch.setattr(Casting, "part", part)
    with pytest.raises(ModelError, match=named):
        check_parts(Backbone(make_model(Casting)))


def test_unchecked_is_the_users_word():
    images = torch.randn(2, 3, 64, 64)
    with pytest.raises(ModelError):
        VWTokenizer(make_model(OtherHead))
    assert VWTokenizer(make_model(OtherHead), IntraImage(0.5), check=False)(images).shape == (2, 10)


def test_the_check_is_two_forwards_of_one_image():
    """One of the model, one of its parts, and its first block once more."""
    shapes, calls = [], [0, 0, 0]
    model = make_model()
    model.patch_embed.register_forward_pre_hook(lambda module, arguments: shapes.append(tuple(arguments[0].shape)))
    for index, block in enumerate(model.blocks):

        def count(*_, index=index):
            calls[index] += 1

        block.mlp.register_forward_pre_hook(count)
    VWTokenizer(model, IntraImage(0.5))
    assert shapes == [(1, 3, 64, 64)] * 2
    assert calls == [3, 2, 2]
    VWTokenizer(model, IntraImage(0.5), check=False)
    assert len(shapes) == 2


class InPlace(Block):
    """It writes into what it has computed, which comes to something else than its halves."""

    def forward(self, x, attn_mask=None, is_causal=False):
        attended = self.attn(self.norm1(x))
        x = x + attended.mul_(2)
        return x + self.mlp(self.norm2(x)).mul_(0.5)


def test_a_block_that_writes_into_its_tokens_is_compared_with_what_entered_it(monkeypatch):
    model = make_model()
    monkeypatch.setattr(Block, "forward", InPlace.forward)
    with pytest.raises(ModelError, match=r"they part in block 0 of 3 \(Block\)"):
        check_parts(Backbone(model))
    monkeypatch.setattr(Block, "forward", lambda block, x, **_: InPlace.forward(block, x).add_(0))
    with pytest.raises(ModelError, match=r"they part in block 0 of 3 \(Block\)"):
        check_parts(Backbone(model))


@pytest.mark.parametrize("view", ["in_place", "shared"])
def test_writing_that_comes_to_the_same_is_supported(monkeypatch, view):
    def forward(block, x, **_):
        attended = block.attn(block.norm1(x))
        if view == "in_place":
            attended.view(-1).mul_(2)
            attended.mul_(0.5)
        else:
            attended = attended.expand_as(x).add_(1).sub_(1)
        x = x + attended
        return x.add_(block.mlp(block.norm2(x)))

    monkeypatch.setattr(Block, "forward", forward)
    model, images = make_model(), torch.randn(2, 3, 64, 64)
    assert torch.equal(VWTokenizer(model)(images), model(images))


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("change", ["forward", "norm2", "qkv", "scale", "hook"])
def test_one_block_that_is_another_inside(index, change):
    """A block that computes something of its own is refused; one whose parts or hooks do is not: they are called."""
    model = make_model()
    block = model.blocks[index]
    if change == "forward":
        block.forward = types.MethodType(lambda own, x, **options: Block.forward(own, x, **options) * 1.01, block)
    elif change == "hook":
        block.register_forward_hook(lambda module, arguments, output: output + 0.1)
    else:
        own = {"norm2": block.norm2, "qkv": block.attn.qkv, "scale": block.ls1}[change]
        own.forward = types.MethodType(lambda module, x: type(module).forward(module, x) * 1.01, own)
    if change == "forward":
        with pytest.raises(ModelError, match=rf"they part in block {index} of 3 \(Block\)"):
            check_parts(Backbone(model))
    else:
        check_parts(Backbone(model))


@pytest.mark.parametrize("inside", [False, True])
def test_a_compiled_block_is_not_compiled_for_the_check(inside):
    model, compiled = make_model(), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    for block in model.blocks:
        (block.attn if inside else block).compile(backend=backend)
    check_parts(Backbone(model))
    assert not compiled


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
        check_parts(Backbone(model))
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
        check_parts(Backbone(model))
    assert all(module.training and not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_in_another_precision(dtype):
    check_parts(Backbone(make_model().to(dtype)))
    with pytest.raises(ModelError, match="the head"):
        check_parts(Backbone(make_model(OtherHead).to(dtype)))


def test_weights_that_are_not_numbers_are_not_the_forward_pass():
    model = make_model()
    nn.init.constant_(model.patch_embed.proj.weight, torch.nan)
    check_parts(Backbone(model))


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
    check_parts(Backbone(model))


@pytest.mark.parametrize("cls", [VisionTransformer, Between])
def test_a_model_in_use_by_another_thread_is_checked(cls):
    """The calls of another thread, here one inside each block of ours, are not taken for the check's own."""
    model = make_model(cls)
    used = []

    def call_elsewhere(module, arguments):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: used.append(model(torch.ones(2, 3, 64, 64))))
            thread.start()
            thread.join()

    for block in model.blocks:
        block.norm1.register_forward_pre_hook(call_elsewhere)
    if cls is VisionTransformer:
        check_parts(Backbone(model))
    else:
        with pytest.raises(ModelError, match="what enters block 2 of 3"):
            check_parts(Backbone(model))
    assert len(used) > 2


def test_wrapping_leaves_each_module_in_its_mode():
    model = make_model().train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    fast = VWTokenizer(model, IntraImage(0.5))
    assert fast.training
    assert [module.training for module in model.modules()] == modes
    model.eval()
    model.blocks[2].train()
    fast = VWTokenizer(model)
    assert not fast.training
    assert [block.training for block in model.blocks] == [False, False, True]
