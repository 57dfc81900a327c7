import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vwt.tokens.words import KeptPatches, fill, group_words, keep_patches, merge, regroup, unmerge

ROWS, COLUMNS, LABELS = 3, 4, 5
PATCHES = ROWS * COLUMNS
label = st.integers(-1, LABELS - 1)
batches = st.lists(st.lists(label, min_size=PATCHES, max_size=PATCHES), min_size=1, max_size=4)
kept_batches = st.integers(1, PATCHES).flatmap(
    lambda n: st.lists(st.sets(st.integers(0, PATCHES - 1), min_size=n, max_size=n).map(sorted), min_size=1, max_size=4)
)


def grouped(labels):
    return group_words(torch.tensor(labels), LABELS, (ROWS, COLUMNS))


def tokens_of(words, channels=7, dtype=torch.float32):
    batch, patches = words.group.shape
    return torch.randn(batch, patches, channels, dtype=dtype, generator=torch.Generator().manual_seed(0))


def slow_groups(labels):
    """Number the labels of one image in order of first appearance; -1 is new each time."""
    numbers, group = {}, []
    for position, one in enumerate(labels):
        key = ("alone", position) if one < 0 else one
        group.append(numbers.setdefault(key, len(numbers)))
    return group


def slow_merge(tokens, words):
    """Every token of every image, one at a time."""
    merged = []
    for image, group, weight, count in zip(tokens, words.group, words.weight, words.counts.tolist(), strict=True):
        for token in range(count):
            merged.append(sum(weight[n] * image[n] for n in range(len(group)) if group[n] == token))
    return torch.stack(merged)


