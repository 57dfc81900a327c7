import copy
import math
import statistics
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from test_tokenizer import make_images

from vwt.codebook import Codebook
from vwt.errors import ArgumentError, MismatchError
from vwt.patches import PatchSpec, patchify, unpatchify
from vwt.strategies import InterImage, IntraImage, Neighbours, Strategy
from vwt.tokenizer import VWTokenizer
from vwt.words import merge, unmerge

HALF, IMAGENET = ((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_codebook(words, patch_size=(2, 2), space="embedding", mean=HALF[0], std=HALF[1]):
    count = torch.ones(len(words), dtype=torch.int64)
    return Codebook(words, count, count, space, patch_size, mean, std, {"float32": "0"} if space == "embedding" else {})


def make_spec(patch_size=(2, 2), mean=HALF[0], std=HALF[1], projection="0"):
    return PatchSpec("a_model", patch_size, mean, std, {"float32": projection})


# -- IntraImage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patches", [20, 100, 196])
@pytest.mark.parametrize("drop", ["0", "0.25", "0.33", "0.5", "0.9", "0.99"])
def test_intra_keeps_the_patches_of_highest_variance(drop, patches):
    features = torch.randn(2, patches, 12, generator=seeded())
    count = max(1, int(patches * (1 - Fraction(drop))))
    words = IntraImage(float(drop))(features, (patches // 2, 2))
    assert words.lengths == (count, count)
    for image, group in zip(features.tolist(), words.group, strict=True):
        ranked = sorted(range(patches), key=[-statistics.variance(patch) for patch in image].__getitem__)
        assert (group >= 0).nonzero().flatten().tolist() == sorted(ranked[:count])
        assert group[group >= 0].tolist() == list(range(count))


def test_intra_keeps_at_least_one_patch():
    assert IntraImage(0.99)(torch.randn(3, 16, 12, generator=seeded()), (4, 4)).lengths == (1, 1, 1)


def test_intra_scores_in_float32():
    """A variance of 90000 overflows float16."""
    features = torch.randn(2, 64, 12, generator=seeded()).mul(300).half()
    words = IntraImage(0.5)(features, (8, 8))
    assert torch.equal(words.group, IntraImage(0.5)(features.float(), (8, 8)).group)


def test_intra_serves_any_model():
    strategy = IntraImage(0.5)
    assert strategy.bind(make_spec()) is strategy


@pytest.mark.parametrize("drop", [-0.1, 1, 1.5, float("nan")])
def test_intra_refuses_a_bad_share(drop):
    with pytest.raises(ArgumentError, match=rf"drop is {drop}; .*\[0, 1\)"):
        IntraImage(drop)


# -- InterImage --------------------------------------------------------------------------------------------------------


def slow_inter(features, words, threshold):
    """The paper's inter-image mode on one image, in plain Python: the patches of each token, by first patch."""
    tokens = {}
    for n, patch in enumerate(features.double()):
        distances = [1 - float(F.cosine_similarity(patch, word, dim=0)) for word in words.double()]
        nearest = min(range(len(words)), key=distances.__getitem__)
        assert abs(distances[nearest] - threshold) > 1e-6, "too near the threshold to tell"
        tokens.setdefault(nearest if distances[nearest] <= threshold else ("alone", n), []).append(n)
    return list(tokens.values())


@pytest.mark.parametrize("words", [1, 3, 8, 40, 200], ids="K={}".format)
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.4, 1.0, 2.0])
def test_inter_equals_a_plain_reference(words, threshold):
    """K below, at and above the feature width of 8: unmatched patches must never share a token with strangers."""
    vocabulary, features = torch.randn(words, 8, generator=seeded(1)), torch.randn(3, 36, 8, generator=seeded(2))
    result = InterImage(make_codebook(vocabulary), threshold)(features, (6, 6))
    expected = [slow_inter(image, vocabulary, threshold) for image in features]
    assert result.lengths == tuple(len(tokens) for tokens in expected)
    for group, tokens in zip(result.group, expected, strict=True):
        assert [(group == n).nonzero().flatten().tolist() for n in range(len(tokens))] == tokens
    means = [image[members].mean(0) for image, tokens in zip(features, expected, strict=True) for members in tokens]
    torch.testing.assert_close(merge(features, result), torch.stack(means))


@pytest.mark.parametrize("normalisation", [HALF, IMAGENET], ids=["half", "imagenet"])
def test_one_pixel_codebook_serves_every_normalisation(normalisation):
    """An image made of words is made of the same words, however it is normalised."""
    words = torch.rand(5, 12, generator=seeded())
    pattern = torch.tensor([0, 1, 1, 2, 0, 3, 3, 3, 4])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalisation)
    images = (unpatchify(words[pattern][None], (2, 2), (3, 3)) - mean) / std
    codebook = make_codebook(words, space="pixel", mean=(0.0,) * 3, std=(1.0,) * 3)
    strategy = InterImage(codebook, threshold=1e-5).bind(make_spec((2, 2), *normalisation))
    assert strategy(patchify(images, (2, 2)), (3, 3)).group.tolist() == [pattern.tolist()]
    assert InterImage(codebook, threshold=1e-5)(patchify(images, (2, 2)), (3, 3)).lengths == (9,)


@pytest.mark.parametrize("codebook", ["pixel", "embedding"])
def test_bind_refuses_another_model(codebook):
    strategy = InterImage(make_codebook(torch.rand(5, 12, generator=seeded()), space=codebook))
    with pytest.raises(MismatchError, match=r"\(2, 2\).*a_model.*\(4, 4\)"):
        strategy.bind(make_spec(patch_size=(4, 4)))
    if codebook == "embedding":
        with pytest.raises(MismatchError, match="patch projection"):
            strategy.bind(make_spec(projection="1"))
        with pytest.raises(MismatchError, match="normalisation"):
            strategy.bind(make_spec((2, 2), *IMAGENET))


@pytest.mark.parametrize("threshold", [-0.1, 2.1, float("nan")])
def test_inter_refuses_a_bad_threshold(threshold):
    with pytest.raises(ArgumentError, match=f"threshold is {threshold}"):
        InterImage(make_codebook(torch.ones(1, 12)), threshold)


@pytest.mark.parametrize("codebook", ["words.zarr", torch.ones(1, 12), None])
def test_inter_refuses_what_is_no_codebook(codebook):
    with pytest.raises(ArgumentError, match=r"codebook is .*Codebook\.load"):
        InterImage(codebook)


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu", torch.float16)],
    ids=["half", "double", "bfloat16", "to"],
)
def test_words_stay_float32(cast):
    strategy = InterImage(make_codebook(torch.randn(9, 12, generator=seeded())))
    before = strategy.index.directions.clone()
    directions = cast(torch.nn.Sequential(strategy))[0].index.directions
    assert directions.dtype == torch.float32
    assert torch.equal(directions, before)


