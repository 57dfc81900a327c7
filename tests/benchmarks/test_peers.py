"""The comparators: equal to recorded outputs and to plain loops, and clear about what they do not take."""

from functools import partial
from itertools import product

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from peers import (
    AgglomerativeClustering,
    AgglomerativeClusteringOfTokens,
    ClassAttentionTopK,
    DensityPeaks,
    DiffRate,
    EnergyMerging,
    PadAndMask,
    PruneOneMoreToken,
    PruneOrPool,
    RandomDropInside,
    TokenMerging,
)
from peers._peer import after_class_token, attend, merge
from peers.atc import cluster
from peers.diffrate import DEIT, merge_last, nearest
from peers.dpc_knn import join_peaks
from peers.pitome import match_energetic
from peers.ppt import significance
from peers.tome import match_pairs
from timm.models.vision_transformer import ParallelScalingBlock

from tests.export.cases import needs_tracing
from tests.matrix import matrix
from vwt import Codebook, InterImage, VWTokenizer
from vwt.errors import ArgumentError, ModelError
from vwt.export.formats import BATCH
from vwt.export.runtimes import run_module
from vwt.models.spec import PatchSpec
from vwt.tokens.patches import patchify

EVERY = [
    AgglomerativeClustering,
    AgglomerativeClusteringOfTokens,
    ClassAttentionTopK,
    DensityPeaks,
    DiffRate,
    EnergyMerging,
    PruneOneMoreToken,
    PruneOrPool,
    RandomDropInside,
    TokenMerging,
]

# Clusters by SciPy, and draws by the bits of each image.
NOT_TRACED = [AgglomerativeClustering, AgglomerativeClusteringOfTokens, RandomDropInside]


def everywhere(r):
    """So many in each of the blocks of a small model."""
    return dict.fromkeys(range(6), r)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture
def images():
    return torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("r", "batch"), matrix(product([8, 13], [1, 8]), (13, 8)))
