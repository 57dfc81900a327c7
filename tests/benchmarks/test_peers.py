"""The comparators: equal to recorded outputs and to plain loops, and clear about what they do not take."""

import numpy as np
import pytest
import timm
import torch
from peers import ClassAttentionTopK, PadAndMask, TokenMerging
from peers.tome import match_pairs, merge_pairs

from vwt import Codebook, InterImage, VWTokenizer
from vwt.errors import ArgumentError, ModelError
from vwt.models.spec import PatchSpec
from vwt.tokens.patches import patchify


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture
def images():
    return torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("r", [8, 13])
def test_tome_recorded(shared, vit_tiny, r, batch):
    path = shared / "reference" / "tome_reference.npz"
    if not path.is_file():
        pytest.skip(f"no recorded outputs at {path}")
    with np.load(path) as arrays:
        images, expected = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays[f"r{r}_logits"])
    images = ((images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).contiguous()
    logits = torch.cat([TokenMerging(vit_tiny, r)(part) for part in images.split(batch)])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_tome_merges_nothing(small_vit, images):
    torch.testing.assert_close(TokenMerging(small_vit, 0)(images), small_vit(images))


def test_tome_does_not_depend_on_batch_mates(small_vit, images):
    merging = TokenMerging(small_vit, 9)
    torch.testing.assert_close(merging(images), torch.cat([merging(image[None]) for image in images]))


@pytest.mark.parametrize(("r", "expected"), [(9, [101, 92, 83]), (90, [101, 51, 26, 14, 8, 5]), (0, [101, 101])])
def test_tome_lengths(small_vit, images, r, expected):
    merging, seen = TokenMerging(small_vit, r), []
    hooks = [block.norm1.register_forward_hook(lambda _, i, o: seen.append(o.shape[1])) for block in small_vit.blocks]
    merging(images)
    for hook in hooks:
        hook.remove()
    assert merging.lengths(101) == seen
    assert seen[: len(expected)] == expected


@pytest.mark.parametrize("tokens", [3, 4, 7, 8])
def test_pairs_as_in_a_loop(tokens):
    metric = torch.randn(2, tokens, 5, generator=torch.Generator().manual_seed(tokens))
    r = (tokens - 1) // 2
    rows = match_pairs(metric, r)
    assert int(rows.max()) == tokens - r - 1
    for image, places in zip(metric, rows.tolist(), strict=True):
        unit = torch.nn.functional.normalize(image, dim=-1)
        odd = range(1, tokens, 2)
        proposals = {a: max(odd, key=lambda b, a=a: float(unit[a] @ unit[b])) for a in range(2, tokens, 2)}
        merged = sorted(proposals, key=lambda a: -float(unit[a] @ unit[proposals[a]]))[:r]
        order = [a for a in range(0, tokens, 2) if a not in merged] + list(odd)
        assert places == [order.index(proposals[t] if t in merged else t) for t in range(tokens)]
        assert places[0] == 0


def test_merged_tokens_are_means_by_size():
    tokens, rows = torch.tensor([[[0.0], [3.0], [9.0]]]), torch.tensor([[0, 1, 1]])
    lazy_property, size = merge_pairs(tokens, None, rows, 2)
    assert lazy_property.tolist() == [[[0.0], [6.0]]]
    assert size.tolist() == [[1.0, 2.0]]
    twice, size = merge_pairs(lazy_property, size, torch.tensor([[0, 0]]), 1)
    torch.testing.assert_close(twice, torch.tensor([[[4.0]]]))
    assert size.tolist() == [[3.0]]


def test_top_k_keeps_all(small_vit, images):
    for keep in (100, 1000):
        torch.testing.assert_close(ClassAttentionTopK(small_vit, keep, 1)(images), small_vit(images))


def test_top_k_as_in_words(small_vit, images):
    block, keep = small_vit.blocks[0], 7
    tokens = small_vit._pos_embed(small_vit.patch_embed(images))
    attn, normed = block.attn, block.norm1(tokens)
    query, keys, _ = attn.qkv(normed).view(3, 101, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    score = (query @ keys.transpose(-2, -1) * attn.scale).softmax(-1).mean(1)[:, 0, 1:]
    kept = torch.cat([torch.zeros(3, 1, dtype=torch.int64), score.topk(keep).indices.sort().values + 1], dim=1)
    tokens = tokens + attn(normed)
    tokens = torch.stack([row[places] for row, places in zip(tokens, kept, strict=True)])
    tokens = small_vit.blocks[1:](tokens + block.mlp(block.norm2(tokens)))
    peer = ClassAttentionTopK(small_vit, keep, 0)
    torch.testing.assert_close(peer(images), small_vit.forward_head(small_vit.norm(tokens)))
    assert peer.lengths(101) == [101, *[8] * (len(small_vit.blocks) - 1)]


def make_fast(model, images, threshold):
    spec = PatchSpec.of(model)
    words = patchify(images[:1], spec.patch_size)[0, :20].float()
    count = torch.zeros(len(words), dtype=torch.int64)
    codebook = Codebook(words, count, count, "pixel", spec.patch_size, spec.mean, spec.std)
    return VWTokenizer(model, InterImage(codebook, threshold))


@pytest.mark.parametrize("threshold", [0.0, 0.95, 2.0])
def test_padding_as_packing(small_vit, images, threshold):
    fast = make_fast(small_vit, images, threshold)
    counts = fast.tokenize(images).counts.tolist()
    assert (len(set(counts)) > 1) == (threshold == 0.95)
    torch.testing.assert_close(PadAndMask(fast)(images), fast(images), atol=1e-5, rtol=1e-5)


def test_padding_is_masked(small_vit, images):
    padded = PadAndMask(make_fast(small_vit, images, 0.95))
    alone = torch.cat([padded(image[None]) for image in images])
    torch.testing.assert_close(padded(images), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(small_vit, images, dtype):
    model, images = small_vit.to(dtype), images.to(dtype)
    for peer in (TokenMerging(model, 9), ClassAttentionTopK(model, 30), PadAndMask(make_fast(model, images, 0.9))):
        logits = peer(images)
        assert logits.dtype == dtype
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("make", [lambda m: TokenMerging(m, -1), lambda m: ClassAttentionTopK(m, 0)])
def test_refuses_arguments(small_vit, make):
    with pytest.raises(ArgumentError, match="expected"):
        make(small_vit)
    with pytest.raises(ArgumentError, match="block 99"):
        ClassAttentionTopK(small_vit, 5, 99)
    with pytest.raises(ArgumentError, match="strategy"):
        PadAndMask(VWTokenizer(small_vit))


@pytest.mark.parametrize("options", [{"global_pool": "avg"}, {"reg_tokens": 4}])
def test_refuses_models(options):
    model = timm.create_model("test_vit", **options).eval()
    for make in (lambda: TokenMerging(model, 8), lambda: ClassAttentionTopK(model, 8)):
        with pytest.raises(ModelError, match="one class token"):
            make()


def test_refuses_training(small_vit):
    with pytest.raises(ModelError, match="eval"):
        TokenMerging(small_vit.train(), 8)
