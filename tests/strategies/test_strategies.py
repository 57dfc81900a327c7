import copy
import math
import statistics
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from tests.matrix import matrix
from tests.test_tokenizer import make_images
from vwt.codebook.codebook import Codebook
from vwt.errors import ArgumentError, MismatchError
from vwt.models.spec import PatchSpec
from vwt.strategies.inter_image import InterImage
from vwt.strategies.intra_image import IntraImage
from vwt.strategies.neighbours import Neighbours
from vwt.strategies.strategy import Strategy
from vwt.tokenizer import VWTokenizer
from vwt.tokens.patches import patchify, unpatchify
from vwt.tokens.words import merge, unmerge

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


@pytest.mark.parametrize("words", matrix([1, 3, 8, 40, 200], 3, 8, 40), ids="K={}".format)
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
TIMES = Neighbours.times  # that what stands for others counts in the mean with them


def around(patch, grid):
    """The direct neighbours of a patch."""
    row, column = divmod(patch, grid[1])
    places = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    return [r * grid[1] + c for r, c in places if 0 <= r < grid[0] and 0 <= c < grid[1]]


def corners(grid):
    """They always stay."""
    last, columns = grid[0] * grid[1] - 1, grid[1]
    return {0, columns - 1, last - (columns - 1), last}


def most_that_go(grid, always=()):
    """Of either colour."""
    may = [sum(divmod(n, grid[1])) % 2 for n in range(grid[0] * grid[1]) if n not in {*always, *corners(grid)}]
    return min(may.count(0), may.count(1))


def slow_likeness(features, grid, always):
    """For each patch of one image that may go, by colour: its likest neighbour, and how alike."""
    colours, stays = ({}, {}), {*always, *corners(grid)}
    for patch in range(len(features)):
        likeness = [
            (float(F.cosine_similarity(features[patch].double(), features[other].double(), dim=0)), other)
            for other in around(patch, grid)
        ]
        if patch not in stays:
            colours[sum(divmod(patch, grid[1])) % 2][patch] = max(likeness)
    return colours


def slow_drop(features, grid, count, always=()):
    """What stands for each dropped patch, for the colour, or both where they are equal, that is more alike."""
    choices = []
    for colour in slow_likeness(features, grid, always):
        gone = sorted(colour, key=lambda patch: -colour[patch][0])[:count]
        alike = sum(likeness for likeness, _ in colour.values()) / max(len(colour), 1)
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


def kept_of(words, image):
    """The patches that make most of their tokens."""
    return [patch for patch, weight in enumerate(words.weight[image].tolist()) if weight > 0.5]


def partners_of(words, image):
    """What stands for each patch that is not kept."""
    kept = kept_of(words, image)
    group = words.group[image].tolist()
    assert [group[patch] for patch in kept] == list(range(len(kept)))  # tokens in row-major order
    return {patch: kept[token] for patch, token in enumerate(group) if patch not in kept}


def slow_weights(partners, patches):
    """The share of each patch of one image in its token, in whose mean what is kept counts several times."""
    stands_for = [partners.get(patch, patch) for patch in range(patches)]
    counts = [TIMES if patch == kept else 1.0 for patch, kept in enumerate(stands_for)]
    whole = [sum(counts[other] for other in range(patches) if stands_for[other] == kept) for kept in stands_for]
    return [count / all_counts for count, all_counts in zip(counts, whole, strict=True)]


def slow_merge(features, words, image):
    """The tokens (n, D) float64 of one image: each what stands for others, and a little of these."""
    partners = partners_of(words, image)
    share = slow_weights(partners, len(features))
    tokens = []
    for kept in (patch for patch in range(len(features)) if patch not in partners):
        members = [kept, *(patch for patch, partner in partners.items() if partner == kept)]
        tokens.append(sum(share[patch] * features[patch].double() for patch in members))
    return torch.stack(tokens)