def test_tome_recorded(shared, vit_tiny, r, batch):
    path = shared / "reference" / "tome_reference.npz"
    if not path.is_file():
        pytest.skip(f"no recorded outputs at {path}")
    with np.load(path) as arrays:
        images, expected = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays[f"r{r}_logits"])
    images = ((images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).contiguous()
    tome = TokenMerging(vit_tiny, dict.fromkeys(range(12), r))
    logits = torch.cat([tome(part) for part in images.split(batch)])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("removed", matrix([28, 56, 84], 56))
def test_pomt_recorded(shared, vit_tiny, removed):
    path = shared / "reference" / "pomt_reference.npz"
    if not path.is_file():
        pytest.skip(f"no recorded outputs at {path}")
    with np.load(path) as arrays:
        images, expected = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays[f"R{removed}_logits"])
    images = ((images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).contiguous()
    torch.testing.assert_close(PruneOneMoreToken(vit_tiny, {3: removed})(images), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", EVERY)
def test_nothing_removed_is_the_model(small_vit, images, make):
    torch.testing.assert_close(make(small_vit, everywhere(0))(images), small_vit(images))


@pytest.mark.parametrize("make", EVERY)
def test_no_dependence_on_batch_mates(small_vit, images, make):
    peer = make(small_vit, {1: 9, 2: 20})
    if make is RandomDropInside:  # a draw depends on all bits, and those of a batch may differ in the last
        assert torch.equal(peer(images), peer(images))
        return
    alone = torch.cat([peer(image[None]) for image in images])
    torch.testing.assert_close(peer(images), alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(alone, small_vit(images), atol=1e-5)


@pytest.mark.parametrize(("r", "make"), matrix(product([9, 45, 1000], EVERY), *product([45], EVERY)))
def test_lengths(small_vit, images, make, r):
    peer, seen = make(small_vit, everywhere(r)), []
    hooks = [block.norm1.register_forward_hook(lambda _, i, o: seen.append(o.shape[1])) for block in small_vit.blocks]
    assert torch.isfinite(peer(images)).all()
    for hook in hooks:
        hook.remove()
    assert peer.lengths(101) == seen
    least = 51 if peer.most(100) == 50 else 2
    assert seen[1] == max(101 - r, least)


def test_tome_lengths(small_vit):
    assert TokenMerging(small_vit, everywhere(90)).lengths(101) == [101, 51, 26, 14, 8, 5]


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
    once, size = merge(tokens, None, rows, 2)
    assert once.tolist() == [[[0.0], [6.0]]]
    assert size.tolist() == [[1.0, 2.0]]
    twice, size = merge(once, size, torch.tensor([[0, 0]]), 1)
    torch.testing.assert_close(twice, torch.tensor([[[4.0]]]))
    assert size.tolist() == [[3.0]]


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
    peer = ClassAttentionTopK(small_vit, {0: 100 - keep})
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


@pytest.mark.parametrize("dtype", matrix([torch.bfloat16, torch.float16], torch.bfloat16))
def test_low_precision(small_vit, images, dtype):
    model, images = small_vit.to(dtype), images.to(dtype)
    for peer in (*(make(model, {1: 9, 3: 20}) for make in EVERY), PadAndMask(make_fast(model, images, 0.9))):
        logits = peer(images)
        assert logits.dtype == dtype
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize(("removed", "message"), [({1: -1}, "block 1 removes -1"), ({6: 3}, "block 6 .* below 6")])
def test_refuses_arguments(small_vit, make, removed, message):
    with pytest.raises(ArgumentError, match=message):
        make(small_vit, removed)


def test_padding_needs_a_strategy(small_vit):
    with pytest.raises(ArgumentError, match="strategy"):
        PadAndMask(VWTokenizer(small_vit))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("test_vit", {"global_pool": "avg"}, "pools by 'avg'"),
        ("test_vit", {"reg_tokens": 4}, "has 4 register tokens"),
        ("test_vit", {"class_token": False, "global_pool": "avg"}, "has no class token"),
        ("eva02_tiny_patch14_224", {"depth": 1}, "has rotary positions"),
        ("naflexvit_base_patch16_gap", {"depth": 1}, "is of another class"),
        ("vit_small_patch16_224", {"depth": 1, "block_fn": ParallelScalingBlock}, "has blocks of another kind"),
    ],
)
def test_refuses_models(name, options, reason):
    model = timm.create_model(name, **options).eval()
    for make in (*(partial(make, removed={0: 8}) for make in EVERY), partial(EnergyMerging.keeping, rate=0.9)):
        with pytest.raises(ModelError, match=f"{reason}; they take .* one class token") as error:
            make(model)
        assert "\n" not in str(error.value)


def test_refuses_training(small_vit):
    with pytest.raises(ModelError, match="eval"):
        TokenMerging(small_vit.train(), {0: 8})


# -- worked examples ---------------------------------------------------------------------------------------------------


def test_average_linkage():
    """Points 0, 1, 3, 7 and 8.5 on a line: 0 with 1, then 7 with 8.5, then 3 with 0 and 1, at 2.5 on average."""
    points = torch.tensor([7.0, 0.0, 8.5, 1.0, 3.0])
    distance = (points[:, None] - points).abs()
    assert cluster(distance, 5).tolist() == [0, 1, 2, 3, 4]
    assert cluster(distance, 4).tolist() == [0, 1, 2, 1, 3]
    assert cluster(distance, 3).tolist() == [0, 1, 0, 1, 2]
    assert cluster(distance, 2).tolist() == [0, 1, 0, 1, 1]
    assert cluster(distance, 1).tolist() == [0] * 5


@pytest.mark.parametrize("count", [1, 4, 11])
def test_average_linkage_as_in_a_loop(count):
    points = torch.randn(12, 3, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    distance = torch.cdist(points, points)
    clusters = [[point] for point in range(12)]
    while len(clusters) > count:
        pairs = [(one, other) for one in range(len(clusters)) for other in range(one)]
        one, other = min(pairs, key=lambda pair: float(distance[clusters[pair[0]]][:, clusters[pair[1]]].mean()))
        clusters[other] += clusters.pop(one)
    rows = cluster(distance, count).tolist()
    assert {tuple(sorted(own)) for own in clusters} == {
        tuple(point for point in range(12) if rows[point] == number) for number in range(count)
    }


def test_density_peaks():
    """Two groups of six, as many as a patch and its neighbours: two clusters are the groups."""
    group = torch.tensor([0.0, 0.1, 0.2, 0.35, 0.5, 0.7])
    points = torch.cat([group, 5 + 1.1 * group])[None, :, None]
    [rows] = join_peaks(points, 2).tolist()
    assert rows == [rows[0]] * 6 + [1 - rows[0]] * 6
    assert sorted(join_peaks(points, 12)[0].tolist()) == list(range(12))


def test_density_peaks_by_hand():
    """Distances / √1 of 0, 1, 3: density exp(-mean of squares of the others) ranks 1 before 0 before 3."""
    points = torch.tensor([[[0.0], [1.0], [3.0]]])
    density = [np.exp(-(1 + 9) / 2), np.exp(-(1 + 4) / 2), np.exp(-(9 + 4) / 2)]
    score = [density[0] * 1, density[1] * 3, density[2] * 2]  # to the nearest denser; the densest to the farthest
    assert score[1] > score[0] > score[2]
    assert join_peaks(points, 1).tolist() == [[0, 0, 0]]
    assert join_peaks(points, 2).tolist() == [[1, 0, 0]]  # 1 and 0 are centres, 3 is nearer to 1


def test_energy_as_in_a_loop():
    metric = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    margin, r = 0.3, 3
    for image, rows in zip(metric, match_energetic(metric, r, margin).tolist(), strict=True):
        cosine = (F.normalize(image, dim=-1) @ F.normalize(image, dim=-1).T).tolist()
        energy = [np.mean([x if x >= margin else np.exp(x - margin) - 1 for x in row]) for row in cosine]
        order = sorted(range(9), key=lambda at: -energy[at])
        one, other, protected = order[0 : 2 * r : 2], order[1 : 2 * r : 2], order[2 * r :]
        assert [rows[at] for at in protected] == [0, 1, 2]
        assert [rows[at] for at in other] == [3, 4, 5]
        assert [rows[at] for at in one] == [3 + int(np.argmax([cosine[at][to] for to in other])) for at in one]


def test_energy_keeps_a_share_of_each_block(small_vit):
    assert EnergyMerging.keeping(small_vit, 0.9).lengths(101) == [101, 91, 82, 74, 67, 61]
    with pytest.raises(ArgumentError, match=r"rate is 0\.4"):
        EnergyMerging.keeping(small_vit, 0.4)


def test_diffrate_merges_into_the_most_similar():
    """The fourth token is most like the class token, which nothing joins, then like the third."""
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 4.0], [3.0, 3.0], [4.0, 1.0], [-1.0, 0.0]]])
    size = torch.tensor([[1.0, 2.0, 1.0, 3.0, 1.0]])
    merged, sizes = merge_last(tokens, size, 3)
    torch.testing.assert_close(merged, torch.tensor([[[1.0, 0.0], [-0.5, 2.0], [3.5, 2.0]]]))
    likeness = 15 / (18**0.5 * 17**0.5)
    torch.testing.assert_close(sizes, torch.tensor([[1.0, 2.0, 1 + 3 * likeness]]))


