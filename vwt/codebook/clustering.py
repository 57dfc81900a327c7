"""A stream of patches to cluster centres: a uniform sample for faiss's k-means, or scikit-learn's MiniBatchKMeans."""

import math
from collections.abc import Callable

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

# From so many words on, patches are assigned to centres by an inverted index (faiss's IndexIVFFlat, Jégou et al. 2011,
# "Product quantization for nearest neighbor search", section 4), which compares each patch with those centres only that
# lie in the lists nearest to it, and the sample is of half precision.
APPROXIMATE = 1 << 14

_PROBES = 16  # lists


def sample_dtype(words: int) -> type[np.generic]:
    """Of the sample from which so many words are clustered."""
    return np.float16 if words >= APPROXIMATE else np.float32


def kmeans(
    sample: np.ndarray,
    words: int,
    *,
    iterations: int,
    spherical: bool,
    seed: int,
    done: int = 0,
    centres: np.ndarray | None = None,
    after: Callable[[int, np.ndarray], None] = lambda done, centres: None,
) -> np.ndarray:
    """Centres (K, D) float32 of faiss's k-means over a sample (n, D), one iteration at a time.

    Coarse to fine: early iterations, whose centres move far whatever the detail, see a part of the sample
    (`subset_sizes`). That ends closer to the patches than as much time spent on all of them.

    Args:
        sample: float32 or float16, in random order, so that each beginning of it is a sample too; of unit rows if
            `spherical`.
        words: K.
        iterations: of Lloyd's algorithm, in all.
        spherical: centres of unit length, for cosine distance.
        seed: of the first centres.
        done: iterations that `centres` have behind them.
        centres: (K, D) to go on from.
        after: called after each iteration with their number so far and the centres.
    """
    for iteration, size in list(enumerate(subset_sizes(len(sample), words, iterations)))[done:]:
        step = faiss.Clustering(sample.shape[1], words)
        step.niter, step.seed, step.spherical = 1, seed, spherical
        step.min_points_per_centroid, step.max_points_per_centroid = 1, size
        if centres is not None:
            faiss.copy_array_to_vector(centres.ravel(), step.centroids)
        index = _make_index(sample.shape[1], words, spherical)
        if sample.dtype == np.float32:
            step.train(sample[:size], index)
        else:  # decoded block by block
            codec = faiss.IndexScalarQuantizer(sample.shape[1], faiss.ScalarQuantizer.QT_fp16)
            step.train_encoded(sample[:size].view(np.uint8), codec, index)
        centres = faiss.vector_to_array(step.centroids).reshape(words, -1)
        after(iteration + 1, centres)
    assert centres is not None  # iterations > done
    return centres


def _make_index(width: int, words: int, spherical: bool) -> faiss.Index:
    """An empty index that finds the nearest of so many centres, by cosine or Euclidean distance."""
    flat = faiss.IndexFlatIP(width) if spherical else faiss.IndexFlatL2(width)
    if words < APPROXIMATE:
        return flat
    index = faiss.IndexIVFFlat(flat, width, 4 * math.isqrt(words), flat.metric_type)
    index.nprobe, index.cp.spherical, index.cp.min_points_per_centroid = _PROBES, spherical, 1
    return index


def subset_sizes(patches: int, words: int, iterations: int) -> list[int]:
    """How many patches each iteration sees: a quarter, then half, then all, but no fewer than 16 a word.

    >>> subset_sizes(1600, 10, 9)
    [400, 400, 400, 400, 400, 800, 800, 1600, 1600]
    """
    last, middle = max(1, round(iterations * 2 / 9)), round(iterations * 2 / 9)
    parts = [4] * (iterations - middle - last) + [2] * min(middle, iterations - last) + [1] * last
    return [min(patches, max(patches // part, 16 * words)) for part in parts]


class StreamingKMeans:
    """scikit-learn's MiniBatchKMeans over a stream, in mini-batches of twice as many patches as words.

    Args:
        words: K.
        spherical: centres are scaled to unit length in the end; the stream must be of unit rows.
        seed: of centres and reassignments.
    """

    def __init__(self, words: int, *, spherical: bool, seed: int) -> None:
        self.spherical = spherical
        self.step = max(1024, 2 * words)
        self.model = MiniBatchKMeans(words, random_state=seed, batch_size=self.step, compute_labels=False)
        self.waiting: list[Tensor] = []

    def add(self, features: Tensor) -> None:
        """Take features (n, D) float32; the centres move when a mini-batch is full."""
        self.waiting.append(features)
        if sum(len(part) for part in self.waiting) >= self.step:
            *full, rest = torch.cat(self.waiting).split(self.step)
            if len(rest) == self.step:
                full, rest = [*full, rest], rest[:0]
            for batch in full:
                self.model.partial_fit(batch.numpy())
            self.waiting = [rest]

    def centres(self) -> np.ndarray:
        """Take what is left of the stream and return the centres (K, D) float32."""
        rest = torch.cat(self.waiting)
        if len(rest) >= (1 if hasattr(self.model, "cluster_centers_") else self.model.n_clusters):
            self.model.partial_fit(rest.numpy())
        centres = torch.from_numpy(self.model.cluster_centers_).float()
        return (F.normalize(centres, dim=-1) if self.spherical else centres).numpy()
