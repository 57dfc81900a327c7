from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import vwt.codebook.matching
from tests.matrix import matrix
from vwt.codebook.matching import _ROUNDING, WordIndex, check_threshold, nearest_words, within
from vwt.errors import ArgumentError

# Unit vectors of four dimensions whose cosines are multiples of 1/4: floats hold them exactly, and ties abound.
UNITS = [*torch.eye(4).tolist(), *(-torch.eye(4)).tolist(), *(torch.tensor([*product((-0.5, 0.5), repeat=4)]).tolist())]
units = st.sampled_from(UNITS)
scales = st.sampled_from([0.0, 0.25, 1.0, 64.0])
patches = st.lists(st.tuples(scales, units).map(lambda pair: [pair[0] * x for x in pair[1]]), max_size=12)
vocabularies = st.lists(units, min_size=1, max_size=12)
thresholds = st.integers(0, 8).map(lambda quarter: quarter / 4)


def cosine(patch, word):
    dot, length = sum(p * w for p, w in zip(patch, word, strict=True)), sum(p * p for p in patch) ** 0.5
    return dot / length if length else 0.0


def match(features, words, threshold):
    return WordIndex(words)(features, threshold)


def slow_match(features, words, threshold):
    """What the docstring of `WordIndex.forward` says, one patch and one word at a time."""
    result = []
    for patch in features:
        best, distance = -1, threshold
        for index, word in enumerate(words):
            if 1 - cosine(patch, word) <= distance and (best < 0 or 1 - cosine(patch, word) < distance):
                best, distance = index, 1 - cosine(patch, word)
        result.append(best)
    return result


def tensor(rows):
    return torch.tensor(rows).view(len(rows), 4)


@given(patches, vocabularies, thresholds)
def test_match_equals_a_loop(features, words, threshold):
    ids = match(tensor(features), tensor(words), threshold)
    assert ids.dtype == torch.int64
    assert ids.tolist() == slow_match(features, words, threshold)


@given(patches, vocabularies, st.integers(1, 50))
def test_blocks_do_not_matter(features, words, block):
    whole = nearest_words(tensor(features), tensor(words))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vwt.codebook.matching, "_BLOCK", block)
        parts = nearest_words(tensor(features), tensor(words))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_dtype(dtype):
    words = tensor(UNITS)
    similarity, index = nearest_words(8 * words.to(dtype), words)
    assert similarity.dtype == torch.float32
    assert index.tolist() == list(range(len(UNITS)))


def test_leading_dimensions_are_kept():
    features = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    similarity, index = nearest_words(features, tensor(UNITS))
    assert similarity.shape == index.shape == (2, 3, 5)
    assert torch.equal(index[1, 2], nearest_words(features[1, 2], tensor(UNITS))[1])


@pytest.mark.parametrize("shape", [(0, 4), (0, 9, 4), (2, 0, 4)])
def test_no_patches(shape):
    similarity, index = nearest_words(torch.zeros(shape), tensor(UNITS))
    assert (similarity.shape, similarity.dtype) == (shape[:-1], torch.float32)
    assert (index.shape, index.dtype) == (shape[:-1], torch.int64)


def test_ties_go_to_the_lower_id():
    word = tensor(UNITS[8:9])
    assert match(word, word.repeat(100, 1), 0.0).tolist() == [0]


def test_the_threshold_is_inclusive():
    patch, word = tensor([[1.0, 0.0, 0.0, 0.0]]), tensor([[0.5, 0.5, 0.5, 0.5]])
    assert match(patch, word, 0.5).tolist() == [0]
    assert match(patch, word, 0.5 - 1e-3).tolist() == [-1]


def test_a_patch_of_length_zero_is_at_distance_one_from_every_word():
    assert match(torch.zeros(1, 4), tensor(UNITS), 1.0).tolist() == [0]
    assert match(torch.zeros(1, 4), tensor(UNITS), 0.999).tolist() == [-1]


def test_a_patch_of_nan_matches_nothing():
    assert match(torch.full((1, 4), torch.nan), tensor(UNITS), 2.0).tolist() == [-1]