def test_words_follow_to_a_device():
    assert InterImage(make_codebook(torch.ones(1, 12))).to("meta").index.directions.is_meta


def test_words_are_no_part_of_the_state_dict():
    assert not InterImage(make_codebook(torch.ones(1, 12))).state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features(dtype):
    features = torch.randn(2, 36, 12, generator=seeded()).to(dtype)
    strategy = InterImage(make_codebook(torch.randn(9, 12, generator=seeded(1))), 0.6)
    assert torch.equal(strategy(features, (6, 6)).group, strategy(features.float(), (6, 6)).group)


@pytest.mark.parametrize("make", [lambda: IntraImage(0.25), lambda: InterImage(make_codebook(torch.eye(12)), 0.6)])
def test_a_deep_copy_works_alike_by_itself(make):
    features = torch.randn(2, 36, 12, generator=seeded())
    strategy = make()
    twin = copy.deepcopy(strategy)
    assert isinstance(strategy, Strategy)
    assert repr(twin) == repr(strategy)
    expected = strategy(features, (6, 6)).group
    for buffer in strategy.buffers():
        buffer.zero_()
    assert torch.equal(twin(features, (6, 6)).group, expected)


# -- Neighbours --------------------------------------------------------------------------------------------------------

GRIDS = [(1, 1), (1, 7), (5, 1), (2, 2), (3, 3), (4, 6), (7, 5)]


