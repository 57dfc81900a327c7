import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reductions.cases import CLOSE, check_assignment, random, sequences
from tests.reductions.loops import slow_importance, slow_prune
from vwt import Prune
from vwt.reductions.prune import importance, prune
from vwt.tokens.attention import attend_explicitly


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_importance_equals_a_loop(heads, prefix):
    query, key, value = (random(3, heads, prefix + 7, 4, seed=seed) for seed in range(3))
    scores = importance(query, key, value, prefix)
    assert scores.shape == (3, 7)
    expected = [slow_importance(*image, prefix) for image in zip(query, key, value, strict=True)]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_importance_where_attention_counts_tokens_more_than_once():
    query, key, value = (random(2, 3, 9, 4, seed=seed) for seed in range(3))
    bias = torch.randint(1, 9, (9,), generator=torch.Generator().manual_seed(3)).log()
    _, weights = attend_explicitly(query, key, value, attn_mask=bias[None, None, None])
    expected = [slow_importance(*image, 2, bias.tolist()) for image in zip(query, key, value, strict=True)]
    scores = importance(query, key, value, 2, weights)
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-6, rtol=1e-6)
    assert (scores - importance(query, key, value, 2)).abs().max() > 1e-2


def test_the_scores_of_an_image_are_its_own():
    """Neither its batch mates nor their scale matters: the largest attention is the image's own."""
    query, key, value = (random(4, 2, 11, 8, seed=seed) for seed in range(3))
    alone = torch.cat([importance(query[i : i + 1], key[i : i + 1], value[i : i + 1], 1) for i in range(4)])
    scores = importance(query, key, value, 1)
    torch.testing.assert_close(scores, alone, **CLOSE)
    query[1:] *= 30
    value[1:] *= 30
    torch.testing.assert_close(importance(query, key, value, 1)[0], alone[0], **CLOSE)
    assert (importance(query, key, value, 1)[1:] - alone[1:]).abs().max() > 1e-2


def test_the_largest_attention_of_each_image_is_one():
    query, key = random(4, 2, 11, 8), random(4, 2, 11, 8, seed=1)
    scores = importance(query, key, torch.zeros(4, 2, 11, 8), 1)
    torch.testing.assert_close(scores.amax(1), torch.full((4,), 1 + 1 / 11))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_importance_in_half_precision_is_summed_in_float32(dtype):
    """A sum of 4096 equal weights in half precision would stop growing."""
    query, key, value = (torch.zeros(1, 1, 4097, 1, dtype=dtype) for _ in range(3))
    value[0, 0, 1:, 0] = 1
    scores = importance(query, key, value, 1)
    assert scores.dtype == torch.float32
    share = math.e / (1 + 4096 * math.e)
    torch.testing.assert_close(scores, torch.full((1, 4096), 1 + share), atol=1e-7, rtol=1e-7)


@given(sequences(), st.data())
def test_pruning_equals_a_loop(sequence, data):
    batch, prefix, patches, *_ = sequence
    row = st.lists(st.integers(0, 4), min_size=patches, max_size=patches)  # equal scores: the first are kept
    scores = data.draw(st.lists(row, min_size=batch, max_size=batch))
    removed = data.draw(st.integers(1 if patches > 2 else 0, max(0, Prune.most(patches))))
    assignment = prune(torch.tensor(scores, dtype=torch.float32), removed, prefix)
    groups = [slow_prune(image, removed) for image in scores]
    check_assignment(assignment, groups, sequence, Prune)
