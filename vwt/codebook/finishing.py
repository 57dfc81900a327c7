"""From centres and counts to a codebook: words that are equal, lengths, the report, and where it all comes from."""

import importlib.metadata
from typing import Any

import torch
from torch import Tensor

from vwt.codebook.clustering import APPROXIMATE
from vwt.codebook.config import BuildConfig, BuildReport
from vwt.codebook.passes import RESOLUTION
from vwt.datasets import ImageSource
from vwt.models.spec import PatchSpec

# Cosine distance. faiss makes two words of one by 1 ± 1/1024 on each channel, which puts them 2e-6 apart, and rounding
# decides which of them a patch is nearer to.
_DUPLICATE = 1e-5


def first_of_twins(directions: Tensor) -> Tensor:
    """Id (K,) int64 of the first word that each points the way of, within a cosine distance of 1e-5; else its own.

    Args:
        directions: (K, D) of unit length.
    """
    first = torch.arange(len(directions))
    for start in range(0, len(directions), 1024):
        block = directions[start : start + 1024]
        same = (block @ directions.T >= 1.0 - _DUPLICATE).tril(start)
        same[torch.arange(len(block)), torch.arange(start, start + len(block))] = True
        first[start : start + 1024] = same.int().argmax(dim=1)
    while not torch.equal(first, first[first]):  # the twin of a twin
        first = first[first]
    return first


def along_patches(directions: Tensor, sums: dict[str, Tensor]) -> Tensor:
    """Words (K, D) in given directions, as long as their patches are along them.

    A centre on the sphere has a direction only. With that length, pixel words look like patches and can be expressed in
    another normalisation. An empty word takes the mean.

    Args:
        directions: (K, D) of unit length.
        sums: of a `CountPass`.
    """
    counts, projections = sums["counts"], sums["projections"].double() * RESOLUTION
    along = projections / counts.clamp(min=1)
    along[counts == 0] = projections.sum() / counts.sum()
    return directions * along[:, None].float()


def fill_report(report: BuildReport, values: dict[str, Any], counts: Tensor, first: Tensor) -> None:
    """Write what the second pass found into a report.

    Args:
        report: to be filled.
        values: of a `CountPass`.
        counts: (K,) patches of each word.
        first: (K,) as `first_of_twins` gives it.
    """
    is_first = first == torch.arange(len(first))
    report.images = values["images"]
    report.skipped = {name: reason for _, name, reason in sorted(values["skipped"])}
    report.patches = int(counts.sum())
    report.empty, report.duplicate = int((is_first & (counts == 0)).sum()), int((~is_first).sum())
    report.effective = len(counts) - report.empty - report.duplicate
    report.distance = values["distance"] * RESOLUTION / max(1, report.patches)
    report.matched = values["matched"] / max(1, report.patches)


def make_provenance(
    config: BuildConfig, source: ImageSource, spec: PatchSpec, report: BuildReport, date: str
) -> dict[str, Any]:
    """Where a codebook comes from."""
    approximate = config.backend == "faiss" and config.words >= APPROXIMATE
    packages = ["torch", "timm", "numpy", "faiss-cpu" if config.backend == "faiss" else "scikit-learn"]
    return {
        "model": spec.model,
        "data set": {
            "name": source.name,
            "split": config.split,
            "fingerprint": source.fingerprint(),
            "images": report.images,
            "skipped": len(report.skipped),
            "counted": "all images" if config.count_images is None else "some, drawn at random",
            "patches": report.patches,
            "image size": list(source.input_size),
        },
        "clustering": {
            "backend": config.backend,
            "spherical": config.spherical,
            "iterations": config.iterations if config.backend == "faiss" else 1,
            "seed": config.seed,
            "sampled": report.sampled,
            "assignment": "approximate" if approximate else "exact",
            "effective words": report.effective,
            "mean cosine distance": round(report.distance, 6),
            "mean": list(spec.mean),
            "std": list(spec.std),
        },
        "versions": {name: importlib.metadata.version(name) for name in ["vwt", *packages]},
        "date": date,
    }