def around(patch, grid):
    """The direct neighbours of a patch."""
    row, column = divmod(patch, grid[1])
    places = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    return [r * grid[1] + c for r, c in places if 0 <= r < grid[0] and 0 <= c < grid[1]]


def slow_likeness(features, grid, always):
    """For each patch of one image that may go, by colour: its likest neighbour, and how alike."""
    colours = ({}, {})
    for patch in range(len(features)):
        likeness = [
            (float(F.cosine_similarity(features[patch].double(), features[other].double(), dim=0)), other)
            for other in around(patch, grid)
        ]
        if likeness and patch not in always:
            colours[sum(divmod(patch, grid[1])) % 2][patch] = max(likeness)
    return colours


def slow_drop(features, grid, count, always=()):
    """What stands for each dropped patch, for the colour, or both where they are equal, that is more alike."""
    choices = []
    for number, colour in enumerate(slow_likeness(features, grid, always)):
        gone = sorted(colour, key=lambda patch: -colour[patch][0])[:count]
        places = sum(sum(divmod(patch, grid[1])) % 2 == number for patch in range(len(features)))
        alike = sum(likeness for likeness, _ in colour.values()) / max(places, 1)
        choices.append((alike, {patch: colour[patch][1] for patch in gone}))
    best = max(total for total, _ in choices)
    return [partners for total, partners in choices if total > best - 1e-5]


def slow_threshold(features, grid, threshold, always=()):
    """The same for what is alike enough; of two colours with as many, the first."""
    colours = [
        {patch: other for patch, (likeness, other) in colour.items() if 1 - likeness <= threshold}
        for colour in slow_likeness(features, grid, always)
    ]
    return max(colours, key=len)


def partners_of(words, image):
    """What stands for each patch that is not kept."""
    kept = [patch for patch, weight in enumerate(words.weight[image].tolist()) if weight]
    group = words.group[image].tolist()
    assert [group[patch] for patch in kept] == list(range(len(kept)))  # tokens in row-major order
    return {patch: kept[token] for patch, token in enumerate(group) if patch not in kept}


def check_words(words, grid):
    """What holds for every image, however many go."""
    patches = grid[0] * grid[1]
    assert words.weight.dtype == torch.float32
    assert words.grid == grid
    assert set(words.weight.unique().tolist()) <= {0.0, 1.0}
    assert words.lengths == tuple(words.counts.tolist()) == tuple(words.weight.sum(1).int().tolist())
    assert words.sizes.sum().item() == patches * len(words.group)
    assert words.sizes.tolist() == [
        group.count(token) for group, n in zip(words.group.tolist(), words.lengths, strict=True) for token in range(n)
    ]
    for image in range(len(words.group)):
        partners = partners_of(words, image)
        assert all(partner in around(patch, grid) for patch, partner in partners.items())
        assert not set(partners) & set(partners.values())  # who stands for others is kept


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("drop", [0, 0.1, 0.25, 0.4, 0.49])
def test_neighbours_drop_as_a_plain_loop_does(drop, grid):
    features = torch.randn(3, grid[0] * grid[1], 6, generator=seeded(1))
    strategy, count = Neighbours(drop), int(grid[0] * grid[1] * Fraction(str(drop)))
    words = strategy(features, grid)
    check_words(words, grid)
    assert strategy.fixed_count
    assert words.count == grid[0] * grid[1] - count
    assert torch.equal(words.kept, torch.stack([row.nonzero()[:, 0] for row in words.weight]))
    for image in range(3):
        assert partners_of(words, image) in slow_drop(features[image], grid, count)
    kept = torch.cat([image[weight > 0] for image, weight in zip(features, words.weight, strict=True)])
    assert torch.equal(merge(features, words), kept)


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 1.0, 2.0])
def test_neighbours_within_a_threshold_as_a_plain_loop_does(threshold, grid):
    features = torch.randn(4, grid[0] * grid[1], 6, generator=seeded(2))
    strategy = Neighbours(threshold=threshold)
    words = strategy(features, grid)
    check_words(words, grid)
    assert not strategy.fixed_count
    assert words.count is None
    for image in range(4):
        assert partners_of(words, image) == slow_threshold(features[image], grid, threshold)
    kept = torch.cat([image[weight > 0] for image, weight in zip(features, words.weight, strict=True)])
    torch.testing.assert_close(merge(features, words), kept)


