import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vwt.codebook.clustering import StreamingKMeans, kmeans, reservoir_slots


def blobs(count: int = 4, width: int = 8, members: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Well separated clusters, shuffled: (n, width) unit rows, and the cluster of each."""
    rng = np.random.default_rng(0)
    label = rng.permutation(np.repeat(np.arange(count), members))
    points = np.eye(width, dtype=np.float32)[label] + 0.05 * rng.standard_normal((len(label), width), np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True), label


def cluster(sample, words=4, iterations=8, spherical=True, seed=0, **options):
    return kmeans(sample, words, iterations=iterations, spherical=spherical, seed=seed, **options)


def fill(sample: np.ndarray, parts: list[int], first: int = 0) -> None:
    """Write a stream of the numbers 0, 1, ... into a sample, in parts that each have a generator of their own."""
    start = 0
    for index, count in enumerate(parts):
        if index >= first:
            slots = reservoir_slots(start, count, len(sample), np.random.default_rng((7, index)))
            sample[slots[slots >= 0]] = np.arange(start, start + count)[slots >= 0]
        start += count


@given(st.lists(st.integers(1, 20), min_size=1, max_size=10), st.integers(1, 30), st.data())
def test_replaying_the_end_of_a_stream_changes_nothing(parts, size, data):
    sample = np.full(size, -1)
    fill(sample, parts)
    before = sample.copy()
    fill(sample, parts, first=data.draw(st.integers(0, len(parts))))
    assert (sample == before).all()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=10), st.integers(1, 30))
def test_sample_holds_distinct_items_and_all_of_a_short_stream(parts, size):
    sample = np.full(size, -1)
    fill(sample, parts)
    held = min(sum(parts), size)
    assert len(set(sample[:held])) == held
    assert 0 <= sample[:held].min() <= sample[:held].max() < sum(parts)
    assert (sample[held:] == -1).all()


def test_every_item_is_sampled_equally_often():
    size, items, trials = 5, 20, 4000
    taken = np.zeros(items)
    for trial in range(trials):
        rng, sample = np.random.default_rng(trial), np.full(size, -1)
        for start in range(0, items, 4):
            slots = reservoir_slots(start, 4, size, rng)
            sample[slots[slots >= 0]] = np.arange(start, start + 4)[slots >= 0]
        taken[sample] += 1
    share = size / items
    assert np.abs(taken / trials - share).max() < 5 * np.sqrt(share * (1 - share) / trials)  # five sigma


@pytest.mark.parametrize("spherical", [True, False])
def test_kmeans_finds_well_separated_clusters(spherical):
    sample, label = blobs()
    one_of_each = sample[np.unique(label, return_index=True)[1]]
    centres = cluster(sample, spherical=spherical, centres=one_of_each)
    nearest = ((sample[:, None] - centres) ** 2).sum(-1).argmin(1)
    assert (nearest == label).all()
    assert np.abs(centres - np.eye(4, 8)).max() < 0.05
    lengths = np.linalg.norm(centres, axis=1)
    assert np.allclose(lengths, 1, atol=1e-5) == spherical


def test_kmeans_goes_on_where_it_stopped():
    sample, _ = blobs()
    states = []
    whole = cluster(sample, words=20, after=lambda done, centres: states.append((done, centres.copy())))
    assert [done for done, _ in states] == [*range(1, 9)]
    for done, centres in states:
        assert (cluster(sample, words=20, done=done, centres=centres) == whole).all()


def test_kmeans_gets_closer_with_every_iteration():
    sample = np.random.default_rng(0).standard_normal((500, 6)).astype(np.float32)
    errors = []
    cluster(
        sample,
        words=10,
        spherical=False,
        after=lambda _, centres: errors.append(((sample[:, None] - centres) ** 2).sum(-1).min(1).mean()),
    )
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_kmeans_depends_on_its_seed_only():
    sample, _ = blobs()
    assert (cluster(sample, words=20) == cluster(sample, words=20)).all()
    assert (cluster(sample, words=20) != cluster(sample, words=20, seed=1)).any()


@settings(max_examples=10)
@given(st.lists(st.integers(1, 1500), min_size=1, max_size=5), st.booleans())
def test_streaming_does_not_depend_on_how_the_stream_is_cut(parts, spherical):
    stream = torch.from_numpy(np.random.default_rng(0).standard_normal((sum(parts) + 8, 3)).astype(np.float32))

    def centres(cuts):
        clusters = StreamingKMeans(8, spherical=spherical, seed=0)
        for part in stream.split(cuts):
            clusters.add(part)
        return clusters.centres()

    cut, whole = centres([*parts, 8]), centres([len(stream)])
    assert (cut == whole).all()
    assert cut.dtype == np.float32
    assert not spherical or np.allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-5)


def test_streaming_uses_the_whole_stream():
    """Also the end, which fills no mini-batch; here the only place of the last cluster."""
    start, end = torch.zeros(1024, 2), torch.tensor([[10.0, 0.0]] * 1000)
    clusters = StreamingKMeans(2, spherical=False, seed=0)
    clusters.add(start + 0.1 * torch.randn(1024, 2, generator=torch.Generator().manual_seed(0)))
    clusters.add(end)
    assert clusters.centres()[:, 0].max() > 1
