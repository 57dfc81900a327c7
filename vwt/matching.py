"""The nearest visual word of each patch, within a threshold of cosine distance."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vwt.errors import ArgumentError

# Elements of the similarity matrix held at once: 8 MB of float32.
_BLOCK = 1 << 21
# Of a cosine in float32: a patch that is a word is within a threshold of 0.
_ROUNDING = 1e-6


def check_threshold(threshold: float) -> None:
    """Raise ArgumentError unless the threshold is a cosine distance."""
    if not 0 <= threshold <= 2:
        raise ArgumentError(f"threshold is {threshold}; expected a cosine distance in [0, 2]")


def nearest_words(features: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine similarity to, and id of, the nearest word of each patch.

    Args:
        features: (..., D), any float dtype; compared in float32.
        directions: (K, D) float32 words of unit length.

    Returns:
        Similarities (...) float32 and ids (...) int64. Ties go to the lower id. A patch of length zero has
        similarity 0 to every word.
    """
    flat = F.normalize(features.reshape(-1, features.shape[-1]).float(), dim=-1)
    rows = max(1, _BLOCK // max(1, directions.shape[0]))
    parts = [(block @ directions.T).max(dim=1) for block in flat.split(rows)] if len(flat) else []
    if not parts:
        empty = features.new_zeros(features.shape[:-1], dtype=torch.float32)
        return empty, empty.long()
    similarity = torch.cat([part.values for part in parts])
    index = torch.cat([part.indices for part in parts])
    return similarity.view(features.shape[:-1]), index.view(features.shape[:-1])


def match(features: Tensor, directions: Tensor, threshold: float) -> Tensor:
    """Id (...) int64 of each patch's nearest word, or -1 where its cosine distance is above the threshold.

    Args:
        features: (..., D).
        directions: (K, D) float32 words of unit length.
        threshold: cosine distance in [0, 2]; a word at exactly this distance matches.
    """
    similarity, index = nearest_words(features, directions)
    return torch.where(similarity >= 1.0 - threshold - _ROUNDING, index, -1)