def test_a_threshold_drops_all_of_one_colour_at_most():
    features = torch.ones(1, 35, 6)
    assert Neighbours(threshold=0.0)(features, (7, 5)).lengths == (17,)
    assert Neighbours(threshold=2.0)(torch.randn(1, 35, 6, generator=seeded()), (7, 5)).lengths == (17,)


def test_every_patch_takes_the_value_of_what_stands_for_it():
    features = torch.randn(2, 24, 6, generator=seeded())
    for strategy in (Neighbours(0.3), Neighbours(threshold=0.6)):
        words = strategy(features, (4, 6))
        values = unmerge(merge(features, words), words)
        for image in range(2):
            expected = list(range(24))
            for patch, partner in partners_of(words, image).items():
                expected[patch] = partner
            assert torch.equal(values[image], features[image, expected])
            assert expected != list(range(24))


@pytest.mark.parametrize("always", [(3,), (7, 3, 3), tuple(range(0, 24, 5))], ids=repr)
def test_some_patches_stay_always(always):
    features = torch.randn(4, 24, 6, generator=seeded(3))
    free = Neighbours(0.25)(features, (4, 6))
    always = (*always, *(free.weight[0] == 0).nonzero()[:1, 0].tolist())  # one that would go
    words = Neighbours(0.25, always=always)(features, (4, 6))
    check_words(words, (4, 6))
    assert (words.weight[:, list(always)] == 1).all()
    for image in range(4):
        assert partners_of(words, image) in slow_drop(features[image], (4, 6), 6, always)
    words = Neighbours(threshold=0.7, always=always)(features, (4, 6))
    assert [partners_of(words, n) for n in range(4)] == [slow_threshold(f, (4, 6), 0.7, always) for f in features]


@pytest.mark.parametrize("options", [{"drop": 0.3}, {"threshold": 0.6}], ids=repr)
def test_batch_mates_and_their_order_do_not_matter(options):
    features, strategy = torch.randn(4, 35, 6, generator=seeded(4)), Neighbours(**options)
    together = strategy(features, (7, 5))
    for order in ([3, 1, 0, 2], [2], [1, 1]):
        words = strategy(features[order], (7, 5))
        assert torch.equal(words.group, together.group[order])
        assert torch.equal(words.weight, together.weight[order])


def test_one_strategy_serves_any_grid_in_turn():
    strategy = Neighbours(0.25)
    features = torch.randn(2, 24, 6, generator=seeded(5))
    for grid in ((4, 6), (6, 4), (3, 8), (4, 6)):
        words = strategy(features, grid)
        check_words(words, grid)
        assert torch.equal(words.group, Neighbours(0.25)(features, grid).group)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_neighbours_compare_in_float32(dtype):
    features = torch.randn(2, 35, 6, generator=seeded(6)).to(dtype)
    expected = Neighbours(0.3)(features.float(), (7, 5))
    assert torch.equal(Neighbours(0.3)(features, (7, 5)).group, expected.group)


def test_no_neighbours_of_no_images():
    for strategy in (Neighbours(0.3), Neighbours(threshold=0.6)):
        words = strategy(torch.zeros(0, 24, 6), (4, 6))
        assert words.lengths == ()
        assert words.group.shape == (0, 24)


@pytest.mark.parametrize("always", [range(9), (0, 2, 4)], ids=repr)
def test_more_than_one_colour_has(always):
    strategy = Neighbours(0.45, always=always)
    with pytest.raises(ArgumentError, match=rf"drops 4 of 9 patches; {4 - len(always)} can go here; drop fewer"):
        strategy(torch.randn(1, 9, 6, generator=seeded()), (3, 3))


def test_a_patch_that_the_grid_has_not():
    strategy = Neighbours(0.1, always=[3, 24])
    with pytest.raises(ArgumentError, match=r"always is \[3, 24\]; .*4x6 patches"):
        strategy(torch.randn(1, 24, 6, generator=seeded()), (4, 6))
    assert strategy(torch.randn(1, 25, 6, generator=seeded()), (5, 5)).lengths == (23,)