def slow_fill(group, columns):
    """The nearest kept patch of each patch, the first in row-major order where several are as near."""
    kept = [n for n, token in enumerate(group) if token >= 0]

    def distance(a, b):
        return (a // columns - b // columns) ** 2 + (a % columns - b % columns) ** 2

    return [group[min(kept, key=lambda other: (distance(n, other), other))] for n in range(len(group))]


@given(batches)
def test_groups_equal_a_loop(labels):
    words = grouped(labels)
    expected = [slow_groups(image) for image in labels]
    assert words.group.tolist() == expected
    assert words.lengths == tuple(words.counts.tolist()) == tuple(max(group) + 1 for group in expected)
    assert words.sizes.tolist() == [group.count(n) for group in expected for n in range(max(group) + 1)]
    assert words.grid == (ROWS, COLUMNS)


@given(batches)
def test_weights_sum_to_one_over_each_token(labels):
    words = grouped(labels)
    assert words.weight.dtype == torch.float32
    torch.testing.assert_close(merge(torch.ones(len(labels), PATCHES, 1), words), torch.ones(sum(words.lengths), 1))


@given(batches)
def test_merge_equals_a_loop(labels):
    words = grouped(labels)
    tokens = tokens_of(words)
    torch.testing.assert_close(merge(tokens, words), slow_merge(tokens, words))


@given(batches)
def test_every_patch_takes_the_value_of_its_token(labels):
    words = grouped(labels)
    merged = merge(tokens_of(words), words)
    images = merged.split(words.lengths)
    expected = torch.stack([image[group] for image, group in zip(images, words.group, strict=True)])
    assert torch.equal(unmerge(merged, words), expected)


@given(st.lists(st.permutations(range(PATCHES)), min_size=1, max_size=3), st.integers(0, PATCHES))
def test_unmerge_undoes_merge_where_every_group_has_one_member(permutations, alone):
    labels = torch.tensor(permutations)
    words = group_words(labels.masked_fill(labels < alone, -1), PATCHES, (ROWS, COLUMNS))
    tokens = tokens_of(words)
    assert torch.equal(unmerge(merge(tokens, words), words), tokens)


@given(kept_batches)
def test_kept_patches_are_tokens_as_they_are(kept):
    words = keep_patches(torch.tensor(kept), (ROWS, COLUMNS))
    tokens = tokens_of(words)
    assert torch.equal(merge(tokens, words), torch.cat([image[n] for image, n in zip(tokens, kept, strict=True)]))
    assert words.lengths == tuple(words.counts.tolist()) == (len(kept[0]),) * len(kept)
    assert (words.group < 0).sum().item() == sum(PATCHES - len(image) for image in kept)
    assert torch.equal(words.weight, (words.group >= 0).float())


@given(kept_batches)
def test_dropped_patches_take_the_value_of_the_nearest_kept_one(kept):
    words = keep_patches(torch.tensor(kept), (ROWS, COLUMNS))
    filled = fill(words)
    assert filled.group.tolist() == [slow_fill(group, COLUMNS) for group in words.group.tolist()]
    assert filled.sizes.sum().item() == PATCHES * len(kept)
    merged = merge(tokens_of(words), words)
    assert torch.equal(unmerge(merged, words), unmerge(merged, filled))


@st.composite
def stood_for(draw):
    """Kept patches of some images, and for each patch the kept one that stands for it."""
    kept = draw(kept_batches)
    rows = [[n if n in image else draw(st.sampled_from(image)) for n in range(PATCHES)] for image in kept]
    return kept, rows


def stand_for(kept, rows, times=5.0):
    """KeptPatches of which those in rows stand for each patch."""
    gone = [[n for n in range(PATCHES) if n not in image] for image in kept]
    standing = [[row[n] for n in image] for row, image in zip(rows, gone, strict=True)]
    shape = (len(kept), len(gone[0]))
    tensors = (torch.tensor(values, dtype=torch.int64).view(shape) for values in (gone, standing))
    return KeptPatches(torch.tensor(kept), (ROWS, COLUMNS), *tensors, times)


def slow_weights(kept, rows, times):
    """In the mean of each token the kept patch counts so many times, and each other once."""
    weights = []
    for image, row in zip(kept, rows, strict=True):
        counts = [times if n in image else 1 for n in range(PATCHES)]
        totals = [sum(counts[other] for other in range(PATCHES) if row[other] == row[n]) for n in range(PATCHES)]
        weights.append([count / total for count, total in zip(counts, totals, strict=True)])
    return torch.tensor(weights)


@given(stood_for(), st.sampled_from([1.0, 2.5, 5.0, 8.0]))
def test_dropped_patches_may_be_stood_for(case, times):
    kept, rows = case
    words = stand_for(kept, rows, times)
    tokens = tokens_of(words)
    assert words.group.tolist() == [[image.index(n) for n in row] for image, row in zip(kept, rows, strict=True)]
    assert words.weight.dtype == torch.float32
    torch.testing.assert_close(words.weight, slow_weights(kept, rows, times))
    assert words.lengths == tuple(words.counts.tolist()) == (len(kept[0]),) * len(kept)
    assert words.sizes.tolist() == [row.count(n) for image, row in zip(kept, rows, strict=True) for n in image]
    merged = merge(tokens, words)
    torch.testing.assert_close(merged, slow_merge(tokens, words))
    assert torch.equal(fill(words).group, words.group)
    assert fill(words).sizes.tolist() == words.sizes.tolist()
    images = zip(merged.split(words.lengths), words.group, strict=True)
    assert torch.equal(unmerge(merged, words), torch.stack([image[group] for image, group in images]))


@given(stood_for(), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_what_is_stood_for_is_summed_in_no_less_than_float32(case, dtype):
    words = stand_for(*case)
    tokens = tokens_of(words, dtype=dtype)
    merged, exact = merge(tokens, words), slow_merge(tokens.double(), words)
    assert merged.dtype == dtype
    epsilon = torch.finfo(torch.promote_types(dtype, torch.float32)).eps if dtype.itemsize < 4 else 0
    rounding = torch.finfo(dtype).eps / 2 + 8 * epsilon
    torch.testing.assert_close(merged.double(), exact, rtol=rounding, atol=4e-6)
    assert torch.equal(merge(torch.ones_like(tokens), words), torch.ones_like(merged)) or dtype.itemsize >= 4


def test_the_gradient_flows_to_what_is_stood_for():
    words = stand_for([[0, 5, 7]] * 2, [[0, 0, 5, 5, 0, 5, 7, 7, 7, 7, 7, 0], [0, 5, 5, 5, 5, 5, 7, 7, 7, 7, 7, 7]])
    tokens = tokens_of(words, 2, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: unmerge(merge(t, words), words), tokens)


@given(kept_batches)
def test_sizes_of_what_is_kept_are_one(kept):
    words = keep_patches(torch.tensor(kept), (ROWS, COLUMNS))
    assert words.sizes.dtype == torch.float32
    assert words.sizes.tolist() == [1.0] * sum(words.lengths)


@given(stood_for(), st.data())
def test_regrouping_what_is_stood_for(case, data):
    """A token that is made of others counts the patches that these stood for."""
    kept, stands = case
    words = stand_for(kept, stands)
    check_regrouped(words, data.draw(regroupings(words)))


@st.composite
def regroupings(draw, words):
    """For each image, the new place of each of its tokens; every place is taken."""
    rows = []
    for length in words.lengths:
        count = draw(st.integers(1, length)) if words.count is None or not rows else max(rows[0]) + 1
        every = draw(
            st.permutations(
                [
                    *range(count),
                    *draw(st.lists(st.integers(0, count - 1), min_size=length - count, max_size=length - count)),
                ]
            )
        )
        rows.append(every)
    return rows


def check_regrouped(words, rows):
    counts = tuple(max(row) + 1 for row in rows)
    new = regroup(words, torch.tensor([place for row in rows for place in row]), counts)
    assert new.lengths == counts == tuple(new.counts.tolist())
    assert new.count == (None if words.count is None else counts[0])
    assert new.kept is None
    assert new.grid == words.grid
    expected = [
        [-1 if token < 0 else row[token] for token in group]
        for row, group in zip(rows, words.group.tolist(), strict=True)
    ]
    assert new.group.tolist() == expected
    assert new.sizes.tolist() == [
        group.count(token) for group, count in zip(expected, counts, strict=True) for token in range(count)
    ]
    assert new.weight.dtype == torch.float32
    assert (new.weight[words.group < 0] == 0).all()
    torch.testing.assert_close(merge(torch.ones(len(rows), PATCHES, 1), new), torch.ones(sum(counts), 1))
    # Merging the patches is merging the words, each weighed by its patches.
    tokens = tokens_of(words)
    merged, sizes = merge(tokens, words).split(words.lengths), words.sizes.split(words.lengths)
    means = []
    for row, image, size, count in zip(rows, merged, sizes, counts, strict=True):
        for place in range(count):
            parts = [token for token, where in enumerate(row) if where == place]
            means.append(sum(size[token] * image[token] for token in parts) / sum(size[token] for token in parts))
    torch.testing.assert_close(merge(tokens, new), torch.stack(means))
    return new


@given(batches, st.data())
def test_regrouped_words_equal_a_loop(labels, data):
    words = grouped(labels)
    check_regrouped(words, data.draw(regroupings(words)))


@given(kept_batches, st.data())
def test_regrouped_patches_equal_a_loop(kept, data):
    """Dropped patches stay dropped, and are filled as they would have been before."""
    words = keep_patches(torch.tensor(kept), (ROWS, COLUMNS))
    rows = data.draw(regroupings(words))
    new = check_regrouped(words, rows)
    places = torch.tensor([place for row in rows for place in row])
    assert torch.equal(fill(new).group, regroup(fill(words), places, new.lengths).group)


@given(batches, st.data())
def test_words_may_be_regrouped_again(labels, data):
    words = grouped(labels)
    first = data.draw(regroupings(words))
    once = check_regrouped(words, first)
    second = data.draw(regroupings(once))
    twice = check_regrouped(once, second)
    both = [[after[place] for place in before] for before, after in zip(first, second, strict=True)]
    at_once = check_regrouped(words, both)
    assert torch.equal(twice.group, at_once.group)
    torch.testing.assert_close(twice.weight, at_once.weight)


def test_regrouping_into_the_same_changes_nothing():
    words = grouped([[0, 1, -1] * 4, [2, 2, 0] * 4])
    same = regroup(words, torch.cat([torch.arange(length) for length in words.lengths]), words.lengths)
    assert torch.equal(same.group, words.group)
    torch.testing.assert_close(same.weight, words.weight)


def test_regrouping_no_images():
    words = group_words(torch.zeros(0, PATCHES, dtype=torch.int64), LABELS, (ROWS, COLUMNS))
    new = regroup(words, torch.zeros(0, dtype=torch.int64), ())
    assert new.lengths == ()
    assert new.counts.dtype == torch.int64
    assert new.group.shape == (0, PATCHES)


@given(batches)
def test_batch_mates_do_not_matter(labels):
    words = grouped(labels)
    tokens = tokens_of(words)
    for image, merged in enumerate(merge(tokens, words).split(words.lengths)):
        alone = grouped(labels[image : image + 1])
        assert torch.equal(words.group[image : image + 1], alone.group)
        assert torch.equal(merged, merge(tokens[image : image + 1], alone))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precisions_are_summed_in_float32(dtype):
    words = group_words(torch.zeros(1, 10_000, dtype=torch.int64), 1, (100, 100))
    tokens = tokens_of(words, dtype=dtype) + 1
    merged = merge(tokens, words)
    assert merged.dtype == dtype
    assert torch.equal(merged, merge(tokens.float(), words).to(dtype))
    assert unmerge(merged, words).dtype == dtype


def test_the_gradient_flows():
    words = grouped([[0, 1, -1] * 4, [2, 2, 0] * 4])
    tokens = tokens_of(words, 2, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: unmerge(merge(t, words), words), tokens)


def test_the_same_twice():
    labels = torch.randint(-1, 50, (4, 400), generator=torch.Generator().manual_seed(0))
    first, second = (group_words(labels, 50, (20, 20)) for _ in range(2))
    tokens = tokens_of(first)
    assert torch.equal(first.group, second.group)
    assert torch.equal(merge(tokens, first), merge(tokens, second))


def test_no_images():
    words = group_words(torch.zeros(0, PATCHES, dtype=torch.int64), LABELS, (ROWS, COLUMNS))
    assert words.lengths == ()
    merged = merge(torch.zeros(0, PATCHES, 7), words)
    assert merged.shape == (0, 7)
    assert unmerge(merged, words).shape == (0, PATCHES, 7)
