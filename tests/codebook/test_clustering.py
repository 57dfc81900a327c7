import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vwt.codebook import clustering
from vwt.codebook.clustering import StreamingKMeans, kmeans


def blobs(count: int = 4, width: int = 8, members: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Well separated clusters, shuffled: (n, width) unit rows, and the cluster of each."""
    rng = np.random.default_rng(0)
    label = rng.permutation(np.repeat(np.arange(count), members))
    points = np.eye(width, dtype=np.float32)[label] + 0.05 * rng.standard_normal((len(label), width), np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True), label


def cluster(sample, words=4, iterations=8, spherical=True, seed=0, **options):
    return kmeans(sample, words, iterations=iterations, spherical=spherical, seed=seed, **options)


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


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("approximate", [20, 21])
def test_kmeans_goes_on_where_it_stopped(monkeypatch, dtype, approximate):
    monkeypatch.setattr(clustering, "APPROXIMATE", approximate)
    sample, states = blobs()[0].astype(dtype), []
    whole = cluster(sample, words=20, after=lambda done, centres: states.append((done, centres.copy())))
    assert [done for done, _ in states] == [*range(1, 9)]
    for done, centres in states:
        assert (cluster(sample, words=20, done=done, centres=centres) == whole).all()


@pytest.mark.parametrize("spherical", [True, False])
def test_approximate_kmeans_ends_as_close_as_the_exact_one(monkeypatch, spherical):
    sample = np.random.default_rng(0).standard_normal((3000, 16)).astype(np.float32)
    sample /= np.linalg.norm(sample, axis=1, keepdims=True)

    def distance(centres):
        return ((sample[:, None] - centres) ** 2).sum(-1).min(1).mean()

    exact = cluster(sample, words=200, spherical=spherical)
    monkeypatch.setattr(clustering, "APPROXIMATE", 200)
    near = cluster(sample.astype(np.float16), words=200, spherical=spherical)
    assert (near != exact).any()
    assert distance(near) < 1.01 * distance(exact)


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
