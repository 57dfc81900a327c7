import math
from inspect import signature

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Attention, RmsNorm
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn

from vwt.tokens.attention import packable, run_blocks
from vwt.tokens.packing import Packed, pack, unpack

WIDTH = 48


def gated_block(dim, num_heads, **options):
    block = Block(dim, num_heads, **options)
    block.attn = Attention(dim, num_heads, gated=True)
    return block


OPTIONS = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "scale_norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "layer_scale": {"init_values": 0.5},
    "no_bias": {"qkv_bias": False, "proj_bias": False},
    "rms_norm": {"norm_layer": RmsNorm, "qk_norm": True},
    **({"gated": {"block_fn": gated_block}} if "gated" in signature(Attention.__init__).parameters else {}),
    "diff": {"attn_layer": "diff"},
    "res_post": {"block_fn": ResPostBlock, "init_values": 0.5},
    "parallel_scaling": {"block_fn": ParallelScalingBlock, "qk_norm": True},
    "diff_parallel_scaling": {"block_fn": DiffParallelScalingBlock},
    "parallel_things": {"block_fn": ParallelThingsBlock},
}


class ExplicitAttention(Attention):
    """An attention layer of the user's own: no fused attention, and nothing that says so."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del self.fused_attn

    def forward(self, x, attn_mask=None, is_causal=False):
        query, key, value = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = (query @ key.mT * self.scale).softmax(-1) @ value
        return self.proj(mixed.transpose(1, 2).flatten(2))


def make_blocks(**options):
    torch.manual_seed(0)
    blocks = VisionTransformer(
        embed_dim=WIDTH, depth=2, num_heads=2, img_size=32, num_classes=0, **options
    ).blocks.eval()
    for parameter in blocks.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return blocks


def make_packed(*lengths):
    return Packed(torch.randn(sum(lengths), WIDTH, generator=torch.Generator().manual_seed(1)), lengths)


def unbiased(blocks):
    """Blocks to which nothing is added."""
    return lambda tokens, bias: blocks(tokens)


def run_alone(blocks, packed):
    return torch.cat([blocks(run[None])[0] for run in packed.split()])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 3))
def test_unpack_undoes_pack(counts, prefixes):
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randn(len(counts), prefixes, 2, generator=generator)
    merged = torch.randn(sum(counts), 2, generator=generator)
    packed = pack(prefix, merged, tuple(counts))
    assert packed.lengths == tuple(prefixes + count for count in counts)
    for image, (one, run) in enumerate(zip(prefix, merged.split(counts), strict=True)):
        start, end = packed.offsets[image : image + 2].tolist()
        assert torch.equal(packed.values[start:end], torch.cat([one, run]))
        assert torch.equal(packed.split()[image], torch.cat([one, run]))
    assert all(torch.equal(*pair) for pair in zip(unpack(packed, prefixes), (prefix, merged), strict=True))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0]))
def test_sizes_and_how_often_they_count(counts, prefixes, size_exponent):
    prefix, merged = torch.zeros(len(counts), prefixes, 2), torch.zeros(sum(counts), 2)
    sizes = torch.randint(1, 9, (sum(counts),), generator=torch.Generator().manual_seed(0)).float()
    packed = pack(prefix, merged, tuple(counts), sizes, size_exponent=size_exponent)
    expected = torch.cat([torch.cat([torch.ones(prefixes), run]) for run in sizes.split(counts)])
    assert packed.sizes.tolist() == expected.tolist()
    if size_exponent:
        torch.testing.assert_close(packed.key_size, expected**size_exponent)
        assert not packed.bias_on_self
        assert not packed.replace(packed.values + 1).bias_on_self
    else:
        assert packed.key_size is None
    assert pack(prefix, merged, tuple(counts), None, size_exponent=size_exponent).key_size is None


def slow_block(block, tokens, key_size, itself):
    """A block on the tokens (n, C) of one image, whose keys count so often."""
    attn, normed, count = block.attn, block.norm1(tokens), len(tokens)
    query, key, value = attn.qkv(normed).view(count, 3, attn.num_heads, -1).permute(1, 2, 0, 3)
    mixed = torch.zeros(count, WIDTH)
    for h in range(attn.num_heads):
        for i in range(count):
            weights = [
                (1.0 if i == j and not itself else key_size[j].item())
                * math.exp(query[h, i].dot(key[h, j]).item() / math.sqrt(query.shape[-1]))
                for j in range(count)
            ]
            width = value.shape[-1]
            mixed[i, h * width : (h + 1) * width] = sum(w * v for w, v in zip(weights, value[h], strict=True)) / sum(
                weights
            )
    tokens = tokens + attn.proj(mixed)
    return tokens + block.mlp(block.norm2(tokens))


@torch.no_grad()
@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize("lengths", [(5, 5, 5), (5, 1, 7), (4,)], ids=repr)
def test_counted_tokens_equal_a_plain_loop(lengths, one_by_one, itself):
    blocks, packed = make_blocks(), make_packed(*lengths)
    key_size = torch.randint(1, 9, (sum(lengths),), generator=torch.Generator().manual_seed(2)).float()
    packed = Packed(packed.values, lengths, None, key_size, bias_on_self=itself)

    def biased(tokens, bias):
        for block in blocks:
            tokens = block(tokens, attn_mask=bias and bias.bias)
        return tokens

    result = run_blocks(biased, packed, one_by_one=one_by_one)
    assert result.bias_on_self == itself
    assert torch.equal(result.key_size, key_size)
    expected = []
    for tokens, count in zip(packed.split(), key_size.split(list(lengths)), strict=True):
        for block in blocks:
            tokens = slow_block(block, tokens, count, itself)
        expected.append(tokens)
    torch.testing.assert_close(result.values, torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert packed.key_size is key_size


def test_dense_where_all_images_are_as_long():
    packed = make_packed(3, 3)
    assert packed.is_dense
    assert torch.equal(packed.dense(), torch.stack(packed.split()))
    assert not make_packed(3, 2).is_dense


@torch.no_grad()
@pytest.mark.parametrize("name", OPTIONS)
def test_packed_equals_alone(name):
    blocks, packed = make_blocks(**OPTIONS[name]), make_packed(5, 1, 12, 5)
    alone = run_alone(blocks, packed)
    assert packable(blocks)
    torch.testing.assert_close(run_blocks(unbiased(blocks), packed).values, alone, atol=1e-5, rtol=1e-5)
    assert (blocks(packed.values[None])[0] - alone).abs().max() > 1e-2  # what crossing images would do


@torch.no_grad()
@pytest.mark.parametrize("name", OPTIONS)
def test_dense_equals_alone(name):
    blocks, packed = make_blocks(**OPTIONS[name]), make_packed(7, 7)
    torch.testing.assert_close(
        run_blocks(unbiased(blocks), packed).values, run_alone(blocks, packed), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "diff", "parallel_scaling", "diff_parallel_scaling", "parallel_things"])
def test_unfused_attention_equals_alone(name):
    blocks, packed = make_blocks(**OPTIONS[name]), make_packed(5, 1, 12)
    for module in blocks.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    result = run_blocks(unbiased(blocks), packed, one_by_one=not packable(blocks))
    torch.testing.assert_close(result.values, run_alone(blocks, packed), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_of_an_unknown_kind_equals_alone():
    blocks, packed = make_blocks(attn_layer=ExplicitAttention), make_packed(5, 1, 12)
    result = run_blocks(unbiased(blocks), packed, one_by_one=not packable(blocks))
    torch.testing.assert_close(result.values, run_alone(blocks, packed), atol=1e-5, rtol=1e-5)


def test_train_mode_equals_alone_with_its_gradient():
    blocks, packed = make_blocks().train(), make_packed(5, 1, 12)
    assert packable(blocks)
    gradients = []
    for result in (run_blocks(unbiased(blocks), packed).values, run_alone(blocks, packed)):
        result.square().sum().backward()
        gradients.append(blocks[0].attn.qkv.weight.grad)
        blocks.zero_grad()
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_stochastic_depth_drops_whole_images():
    """In train mode a branch of a block is dropped for an image as a whole, whatever happens to its batch mates."""
    every = make_blocks(drop_path_rate=0.7)
    assert packable(every)
    assert not packable(every.train())
    blocks, packed = every[-1], make_packed(*range(2, 18))
    torch.manual_seed(0)
    result = run_blocks(unbiased(blocks), packed, one_by_one=True)
    kept = [(after == before).all(1) for after, before in zip(result.split(), packed.split(), strict=True)]
    assert all(rows.all() or not rows.any() for rows in kept)
    assert 0 < sum(rows.all().item() for rows in kept) < len(kept)


@torch.no_grad()
def test_other_calls_of_attention_are_left_alone():
    """Attention is answered image by image only within `run_blocks`."""
    blocks, packed = make_blocks(), make_packed(5, 1, 12)
    before = blocks(packed.values[None])
    run_blocks(unbiased(blocks), packed)
    assert torch.equal(blocks(packed.values[None]), before)


def test_the_order_of_images_does_not_matter():
    blocks, packed = make_blocks(), make_packed(5, 1, 12)
    runs = packed.split()
    turned = Packed(torch.cat(runs[::-1]), packed.lengths[::-1])
    with torch.no_grad():
        there, back = run_blocks(unbiased(blocks), packed).split(), run_blocks(unbiased(blocks), turned).split()[::-1]
    for one, other in zip(there, back, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_blocks_are_called_once_where_images_may_run_together():
    shapes = []
    for packed, one_by_one in ((make_packed(4, 4), True), (make_packed(2, 3), False), (make_packed(2, 3), True)):
        run_blocks(lambda tokens, bias: shapes.append(tuple(tokens.shape)) or tokens, packed, one_by_one=one_by_one)
    assert shapes == [(2, 4, WIDTH), (1, 5, WIDTH), (1, 2, WIDTH), (1, 3, WIDTH)]


def test_blocks_may_be_any_function():
    packed = make_packed(2, 3)
    assert torch.equal(run_blocks(unbiased(nn.Identity()), packed).values, packed.values)
