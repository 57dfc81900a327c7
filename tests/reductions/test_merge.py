import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reductions.cases import check_assignment, random, sequences
from tests.reductions.loops import slow_merge
from vwt import Merge
from vwt.reductions.merge import match

# Along the axes, where cosines are exact and ties are many; and nowhere.
DIRECTIONS = [[0, 0, 0], [2, 0, 0], [-1, 0, 0], [0, 3, 0], [0, -1, 0], [0, 0, 1], [0, 0, -2]]


@given(sequences(), st.data())
def test_merging_equals_a_loop(sequence, data):
    batch, prefix, patches, *_ = sequence
    row = st.lists(st.sampled_from(DIRECTIONS), min_size=patches, max_size=patches)
    metric = data.draw(st.lists(row, min_size=batch, max_size=batch))
    removed = data.draw(st.integers(min(1, patches // 2), patches // 2))
    assignment = match(torch.tensor(metric, dtype=torch.float32), removed, prefix)
    check_assignment(assignment, [slow_merge(image, removed) for image in metric], sequence, Merge)


@given(st.integers(1, 30), st.data())
def test_merging_by_any_cosines_equals_a_loop(patches, data):
    removed = data.draw(st.integers(0, patches // 2))
    metric = random(2, patches, 5, seed=patches, dtype=torch.float64)
    assignment = match(metric, removed, 1)
    groups = [slow_merge(image, removed) for image in metric.tolist()]
    check_assignment(assignment, groups, (2, 1, patches, None, None), Merge)