def check_words(words, grid):
    """What holds for every image, however many go."""
    patches = grid[0] * grid[1]
    assert words.weight.dtype == torch.float32
    assert words.grid == grid
    assert words.lengths == tuple(words.counts.tolist())
    assert list(words.lengths) == [len(kept_of(words, image)) for image in range(len(words.group))]
    expected = [slow_weights(partners_of(words, image), patches) for image in range(len(words.group))]
    torch.testing.assert_close(words.weight, torch.tensor(expected), atol=1e-7, rtol=1e-6)
    assert words.sizes.sum().item() == patches * len(words.group)
    assert words.sizes.tolist() == [
        group.count(token) for group, n in zip(words.group.tolist(), words.lengths, strict=True) for token in range(n)
    ]
    for image in range(len(words.group)):
        partners = partners_of(words, image)
        assert all(partner in around(patch, grid) for patch, partner in partners.items())
        assert not set(partners) & set(partners.values())  # who stands for others is kept
        assert not set(partners) & corners(grid)


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("drop", [0, 0.1, 0.25, 0.4, 0.49])
def test_neighbours_drop_as_a_plain_loop_does(drop, grid):
    features = torch.randn(3, grid[0] * grid[1], 6, generator=seeded(1))
    strategy, count = Neighbours(drop), int(grid[0] * grid[1] * Fraction(str(drop)))
    if count > most_that_go(grid):
        with pytest.raises(ArgumentError, match=rf"drops {count} of .* patches; {most_that_go(grid)} can go here"):
            strategy(features, grid)
        return
    words = strategy(features, grid)
    check_words(words, grid)
    assert strategy.fixed_count
    assert words.count == grid[0] * grid[1] - count
    assert words.kept.tolist() == [kept_of(words, image) for image in range(3)]
    for image in range(3):
        assert partners_of(words, image) in slow_drop(features[image], grid, count)


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


BOTH = [{"drop": 0.3}, {"threshold": 0.6}]
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("options", BOTH, ids=repr)
def test_what_stands_for_others_takes_a_little_of_them(options, batch, dtype):
    features = torch.randn(batch, 35, 6, generator=seeded()).to(dtype)
    words = Neighbours(**options)(features, (7, 5))
    merged = merge(features, words)
    assert merged.dtype == dtype
    expected = torch.cat([slow_merge(image, words, number) for number, image in enumerate(features)])
    assert len(expected) < batch * 35
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(merged.double(), expected, atol=tolerance, rtol=tolerance)
    alone = (words.sizes == 1).nonzero()[:, 0]
    kept = torch.cat([image[kept_of(words, number)] for number, image in enumerate(features)])
    assert len(alone)
    assert torch.equal(merged[alone], kept[alone])  # what stands for none is as it was


def test_a_group_in_every_size():
    """What is like 1 to 4 neighbours, and unlike all others, stands for them, in one way and the other."""
    grid, centre, basis = (9, 9), 4 * 9 + 4, torch.eye(81)
    for size in range(2, 6):
        features = basis.clone()[None]
        members = [centre, *around(centre, grid)[: size - 1]]
        features[0, members] = basis[centre] + 0.01 * basis[members]
        words = [strategy(features, grid) for strategy in (Neighbours((size - 0.9) / 81), Neighbours(threshold=0.1))]
        if size > 2:  # of two, either may stand for the other
            assert all(words_.weight[0, centre] > 0.5 for words_ in words)
        for words_ in words:
            shares = sorted(words_.weight[0, members].tolist())
            torch.testing.assert_close(shares, [1 / (TIMES + size - 1)] * (size - 1) + [TIMES / (TIMES + size - 1)])
            token = words_.group[0, centre]
            assert (words_.group[0] == token).nonzero()[:, 0].tolist() == sorted(members)
            assert words_.sizes[token] == size
            assert sorted(words_.sizes.tolist())[:-1] == [1.0] * (81 - size)
        assert torch.equal(words[0].group, words[1].group)
        torch.testing.assert_close(words[0].weight, words[1].weight)


@pytest.mark.parametrize("options", [{"drop": 0.0}, {"threshold": 0.0}], ids=repr)
def test_where_none_goes_all_stay_as_they_are(options):
    features = torch.randn(3, 24, 6, generator=seeded())
    words = Neighbours(**options)(features, (4, 6))
    assert words.group.tolist() == [list(range(24))] * 3
    assert words.weight.tolist() == [[1.0] * 24] * 3
    assert torch.equal(merge(features, words), features.flatten(0, 1))


