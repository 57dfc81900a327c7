import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vwt.codebook import sampling
from vwt.codebook.sampling import HIGHEST, hash_limit, lowest, patch_hashes


def test_example():
    assert doctest.testmod(sampling).failed == 0


def test_seed_key_and_place_decide_the_hash():
    some = patch_hashes(0, "a.jpg", 100)
    assert (some == patch_hashes(0, "a.jpg", 200)[:100]).all()
    assert len(np.unique(np.concatenate([some, patch_hashes(1, "a.jpg", 100), patch_hashes(0, "b.jpg", 100)]))) == 300


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 20), st.randoms())
def test_lowest_of_parts_are_the_lowest_of_all_in_any_order(hashes, size, random):
    """Also where hashes are equal."""
    items = [(value, number) for number, value in enumerate(hashes)]
    random.shuffle(items)
    cut = random.randint(0, len(items))

    def take(items):
        values = np.array([value for value, _ in items], np.uint64)
        return [items[place] for place in lowest(values, np.array([number for _, number in items], np.int64), size)]

    assert take(take(items[:cut]) + take(items[cut:])) == sorted(items)[:size]


def test_every_patch_is_sampled_equally_often():
    images, patches, size, trials = 5, 8, 10, 2000
    taken = np.zeros(images * patches)
    for seed in range(trials):
        hashes = np.concatenate([patch_hashes(seed, str(image), patches) for image in range(images)])
        taken[lowest(hashes, np.arange(len(hashes)), size)] += 1
    share = size / len(taken)
    assert abs(taken / trials - share).max() < 5 * np.sqrt(share * (1 - share) / trials)


@pytest.mark.parametrize("size", [10, 1000, 20000])
def test_limit_is_above_the_lowest_and_not_far(size):
    hashes = np.sort(np.concatenate([patch_hashes(3, str(image), 196) for image in range(500)]))
    limit = hash_limit(size, len(hashes))
    below = np.searchsorted(hashes, np.uint64(limit))
    assert size <= below <= size + 12 * np.sqrt(size)
    assert hash_limit(size, len(hashes), readable=0.5) == pytest.approx(2 * limit)


@pytest.mark.parametrize(("size", "patches"), [(10, 0), (10, 10), (100, 150)])
def test_no_limit_where_all_may_be_needed(size, patches):
    assert hash_limit(size, patches) == HIGHEST