def test_rounding_at_both_ends_of_the_range():
    """A patch that is a word has distance 0, whatever its length; and no patch is farther than 2."""
    words = F.normalize(torch.randn(100, 768, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert match(3 * words, words, 0.0).tolist() == list(range(100))
    assert all(match(-3 * word[None], word[None], 2.0).item() == 0 for word in words)


@pytest.mark.parametrize("threshold", [0, 0.1, 2])
def test_thresholds_in_range(threshold):
    check_threshold(threshold)


@pytest.mark.parametrize("threshold", [-0.01, 2.01, float("inf"), float("nan")])
def test_thresholds_out_of_range(threshold):
    with pytest.raises(ArgumentError, match=rf"threshold is {threshold}; .*\[0, 2\]"):
        check_threshold(threshold)


def test_a_cosine_is_within_a_threshold_up_to_rounding():
    """Of a patch that is a word, a sum of 800 float32 products one after another may say 1 - 2e-6."""
    assert within(torch.tensor([1 - 2e-6, 1 - 1e-4]), 0.0).tolist() == [True, False]


# -- the index, against all pairs in float64 ---------------------------------------------------------------------------


def assert_nearest(ids, features, words, threshold):
    """The ids are those of the nearest words within the threshold, as far as float32 can tell.

    Where all pairs are compared, sums of float32 products are in the order that the processor's library has them in:
    added one after another, those of seed 39, nearly equal words, name one that is farther by 1.2e-6.
    """
    cosines = F.normalize(features.float(), dim=-1).double() @ F.normalize(words, dim=-1).double().mT
    best, limit = cosines.amax(-1), 1 - threshold
    assert (ids[best > limit + 2 * _ROUNDING] >= 0).all()
    assert (ids[best < limit - 2 * _ROUNDING] == -1).all()
    found = ids >= 0
    assert (cosines[found].gather(1, ids[found, None])[:, 0] > best[found] - _ROUNDING).all()


def make_words(kind, count, width, seed=0):
    """Words as hard to tell apart as they get."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randn(count, width, generator=generator)
    common = torch.randn(1, width, generator=generator)
    if kind == "in a narrow cone":
        words = common + 0.05 * words
    if kind == "nearly equal":
        words = common + 1e-3 * words
    if kind == "in few directions":
        words = words[:, :5] @ torch.randn(5, width, generator=generator)
    if kind == "with twins":
        words[3 * count // 4 :] = words[: count - 3 * count // 4]
    if kind == "of falling variance":  # as patches have it
        words = words * torch.arange(1, width + 1) ** -1.0 + 0.1 * common
    return words


KINDS = ["scattered", "in a narrow cone", "nearly equal", "in few directions", "with twins", "of falling variance"]


@pytest.mark.parametrize(
    ("kind", "width", "bfloat16"),
    matrix(
        product(KINDS, [192, 300], [True, False]),
        *((kind, 192, False) for kind in KINDS),
        ("in a narrow cone", 192, True),
        ("nearly equal", 300, False),
        ("of falling variance", 300, True),
    ),
)
def test_index_equals_all_pairs(kind, width, bfloat16, monkeypatch):
    monkeypatch.setattr("vwt.codebook.matching._bfloat16_is_faster", lambda: bfloat16)
    monkeypatch.setattr("vwt.codebook.matching._FEW_PRODUCTS", 0)
    words = make_words(kind, 700, width)
    index = WordIndex(words)
    assert index.sketched
    noise = torch.randn(700, width, generator=torch.Generator().manual_seed(1)) * words.std()
    strength = torch.linspace(0, 0.7, 700)[:, None]
    features = 3 * torch.cat([words + strength * noise, -words[:9], noise[:9], torch.zeros(2, width)])
    for threshold in (0.0, 0.03, 0.1, 0.3, 0.5, 1.0, 2.0):
        assert_nearest(index(features, threshold), features, words, threshold)


@pytest.mark.slow
@given(st.integers(0, 10_000), st.sampled_from(KINDS), st.floats(0, 0.5), st.floats(0, 1))
def test_index_equals_all_pairs_whatever_the_patches(seed, kind, threshold, strength):
    words = make_words(kind, 500, 800, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    chosen = torch.randint(500, (30,), generator=generator)
    features = words[chosen] + strength * words.std() * torch.randn(30, 800, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vwt.codebook.matching._FEW_PRODUCTS", 0)
        assert_nearest(WordIndex(words)(features, threshold), features, words, threshold)


def test_index_in_blocks_of_patches(monkeypatch):
    monkeypatch.setattr("vwt.codebook.matching._FEW_PRODUCTS", 0)
    words = make_words("of falling variance", 700, 300)
    features = words + 0.01 * words.flip(0)
    whole = WordIndex(words)(features.view(7, 100, 300), 0.2)
    monkeypatch.setattr("vwt.codebook.matching._BLOCK", 3000)  # 4 patches, or 10 pairs, at once
    assert torch.equal(WordIndex(words)(features.view(7, 100, 300), 0.2), whole)


def test_index_of_equal_words_and_of_one():
    for count in (1, 500, 1000):
        words = make_words("scattered", 1, 192).repeat(count, 1)
        index = WordIndex(words)
        assert len(index.directions) == 1
        features = torch.cat([words[:3] * 5, -words[:3]])
        assert index(features, 0.1).tolist() == [0] * len(words[:3]) + [-1] * len(words[:3])


def test_twins_have_the_lower_id():
    words = make_words("scattered", 900, 192)
    words[300], words[800] = words[17], words[20]
    index = WordIndex(words)
    assert len(index.directions) == 898
    assert index(words, 0.1).tolist() == [{300: 17, 800: 20}.get(word, word) for word in range(900)]


@pytest.mark.parametrize("few", [0, 10**15], ids=["sketched", "all pairs"])
def test_index_of_patches_that_are_no_numbers(few, monkeypatch):
    monkeypatch.setattr("vwt.codebook.matching._FEW_PRODUCTS", few)
    words = make_words("of falling variance", 700, 300)
    features = words[:4].clone()
    features[1, 7], features[2, 0] = torch.nan, torch.inf
    assert WordIndex(words)(features, 0.1).tolist() == [0, -1, -1, 3]


def test_most_pairs_are_ruled_out(monkeypatch):
    """What makes it fast: few pairs are compared in full."""
    monkeypatch.setattr("vwt.codebook.matching._FEW_PRODUCTS", 0)
    pairs = []
    settle = WordIndex._settle
    monkeypatch.setattr(
        WordIndex,
        "_settle",
        lambda self, patches, owner, *rest: pairs.append(len(owner)) or settle(self, patches, owner, *rest),
    )
    for width in (192, 300):
        words = make_words("of falling variance", 2000, width)
        WordIndex(words)(words[:100] + 0.1 * words[100:200], 0.1)
    assert max(pairs) < 100 * 2000 / 50


@pytest.mark.parametrize("few", [0, 10**15], ids=["sketched", "all pairs"])
def test_autocast_does_not_reach_the_index(few, monkeypatch):
    monkeypatch.setattr("vwt.codebook.matching._FEW_PRODUCTS", few)
    words = make_words("of falling variance", 700, 300)
    features = (words + torch.linspace(0, 0.5, 700)[:, None] * words.flip(0)).requires_grad_()
    ids = WordIndex(words)(features, 0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(WordIndex(words)(features, 0.01), ids)
    assert 0 < (ids >= 0).sum() < 700


@pytest.mark.parametrize("few", [0, 10**15], ids=["sketched", "all pairs"])
@pytest.mark.parametrize("shape", [(0, 300), (0, 9, 300), (2, 0, 300)])
def test_index_of_no_patches(shape, few, monkeypatch):
    monkeypatch.setattr("vwt.codebook.matching._FEW_PRODUCTS", few)
    ids = WordIndex(make_words("scattered", 700, 300))(torch.zeros(shape), 0.1)
    assert (ids.shape, ids.dtype) == (shape[:-1], torch.int64)
