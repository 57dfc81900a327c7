from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.matrix import matrix
from tests.reductions.cases import CLOSE, KINDS, as_sizes, random, sequences
from vwt.reductions.absorb import absorb
from vwt.reductions.merge import match
from vwt.reductions.prune import prune


@pytest.mark.parametrize("kind", KINDS)
@given(sequences(), st.data())
def test_totals_are_conserved(kind, sequence, data):
    batch, prefix, patches, sizes, _ = sequence
    tokens, removed = random(batch, prefix + patches, 3), data.draw(st.integers(0, max(0, KINDS[kind].most(patches))))
    assignment = assign(kind, random(batch, patches, 3, seed=1), removed, prefix)
    fewer, total = assignment.apply(tokens, as_sizes(sizes))
    size = torch.ones(batch, prefix + patches) if sizes is None else as_sizes(sizes)
    assert fewer.shape == (batch, prefix + patches - removed, 3)
    assert torch.equal(total.sum(1), size.sum(1))
    if kind != "absorb":  # which has what is kept twice in the mean
        torch.testing.assert_close((fewer * total[..., None]).sum(1), (tokens * size[..., None]).sum(1), **CLOSE)
    assert [sorted(set(image)) for image in assignment.target.tolist()] == [list(range(patches - removed))] * batch


def assign(kind, metric, removed, prefix):
    if kind == "prune":
        return prune(metric[..., 0], removed, prefix)
    if kind == "merge":
        return match(metric, removed, prefix)
    return absorb(metric[..., 0].exp(), metric, removed, prefix, 0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sized", "dtype"), matrix(product([True, False], [torch.float16, torch.bfloat16]), (True, torch.float16))
)
def test_means_in_half_precision_are_summed_in_float32(kind, sized, dtype):
    tokens = random(2, 4002, 3, dtype=torch.float32).to(dtype) + 1
    sizes = torch.full((2, 4002), 3.0) if sized else None
    metric = torch.ones(2, 4001, 3)
    assignment = assign(kind, metric, 2000, 1)
    fewer, total = assignment.apply(tokens, sizes)
    assert fewer.dtype == dtype
    assert total.dtype == torch.float32
    expected, same = assignment.apply(tokens.double(), sizes)
    torch.testing.assert_close(fewer.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    assert torch.equal(total, same)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sized", [True, False])
def test_the_gradient_flows_through_plans(kind, sized):
    assignment = assign(kind, random(2, 7, 3), 3, 2)
    sizes = torch.arange(1, 19, dtype=torch.float64).view(2, 9) if sized else None
    tokens = random(2, 9, 2, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: assignment.apply(t, sizes)[0], tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_assignments_of_an_image_do_not_depend_on_its_batch_mates(kind):
    metric, tokens = random(4, 20, 3), random(4, 22, 5, seed=1)
    together = assign(kind, metric, 7, 2)
    for image in range(4):
        alone = assign(kind, metric[image : image + 1], 7, 2)
        assert torch.equal(together.target[image : image + 1], alone.target)
        values = together.apply(tokens, None)[0][image : image + 1]
        assert torch.equal(values, alone.apply(tokens[image : image + 1], None)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patches", [1, 2, 7])
def test_removing_nothing_of_an_image_changes_nothing_of_it(kind, patches):
    """As happens to an image of a ragged batch that has too few tokens: only their order may change."""
    tokens, sizes = random(1, 1 + patches, 3), torch.arange(1.0, 2 + patches)[None]
    key_size = sizes.flip(1)
    assignment = assign(kind, random(1, patches, 3, seed=1), 0, 1)
    fewer, total = assignment.apply(tokens, sizes)
    back = assignment.target[0] + 1
    torch.testing.assert_close(fewer[0, back], tokens[0, 1:])
    torch.testing.assert_close(total[0, back], sizes[0, 1:])
    expected = 1 + 0.8 * (sizes - 1) if kind == "absorb" else key_size  # by what they stand for
    torch.testing.assert_close(KINDS[kind].key_size(assignment, key_size, sizes, total, 0.5)[0, back], expected[0, 1:])