def test_of_either_colour_only_what_may_go_is_compared():
    """On a grid with odd sides all corners are of one colour, which is no less alike for that."""
    features = torch.ones(1, 9, 2)
    features[0, 7, 0] = 2.0
    words = Neighbours(0.12)(features, (3, 3))
    assert partners_of(words, 0).keys() == {4}  # the middle is like three others; of the four around it, one is less so


def test_a_threshold_drops_all_of_one_colour_at_most():
    features = torch.ones(1, 35, 6)  # of the 18 of the first colour, 4 are corners
    assert Neighbours(threshold=0.0)(features, (7, 5)).lengths == (18,)
    assert Neighbours(threshold=2.0)(torch.randn(1, 35, 6, generator=seeded()), (7, 5)).lengths == (18,)


def test_every_patch_takes_the_value_of_what_stands_for_it():
    features = torch.randn(2, 24, 6, generator=seeded())
    for options in BOTH:
        words = Neighbours(**options)(features, (4, 6))
        merged = merge(features, words)
        values = unmerge(merged, words)
        for image, tokens in enumerate(merged.split(words.lengths)):
            kept, partners = kept_of(words, image), partners_of(words, image)
            assert partners
            for patch in range(24):
                assert torch.equal(values[image, patch], tokens[kept.index(partners.get(patch, patch))])


@pytest.mark.parametrize("always", [(3,), (7, 3, 3), tuple(range(0, 24, 5))], ids=repr)
def test_some_patches_stay_always(always):
    features = torch.randn(4, 24, 6, generator=seeded(3))
    free = Neighbours(0.25)(features, (4, 6))
    always = (*always, next(iter(partners_of(free, 0))))  # one that would go
    words = Neighbours(0.25, always=always)(features, (4, 6))
    check_words(words, (4, 6))
    assert all(set(always) <= set(kept_of(words, image)) for image in range(4))
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


def test_neighbours_are_the_same_under_autocast():
    features = torch.randn(4, 35, 16, generator=seeded(7))
    for strategy in (Neighbours(0.3), Neighbours(threshold=0.7)):
        expected = strategy(features, (7, 5))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(strategy(features, (7, 5)).group, expected.group)


def test_no_neighbours_of_no_images():
    for strategy in (Neighbours(0.3), Neighbours(threshold=0.6)):
        words = strategy(torch.zeros(0, 24, 6), (4, 6))
        assert words.lengths == ()
        assert words.group.shape == (0, 24)


@pytest.mark.parametrize(
    ("drop", "always", "most"), [(0.45, range(9), 0), (0.45, (0, 2, 4), 0), (0.45, (), 1), (0.2, (1, 3, 5, 7), 0)]
)
def test_more_than_one_colour_has(drop, always, most):
    """But for its corners, a grid of 3 x 3 has one patch of the first colour, and four of the other."""
    strategy = Neighbours(drop, always=always)
    with pytest.raises(ArgumentError, match=rf"drops {int(9 * drop)} of 9 patches; {most} can go here; drop fewer"):
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
    """Tokens with a little of those they stand for, of which others see s as s ** 0.5, and which see themselves."""
    images, fast = make_images(), VWTokenizer(small_vit, Neighbours(**NEIGHBOURS[name]))
    words, expected = fast.tokenize(images), []
    for image in range(4):
        tokens = small_vit._pos_embed(small_vit.patch_embed(images[image : image + 1]))
        kept = slow_merge(tokens[0, 1:], words, image).to(tokens)[None]
        sizes = [1.0, *(float((words.group[image] == token).sum()) for token in range(kept.shape[1]))]
        x = small_vit.norm_pre(torch.cat([tokens[:, :1], kept], dim=1))
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


def test_neighbours_forgets_boards_of_many_sizes_of_images():
    strategy = Neighbours(0.25)
    for rows in range(2, 100):
        features = torch.randn(1, 4 * rows, 8, generator=torch.Generator().manual_seed(rows))
        assert strategy(features, (rows, 4)).count == 4 * rows - rows
        assert len(strategy._boards) <= 32
    assert torch.equal(strategy(features, (99, 4)).group, Neighbours(0.25)(features, (99, 4)).group)
