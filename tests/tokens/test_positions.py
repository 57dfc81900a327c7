import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import create_rope_embed

from vwt import Absorb, Codebook, InterImage, IntraImage, Merge, Neighbours, Prune, PruningSchedule, VWTokenizer
from vwt.errors import ModelError
from vwt.models.spec import PatchSpec
from vwt.reductions.assignment import Assignment
from vwt.tokens.packing import Packed
from vwt.tokens.patches import patchify
from vwt.tokens.positions import Positions, gather_bias, grid_positions, word_positions
from vwt.tokens.words import group_words, keep_patches

GRID = (3, 5)
DIM = 16  # of a head


def make_table(kind, grid=GRID):
    torch.manual_seed(0)
    options = {"cat": {"in_pixels": False, "ref_feat_shape": (4, 4)}, "mixed": {"depth": 2}}.get(kind, {})
    try:
        rope = create_rope_embed(kind, dim=2 * DIM, num_heads=2, feat_shape=grid, **options)
    except ValueError as error:
        if "Unknown RoPE type" not in str(error):
            raise
        pytest.skip(f"timm {timm.__version__}: {error}")
    return rope.get_embed(shape=grid).detach()


def slow_angles(kind, row, column, grid):
    """The angles of any place, written out from what each kind of rotary embedding is, interleaved or in halves."""
    rows, columns = grid
    if kind == "cat":
        bands = [10000 ** (-i / (DIM // 4)) for i in range(DIM // 4)]
        return [p * b for p in (row / rows * 4, column / columns * 4) for b in bands]
    if kind == "dinov3":
        periods = [100 ** (2 * i / (DIM // 2)) for i in range(DIM // 4)]
        places = (2 * (row + 0.5) / rows - 1, 2 * (column + 0.5) / columns - 1)
        return [2 * math.pi * p / period for p in places for period in periods]
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["cat", "dinov3"])
@pytest.mark.parametrize("place", [(0, 0), (2, 4), (1, 3), (0.5, 2.5), (1.25, 0), (2 / 3, 3.7)])
def test_a_mean_position_is_rotated_as_if_it_were_a_place(kind, place):
    at = torch.tensor([[-1.0, -1.0], place])
    turned = Positions((7, 9), 1, (2,), make_table(kind, (7, 9)), at, whole=False).dense
    assert turned.shape == (1, 1, 1, 2 * DIM)
    sin, cos = turned[0, 0, 0].chunk(2)
    angles = torch.tensor(slow_angles(kind, *place, (7, 9)))
    angles = angles.repeat(2) if kind == "dinov3" else angles.repeat_interleave(2)
    torch.testing.assert_close(sin, angles.sin(), atol=2e-6, rtol=0)
    torch.testing.assert_close(cos, angles.cos(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("grid", [(3, 5), (1, 6), (6, 1), (2, 2), (1, 1), (32, 24)])
@pytest.mark.parametrize("kind", ["cat", "dinov3", "mixed", "mrope"])
def test_places_of_the_grid_are_rotated_as_the_model_does(kind, grid):
    """However they are computed: picked, or from the angles of three places."""
    table = make_table(kind, grid)
    at = torch.cat([torch.full((2, 2), -1.0), grid_positions(grid)]).repeat(2, 1)
    lengths = (2 + grid[0] * grid[1],) * 2
    picked, computed = (Positions(grid, 2, lengths, table, at, whole=whole).dense for whole in (True, False))
    expected = table[None, None].expand(2, 1, -1, -1) if table.ndim == 2 else table[:, None].expand(-1, 2, -1, -1, -1)
    assert torch.equal(picked, expected)
    torch.testing.assert_close(computed, expected, atol=5e-6, rtol=0)
    assert Positions(grid, 2, lengths, table).dense is table


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", ["dinov3", "mixed"])
def test_prefix_tokens_among_others_are_not_rotated(kind, whole):
    """Attention leaves the first prefix tokens of a sequence alone; those of further images are turned by nothing."""
    table = make_table(kind)
    at = torch.tensor([[-1, -1], [0, 2], [2, 4], [-1, -1], [1, 1]]).float()
    together = Positions(GRID, 1, (3, 2), table, at, whole=whole).together
    still = torch.cat([torch.zeros(DIM), torch.ones(DIM)]).expand_as(table[..., 0, :])
    expected = torch.stack([table[..., 2, :], table[..., 14, :], still, table[..., 6, :]], dim=-2)
    torch.testing.assert_close(together, expected, atol=5e-6, rtol=0)
    apart = Positions(GRID, 1, (3, 2), table, at, whole=whole).apart
    torch.testing.assert_close(apart[1].flatten(), table[..., 6, :].flatten(), atol=5e-6, rtol=0)


def test_the_index_into_relative_positions():
    at = torch.tensor([[-1, -1], [0, 2], [2, 4], [-1, -1], [0, 0]]).float()
    assert Positions(GRID, 1, (3, 2), None, at).index.tolist() == [0, 3, 15, 0, 1]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_words_are_placed_at_the_mean_of_their_patches(rows, columns, seed):
    labels = torch.randint(-1, 3, (2, rows * columns), generator=torch.Generator().manual_seed(seed))
    words = group_words(labels, 3, (rows, columns))
    expected = []
    for group in words.group:
        for token in range(int(group.max()) + 1):
            places = [(i // columns, i % columns) for i in range(rows * columns) if group[i] == token]
            expected.append([sum(axis) / len(places) for axis in zip(*places, strict=True)])
    torch.testing.assert_close(word_positions(words), torch.tensor(expected))


def test_kept_patches_are_where_they_were():
    words = keep_patches(torch.tensor([[1, 4], [0, 5]]), (2, 3))
    assert word_positions(words).tolist() == [[0, 1], [1, 1], [0, 0], [1, 2]]


@pytest.mark.parametrize("sized", [True, False])
def test_tokens_that_become_one_are_at_the_mean_of_all_their_patches(sized):
    at, new = torch.rand(2, 6, 2), torch.tensor([[0, 1, 1, 2, 1, 0], [2, 1, 0, 0, 0, 0]])
    sizes = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 1, 1, 2, 1, 1]]).float() if sized else None
    means, _ = Assignment(new, 3, 0).apply(at, sizes)
    for image in range(2):
        for token in range(3):
            weight = (new[image] == token).float() * (1 if sizes is None else sizes[image])
            torch.testing.assert_close(means[image, token], (at[image] * weight[:, None]).sum(0) / weight.sum())


def test_a_bias_is_that_of_the_chosen_tokens():
    bias, index = torch.randn(1, 3, 6, 6), torch.tensor([[0, 2, 5], [0, 4, 1]])
    chosen = gather_bias(bias, index)
    assert chosen.shape == (2, 3, 3, 3)
    for image, rows in enumerate(index.tolist()):
        for i, row in enumerate(rows):
            for j, column in enumerate(rows):
                assert torch.equal(chosen[image, :, i, j], bias[0, :, row, column])


# -- in a model --------------------------------------------------------------------------------------------------------


def make_model(name="vit_small_patch16_dinov3", **options):
    torch.manual_seed(0)
    arguments = {"num_classes": 10, "img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, **options}
    model = timm.create_model(name, **arguments).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def make_images(count=3):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"])
def test_kept_patches_keep_their_rotation(name):
    """As the model computes it where the patches that are not kept are masked."""
    model, images = make_model(name), make_images()
    fast, prefix = VWTokenizer(model, IntraImage(0.4)), model.num_prefix_tokens
    words = fast.tokenize(images)
    seen = torch.cat([torch.ones(3, prefix, dtype=torch.bool), words.group >= 0], dim=1)
    mask = torch.zeros(3, 1, 1, seen.shape[1]).masked_fill(~seen[:, None, None], -torch.inf)
    masked = model.forward_features(images, attn_mask=mask)
    packed, _ = fast.forward_features(images, unmerge=False)
    for run, image, kept in zip(packed.split(), masked, seen, strict=True):
        torch.testing.assert_close(run, image[kept], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_kept_patches_keep_their_bias():
    """What Beit computes without the patches that are dropped: their attention logits at minus infinity."""
    model, images = make_model("beit_base_patch16_224"), make_images()
    fast = VWTokenizer(model, IntraImage(0.4))
    words = fast.tokenize(images)
    packed, _ = fast.forward_features(images, unmerge=False)
    for image, group, run in zip(images, words.group, packed.split(), strict=True):
        seen = torch.cat([torch.ones(1, dtype=torch.bool), group >= 0])
        tokens = model.pos_drop(torch.cat([model.cls_token, model.patch_embed(image[None])], dim=1))
        if model.pos_embed is not None:
            tokens = tokens + model.pos_embed
        hidden = torch.zeros(1, 1, 1, len(seen)).masked_fill(~seen, -torch.inf)
        for block in model.blocks:
            tokens = block(tokens, shared_rel_pos_bias=hidden)
        torch.testing.assert_close(run, model.norm(tokens)[0, seen], atol=1e-5, rtol=1e-5)


def slow_tokens(model, image):
    """What enters the blocks of one image (1, n, D), and arguments of each block."""
    tokens = model.patch_embed(image[None])
    if hasattr(model, "rope"):
        tokens, rotary = model._pos_embed(tokens)
        return model.norm_pre(tokens), {"rope": rotary}, "attn_mask"
    tokens = torch.cat([model.cls_token, tokens], dim=1)
    return tokens if model.pos_embed is None else tokens + model.pos_embed, {}, "shared_rel_pos_bias"


@torch.inference_mode()
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "beit_base_patch16_224"])
@pytest.mark.parametrize("options", [{"drop": 0.3}, {"threshold": 0.1}, {"drop": 0.0}], ids=repr)
def test_what_stands_for_others_is_where_it_was(name, options):
    """As the model computes it on the full grid, where all that is not kept is hidden, and others see s as s ** 0.5."""
    model, images = make_model(name), make_images()
    for image, rows in ((0, 64), (1, 32)):
        images[image, :, :rows, 16:32] = images[image, :, :rows, :16]
    prefix, fast = model.num_prefix_tokens, VWTokenizer(model, Neighbours(**options))
    words = fast.tokenize(images)
    packed, _ = fast.forward_features(images, unmerge=False)
    assert (min(words.lengths) < 16) == (options != {"drop": 0.0})
    if "threshold" in options:
        assert len(set(words.lengths)) > 1
    for number, (image, run) in enumerate(zip(images, packed.split(), strict=True)):
        tokens, others, mask = slow_tokens(model, image)
        group, share = words.group[number].tolist(), words.weight[number].tolist()
        before, seen, sizes = tokens.clone(), list(range(prefix)), [1.0] * tokens.shape[1]
        for patch in (patch for patch in range(16) if share[patch] > 0.5):
            members = [other for other in range(16) if group[other] == group[patch]]
            tokens[0, prefix + patch] = sum(share[other] * before[0, prefix + other] for other in members)
            seen.append(prefix + patch)
            sizes[prefix + patch] = float(len(members))
        assert len(seen) == len(run)
        bias = 0.5 * torch.tensor(sizes).log().repeat(len(sizes), 1).fill_diagonal_(0)
        bias[:, [n for n in range(len(sizes)) if n not in seen]] = -torch.inf
        for block in model.blocks:
            tokens = block(tokens, **others, **{mask: bias[None, None]})
        torch.testing.assert_close(run, model.norm(tokens)[0, seen], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("reduction", [Prune(4), Merge(4), Absorb(4)], ids=repr)
def test_places_follow_reductions(reduction):
    fast = VWTokenizer(make_model(), None, PruningSchedule({1: reduction, 2: reduction}))
    packed, words = fast.forward_features(make_images(), unmerge=False)
    at = torch.cat([run[fast.num_prefix_tokens :] for run in packed.places.at.split(list(packed.lengths))])
    torch.testing.assert_close(at, word_positions(words))


@torch.inference_mode()
def test_places_follow_reductions_of_words():
    model, images = make_model(), make_images()
    images[1, :, :48] = images[1, :, :16, :16].repeat(1, 3, 4)
    spec, features = PatchSpec.of(model), patchify(images, (16, 16))[:, 0]
    count = torch.ones(3, dtype=torch.int64)
    codebook = Codebook(features, count, count, "pixel", (16, 16), spec.mean, spec.std)
    fast = VWTokenizer(model, InterImage(codebook, 1e-3), PruningSchedule({0: Merge(2), 1: Prune(1)}))
    packed, words = fast.forward_features(images, unmerge=False)
    assert len(set(packed.lengths)) > 1
    at = torch.cat([run[fast.num_prefix_tokens :] for run in packed.places.at.split(list(packed.lengths))])
    torch.testing.assert_close(at, word_positions(words))


@torch.inference_mode()
def test_tokens_that_lost_their_places_are_refused():
    fast = VWTokenizer(make_model())
    packed, words = fast.pack(make_images())
    lost = Packed(packed.values, packed.lengths)
    with pytest.raises(ModelError, match=r"Eva turns its tokens by their places, which these have lost.*Packed\.take"):
        fast.backbone.classify(lost, words)
    kept = packed.take(torch.tensor([[0, 1, 2, 3, 4, 6, 9]] * 3))
    assert kept.lengths == (7,) * 3
    assert kept.places.at[:7, 1].tolist() == [-1] * 5 + [1, 0]
    assert fast.backbone.run(kept)[0].values.isfinite().all()


@pytest.mark.parametrize("grid", [False, True])
def test_gradients_reach_the_frequencies(grid):
    """Mixed rotary embeddings are learnt."""
    model, images = make_model("vit_small_patch16_rope_mixed_224"), make_images()
    fast = VWTokenizer(model, IntraImage(0.3), PruningSchedule({0: Merge(3)} if grid else {}))
    fast(images).square().sum().backward()
    assert model.rope.freqs.grad.abs().max() > 0
    assert model.rope.freqs.grad.isfinite().all()


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_gradient_checkpointing_changes_no_gradient(mode):
    model, images = make_model("vit_small_patch16_rope_mixed_224"), make_images()
    fast = VWTokenizer(model, IntraImage(0.3), PruningSchedule({0: Merge(3)})).train(mode)
    weight = model.blocks[0].attn.qkv.weight
    expected = torch.autograd.grad(fast(images).square().sum(), weight)[0]
    fast.set_grad_checkpointing()
    torch.testing.assert_close(torch.autograd.grad(fast(images).square().sum(), weight)[0], expected)
