"""Time of finding the words of real patches, by brute force and as `InterImage` does it, and whether answers agree.

A part of `benchmarks/latency.py`, with --matching.
"""

import torch
import torch.nn.functional as F
from harness import Bench
from results import Row, ratio, spread
from torch import Tensor

from vwt import InterImage
from vwt.codebook.matching import nearest_words, within
from vwt.measure.timing import Calls
from vwt.models.backbone import Backbone
from vwt.models.spec import PatchSpec
from vwt.tokens.patches import Space, patchify

TIMED = 32  # batches
ROUNDING = 2e-6  # cosines that differ by less are the same in float32
COLUMNS = {
    "space": "", "words": "d", "threshold": "g", "brute_ms": ".3f", "own_ms": ".3f", "speed_up": ".2f",
    "matched": ".3f", "patches": "d", "different": "d", "beyond_rounding": "d",
}  # fmt: skip


def measure(bench: Bench) -> list[Row]:
    """A row for each codebook and threshold."""
    return [
        matching_row(bench, InterImage(codebook, threshold), bench.images)
        for codebook in bench.codebooks
        for threshold in bench.arguments.threshold
    ]


def matching_row(bench: Bench, strategy: InterImage, images: Tensor) -> Row:
    """Time on some batches, answers on all images (n, C, H, W) uint8."""
    bound = strategy.bind(PatchSpec.of(bench.model)).to(bench.device)
    directions = F.normalize(bound.codebook.words.to(bench.device), dim=-1)
    size = bench.arguments.batch_size
    features = [features_of(bench, batch, bound.space) for batch in images.split(size) if len(batch) == size]
    calls: Calls = {
        "brute": lambda item: brute_force(features[item], directions, bound.threshold),
        "own": lambda item: bound.index(features[item], bound.threshold),
    }
    (seconds,) = bench.time([calls], min(TIMED, len(features)))
    row: Row = {"space": bound.space, "words": len(directions), "threshold": bound.threshold}
    for role in calls:
        row[f"{role}_q1"], row[f"{role}_ms"], row[f"{role}_q3"] = spread(seconds[role])
    row["speed_up"] = ratio(seconds["brute"], seconds["own"])
    pairs = [[calls[role](item) for role in ("own", "brute")] for item in range(len(features))]
    checks = torch.stack(
        [compare(batch, directions, bound.threshold, *pair) for batch, pair in zip(features, pairs, strict=True)]
    )
    row["patches"], matched, row["different"], row["beyond_rounding"] = checks.sum(dim=0).tolist()
    return row | {"matched": matched / row["patches"]}


def features_of(bench: Bench, images: Tensor, space: Space) -> Tensor:
    """Images (B, C, H, W) uint8 to features (B, N, D) as a strategy sees them."""
    backbone, prepared = Backbone(bench.model), bench.prepare(images)
    with bench.autocast():
        embedded, _, grid = backbone.embed(prepared)
    return embedded if space == "embedding" else patchify(prepared, PatchSpec.of(bench.model).patch_size, grid)


def brute_force(features: Tensor, directions: Tensor, threshold: float) -> Tensor:
    """The nearest word (...) of features (..., D), or -1, from the cosines of all pairs with directions (K, D)."""
    similarity, index = nearest_words(features, directions)
    return torch.where(within(similarity, threshold), index, -1)


def compare(features: Tensor, directions: Tensor, threshold: float, own: Tensor, expected: Tensor) -> Tensor:
    """Patches, those with a word, those whose answers differ, and those that differ by more than float32 rounds.

    Args:
        features: (B, N, D).
        directions: (K, D) of unit length.
        threshold: cosine distance.
        own: (B, N) ids or -1.
        expected: (B, N) ids or -1.
    """
    different = own != expected
    patches = F.normalize(features[different].double(), dim=-1)
    cosines = []
    for answer in (own[different], expected[different]):
        cosine = (patches * directions[answer.clamp(min=0)].double()).sum(-1)
        cosines.append(torch.where(answer >= 0, cosine, 1.0 - threshold - 1e-6))
    beyond = (cosines[0] - cosines[1]).abs() > ROUNDING
    return torch.tensor([own.numel(), int((expected >= 0).sum()), int(different.sum()), int(beyond.sum())])