def test_diffrate_ranks_by_class_attention(small_vit, images):
    """Dropping alone, by the same ranking, is top-k with its tokens in another order."""
    peer = DiffRate(small_vit, {1: 60}, {1: 60})
    torch.testing.assert_close(peer(images), ClassAttentionTopK(small_vit, {1: 60})(images), atol=1e-5, rtol=1e-5)
    merging = DiffRate(small_vit, {1: 60})
    assert not torch.allclose(peer(images), merging(images), atol=1e-4)


RATES = [(192, gmacs) for gmacs in DEIT["DeiT-Tiny"]] + [(384, gmacs) for gmacs in DEIT["DeiT-Small"]]


@pytest.mark.parametrize(("width", "gmacs"), matrix(RATES, RATES[0], RATES[-1]))
def test_diffrate_rates(width, gmacs):
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=width).eval()
    peer = DiffRate.published(model, gmacs)
    pruning, merging = DEIT[nearest(width)][gmacs]
    kept = [197, *(min(pair) for pair in zip(pruning, merging, strict=True))]
    assert peer.lengths(197) == [min(kept[: block + 1]) for block in range(12)]
    # Published as GMACs: of the blocks, as the paper counts them.
    total = 0
    for entering, leaving in zip(peer.lengths(197), [*peer.lengths(197)[1:], kept[-1]], strict=True):
        total += 4 * entering * width**2 + 2 * entering**2 * width + 8 * leaving * width**2
    assert (total + 197 * width * 768) / 1e9 == pytest.approx(float(gmacs), rel=0.06)


