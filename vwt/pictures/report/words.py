"""The codebook's part of a report."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vwt.models.spec import PatchSpec, prepare
from vwt.pictures.tiles import data_uri, frequent, word_tiles
from vwt.tokenizer import VWTokenizer
from vwt.tokens.patches import patchify

BATCH = 16


@dataclass(frozen=True, eq=False)
class WordsFound:
    """The most frequent words of a codebook, and what of them was found in some images.

    Attributes:
        codebook: in words.
        threshold: cosine distance up to which a patch belongs to a word.
        matched: share of the patches of the images that belong to one.
        numbers: of the most frequent words, the most frequent first.
        counts: patches that each was counted on when the codebook was built.
        shares: of all patches that were.
        here: share of the patches of the images that belong to each.
        pictures: of each word, see `vwt.pictures.tiles.word_tiles`, as text that a page can hold.
    """

    codebook: str
    threshold: float
    matched: float
    numbers: list[int]
    counts: list[int]
    shares: list[float]
    here: list[float]
    pictures: list[list[str]]


@torch.inference_mode()
def describe_words(fast: VWTokenizer, pixels: Tensor) -> WordsFound:
    """What an `InterImage` finds in images (n, C, H, W) uint8."""
    strategy, spec = fast.strategy, PatchSpec.of(fast.model)
    labels = []
    for batch in pixels.split(BATCH):
        images = prepare(batch, fast.model)
        embedded = fast.family.embed(images)
        pixel = strategy.space == "pixel"
        features = patchify(images, spec.patch_size, embedded.grid) if pixel else embedded.project()
        labels.append(strategy.index(features, strategy.threshold).flatten().cpu())
    label = torch.cat(labels)
    codebook = strategy.codebook
    chosen = frequent(codebook)
    found = torch.bincount(label[label >= 0], minlength=len(codebook))[chosen]
    tiles = word_tiles(fast, codebook, pixels)
    total = max(1, int(codebook.counts.sum()))
    return WordsFound(
        codebook=repr(codebook),
        threshold=strategy.threshold,
        matched=float((label >= 0).float().mean()),
        numbers=chosen.tolist(),
        counts=codebook.counts[chosen].tolist(),
        shares=(codebook.counts[chosen] / total).tolist(),
        here=(found / len(label)).tolist(),
        pictures=[[data_uri(tile, "PNG") for tile in own] for own in tiles.unbind(1)],
    )
