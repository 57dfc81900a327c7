from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import vwt.matching
from vwt.errors import ArgumentError
from vwt.matching import check_threshold, match, nearest_words

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


def slow_match(features, words, threshold):
    """What the docstring of `match` says, one patch and one word at a time."""
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
        patch.setattr(vwt.matching, "_BLOCK", block)
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