def test_diffrate_may_merge_nothing(small_vit, images):
    """Where all that go are dropped it is top-k by class attention."""
    dropped = DiffRate(small_vit, {1: 30}, pruned={1: 30})(images)
    torch.testing.assert_close(dropped, ClassAttentionTopK(small_vit, {1: 30})(images), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(dropped, DiffRate(small_vit, {1: 30}, pruned={1: 20})(images), atol=1e-5)


def test_diffrate_refuses_other_shapes(small_vit):
    with pytest.raises(ArgumentError, match="12 blocks and 197 tokens, not 6 and 101"):
        DiffRate.published(small_vit, "0.9")


@pytest.mark.slow
@needs_tracing
@pytest.mark.parametrize("make", [each for each in EVERY if each not in NOT_TRACED])
def test_traced_for_any_batch(images, make):
    """So that a comparator is measured in the runtimes that vwt is measured in."""
    peer = make(timm.create_model("test_vit", depth=2).eval(), {0: 30, 1: 20})
    with torch.inference_mode(False):
        traced = run_module("onnxruntime", "float32", peer, images[:1].clone(), free=BATCH)
    torch.testing.assert_close(traced(images), peer(images), atol=1e-4, rtol=1e-4)


def test_significance():
    attention = torch.tensor([[0.2, 0.4, 0.1]])
    value = torch.tensor([9.0, 3.0, 1.0, 2.0]).view(1, 1, 4, 1).expand(1, 2, 4, 1)  # of two equal heads
    torch.testing.assert_close(significance(attention, value), torch.tensor([[0.6, 0.4, 0.2]]) / 1.2)


def test_prunes_or_pools(small_vit, images):
    """All prune at threshold 0, which is not top-k only for the lengths of values; none below an infinite one."""
    pools = PruneOrPool(small_vit, {1: 30}, threshold=float("inf"))
    torch.testing.assert_close(pools(images), TokenMerging(small_vit, {1: 30})(images))
    prunes = PruneOrPool(small_vit, {1: 30}, threshold=0.0)(images)
    block = small_vit.blocks[1]
    tokens = small_vit.blocks[0](small_vit._pos_embed(small_vit.patch_embed(images)))
    attended = attend(block.attn, block.norm1(tokens))
    scores = significance(attended.of_class_token(), attended.value)
    kept = F.pad(scores.topk(70).indices.sort().values + 1, (1, 0))
    tokens = (tokens + attended.output).gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
    tokens = small_vit.blocks[2:](tokens + block.mlp(block.norm2(tokens)))
    torch.testing.assert_close(prunes, small_vit.forward_head(small_vit.norm(tokens)), atol=1e-5, rtol=1e-5)
    middle = scores.var(dim=1).sort().values[1:].mean()
    mixed = PruneOrPool(small_vit, {1: 30}, threshold=float(middle))(images)
    expected = torch.where((scores.var(dim=1) >= middle)[:, None], prunes, pools(images))
    assert 0 < int((scores.var(dim=1) >= middle).sum()) < 3
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)


def test_class_attention_is_proportional(small_vit, images):
    """What the class token pays is shown as it attends: with the sizes of tokens."""
    block = small_vit.blocks[0]
    tokens = block.norm1(small_vit._pos_embed(small_vit.patch_embed(images)))
    size = torch.rand(3, 101, generator=torch.Generator().manual_seed(0)) + 0.5
    attended = attend(block.attn, tokens, size)
    logits = (attended.query @ attended.keys.transpose(-2, -1)) * block.attn.scale + size.log()[:, None, None]
    torch.testing.assert_close(attended.of_class_token(), logits.softmax(-1).mean(1)[:, 0, 1:])


def test_class_token_stays_alone():
    assert after_class_token(torch.tensor([[1, 0, 1]])).tolist() == [[0, 2, 1, 2]]
