"""Equal to the outputs recorded of an independent implementation, see ../shared/data/README.md."""

from itertools import product

import numpy as np
import pytest
import torch

from tests.matrix import matrix
from vwt import Codebook, InterImage, IntraImage, PruningSchedule, VWTokenizer
from vwt.models.spec import PatchSpec
from vwt.tokens.words import merge

INTER = {
    "inter_pixel_t010": ("pixel", 0.10),
    "inter_pixel_t030": ("pixel", 0.30),
    "inter_embedding_t020": ("embedding", 0.20),
}
INTRA = {"intra_k147": 0.25, "intra_k131": 0.33, "intra_k98": 0.5}
PRUNED = (28, 56, 84)  # in block 3
CLOSE = {"atol": 1e-4, "rtol": 0}


def read(path):
    if not path.is_file():
        pytest.skip(f"no recorded outputs at {path}")
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.fixture(scope="module")
def recorded(shared):
    return read(shared / "reference" / "vwt_reference.npz")


@pytest.fixture(scope="module")
def pruned(shared):
    return read(shared / "reference" / "pomt_reference.npz")


@pytest.fixture(scope="module")
def images(recorded):
    return ((recorded["images"].permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).contiguous()


def make_fast(vit_tiny, recorded, variant):
    if variant in INTRA:
        return VWTokenizer(vit_tiny, IntraImage(INTRA[variant]))
    space, threshold = INTER[variant]
    spec, words = PatchSpec.of(vit_tiny), recorded[f"words_{space}"]
    count = torch.zeros(len(words), dtype=torch.int64)
    projection = spec.projection if space == "embedding" else {}
    codebook = Codebook(words, count, count, space, spec.patch_size, spec.mean, spec.std, projection)
    return VWTokenizer(vit_tiny, InterImage(codebook, threshold))


def by_first_appearance(labels):
    """The same partition, its groups numbered in the order in which row-major reading meets them."""
    numbers = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels.tolist()]


@torch.inference_mode()
@pytest.mark.parametrize("batch", matrix([1, 8], 8))
def test_full_model(vit_tiny, recorded, images, batch):
    logits = torch.cat([VWTokenizer(vit_tiny)(part) for part in images.split(batch)])
    torch.testing.assert_close(logits, recorded["logits_full"], **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("variant", "batch"),
    matrix(product([*INTER, *INTRA], [1, 8]), ("inter_pixel_t010", 8), ("inter_embedding_t020", 1), ("intra_k98", 8)),
)
def test_logits(vit_tiny, recorded, images, variant, batch):
    fast = make_fast(vit_tiny, recorded, variant)
    logits = torch.cat([fast(part) for part in images.split(batch)])
    torch.testing.assert_close(logits, recorded[f"{variant}_logits"], **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize(("variant", "batch"), matrix(product(INTER, [1, 8]), *product(INTER, [8])))
def test_partitions_and_counts(vit_tiny, recorded, images, variant, batch):
    fast = make_fast(vit_tiny, recorded, variant)
    words = [fast.tokenize(part) for part in images.split(batch)]
    assert torch.equal(torch.cat([part.counts for part in words]), recorded[f"{variant}_counts"])
    groups = torch.cat([part.group for part in words]).tolist()
    assert groups == [by_first_appearance(labels) for labels in recorded[f"{variant}_labels"]]


@torch.inference_mode()
@pytest.mark.parametrize(("variant", "batch"), matrix(product(INTRA, [1, 8]), *product(INTRA, [8])))
def test_kept_patches(vit_tiny, recorded, images, variant, batch):
    fast = make_fast(vit_tiny, recorded, variant)
    groups = torch.cat([fast.tokenize(part).group for part in images.split(batch)])
    kept = [(group >= 0).nonzero().flatten().tolist() for group in groups]
    assert kept == recorded[f"{variant}_kept"].tolist()


@torch.inference_mode()
@pytest.mark.parametrize("variant", ["inter_pixel_t010", "inter_pixel_t030"])
def test_tokens(vit_tiny, recorded, images, variant):
    """Class token and means of the groups, position included."""
    fast = make_fast(vit_tiny, recorded, variant)
    words = fast.tokenize(images[:1])
    _, tokens, _ = fast.backbone.embed(images[:1])
    merged = merge(tokens[:, 1:], words)
    labels = recorded[f"{variant}_labels"][0]
    first = [words.group[0].tolist().index(token) for token in range(len(merged))]
    expected = recorded[f"{variant}_tokens0"]
    torch.testing.assert_close(tokens[0, 0], expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(merged, expected[1 + labels[first]], atol=1e-5, rtol=0)
    assert sorted(labels[first].tolist()) == list(range(len(expected) - 1))


@torch.inference_mode()
@pytest.mark.parametrize(("removed", "batch"), matrix(product(PRUNED, [1, 8]), (56, 8)))
def test_pruning(vit_tiny, recorded, pruned, images, removed, batch):
    """Logits, and which patches became one token, the last; one at a time and as batch mates."""
    assert torch.equal(pruned["images"], recorded["images"])
    fast = VWTokenizer(vit_tiny, schedule=PruningSchedule({3: removed}))
    logits = torch.cat([fast(part) for part in images.split(batch)])
    torch.testing.assert_close(logits, pruned[f"R{removed}_logits"], **CLOSE)
    words = [fast.forward_features(part, unmerge=False)[1] for part in images.split(batch)]
    assert {count for part in words for count in part.lengths} == {196 - removed}
    dropped = [(group == 195 - removed).nonzero().flatten().tolist() for part in words for group in part.group]
    assert dropped == pruned[f"R{removed}_dropped"].tolist()
