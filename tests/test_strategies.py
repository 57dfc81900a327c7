import copy
import statistics
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from vwt.codebook import Codebook
from vwt.errors import ArgumentError, MismatchError
from vwt.patches import PatchSpec, patchify, unpatchify
from vwt.strategies import InterImage, IntraImage, Strategy
from vwt.words import merge

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