@pytest.mark.parametrize("options", [{}, {"drop": 0.3, "threshold": 0.1}], ids=repr)
def test_neighbours_need_one_rule(options):
    with pytest.raises(ArgumentError, match=r"either drop, .* or threshold"):
        Neighbours(**options)


@pytest.mark.parametrize("drop", [-0.1, 0.5, 1, float("nan")])
def test_neighbours_refuse_a_bad_share(drop):
    with pytest.raises(ArgumentError, match=rf"drop is {drop}; .*\[0, 0.5\)"):
        Neighbours(drop)


@pytest.mark.parametrize("threshold", [-0.1, 2.1, float("nan")])
def test_neighbours_refuse_a_bad_threshold(threshold):
    with pytest.raises(ArgumentError, match=f"threshold is {threshold}"):
        Neighbours(threshold=threshold)


@pytest.mark.parametrize("always", [[-1], [0.5], ["a"]], ids=repr)
def test_neighbours_refuse_what_is_no_index(always):
    with pytest.raises(ArgumentError, match=r"always is .*; expected indices of patches"):
        Neighbours(0.1, always=always)


def test_what_neighbours_are_called():
    assert repr(Neighbours(0.3)) == "Neighbours(drop=0.3)"
    assert repr(Neighbours(threshold=0.3, always=[5, 2])) == "Neighbours(threshold=0.3, always=(2, 5))"
    assert isinstance(Neighbours(0.3), Strategy)
    assert Neighbours(0.3).bind(make_spec()).drop == 0.3


# Random pixels are hardly like each other; what repeats is all alike.
NEIGHBOURS = {"drop": {"drop": 0.3}, "threshold": {"threshold": 0.7}}


@torch.inference_mode()
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_packed_neighbours_equal_each_image_alone(small_vit, name):
    images, fast = make_images(), VWTokenizer(small_vit, Neighbours(**NEIGHBOURS[name]))
    lengths = fast.tokenize(images).lengths
    assert len(set(lengths)) == (1 if name == "drop" else 4), lengths
    together = fast(images)
    alone = torch.cat([fast(image) for image in images.split(1)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert (together - small_vit(images)).abs().max() > 1e-3


@torch.inference_mode()
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_model_on_neighbours_equals_a_plain_one(small_vit, name):
    """Kept tokens, of which others see s as s ** 0.5, and which see themselves once."""
    images, fast = make_images(), VWTokenizer(small_vit, Neighbours(**NEIGHBOURS[name]))
    words, expected = fast.tokenize(images), []
    for image in range(4):
        tokens = small_vit._pos_embed(small_vit.patch_embed(images[image : image + 1]))
        kept = words.weight[image].nonzero()[:, 0]
        sizes = [1.0, *(float((words.group[image] == token).sum()) for token in range(len(kept)))]
        x = small_vit.norm_pre(torch.cat([tokens[:, :1], tokens[:, 1:][:, kept]], dim=1))
        bias = torch.tensor(
            [[0.0 if i == j else 0.5 * math.log(s) for j, s in enumerate(sizes)] for i in range(len(sizes))]
        )
        for block in small_vit.blocks:
            x = block(x, attn_mask=bias)
        sizes_ = torch.tensor(sizes)[1:, None]
        pooled = {"token": x, "avg": (x[:, 1:] * sizes_).sum(1, keepdim=True) / sizes_.sum()}
        expected.append(small_vit.forward_head(small_vit.norm(pooled[small_vit.global_pool])))
    torch.testing.assert_close(fast(images), torch.cat(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_first_without_gradients_and_then_with_them(small_vit, name):
    """What is kept from a call in inference mode serves a later one that is not."""
    images, fast = make_images(), VWTokenizer(small_vit, Neighbours(**NEIGHBOURS[name]))
    with torch.inference_mode():
        expected = fast(images)
    output = fast(images)
    output.square().sum().backward()
    torch.testing.assert_close(output.detach(), expected)
    gradient = small_vit.patch_embed.proj.weight.grad
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
