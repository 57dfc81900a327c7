"""Hidden states of a tower on fewer tokens."""

import pytest

from vwt import Absorb, Merge
from vwt.errors import ArgumentError
from vwt.models.layers import blocks_read, join_reductions


def test_blocks_that_are_read():
    assert blocks_read(None, 12) == [12]
    assert blocks_read([-2, 0, 12, -1, -13], 12) == [11, 0, 12, 12, 0]
    with pytest.raises(ArgumentError, match=r"vision_feature_layer is \[13\]; expected numbers from -13 to 12"):
        blocks_read([13], 12)


def test_reductions_of_what_is_read():
    assert join_reductions({0: Merge(2)}, None, 3) == {0: Merge(2)}
    assert join_reductions({0: Merge(2)}, Absorb(0.5), 3) == {0: Merge(2), 2: Absorb(0.5)}
    for reductions, after, blocks in (({3: Merge(2)}, None, 3), ({2: Merge(2)}, Absorb(0.5), 3), ({}, Absorb(1), 0)):
        with pytest.raises(ArgumentError):
            join_reductions(reductions, after, blocks)
