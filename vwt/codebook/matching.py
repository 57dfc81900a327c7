"""The nearest visual word of each patch, within a threshold of cosine distance: exact, and fast on a CPU.

A word matters only if it is within the threshold, and nearer than the best word known. So most pairs of a patch and a
word are ruled out by an upper bound on their cosine. With patches p and words w of unit length, split in the first m
principal directions of the words (p1, w1) and what is left (p2, w2), ::

    cos = p1·w1 + p2·w2 <= p1·w1 + |p2| |w2|                                                   (Cauchy and Schwarz)

is one matrix product of sketches `(p1, |p2|)` and `(w1, |w2|)`, which are much shorter than the patches. The few pairs
that are left are compared in full.
"""

import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vwt.errors import ArgumentError

# Elements of the similarity matrix held at once: 8 MB of float32, or 4 MB of bfloat16.
_BLOCK = 1 << 21


# What a cosine in float32 may be off by, in whatever order a processor's library adds the products: one after another,
# 800 of them were off by 2e-6. Pairs this close are compared in float64.
_ROUNDING = 1e-5


# Beyond a threshold, so that a patch that is a word is within a threshold of 0.
_TOLERANCE = 3e-6


# Principal directions of the sketches, which have two columns more: of short words, and of long ones in two steps.
_SHORT, _COARSE, _FINE = 46, 62, 126


_TILE = 64  # words whose bounds are looked at together


# For so few words or products, or above such a threshold, ruling pairs out costs more than comparing them.
_FEW_WORDS, _FEW_PRODUCTS, _FAR = 400, 100_000_000, 0.5


# Nor does fetching one pair at a time pay where more than this part of them is left.
_MANY = 64


def check_threshold(threshold: float) -> None:
    """Raise ArgumentError unless the threshold is a cosine distance."""
    if not 0 <= threshold <= 2:
        raise ArgumentError(f"threshold is {threshold}; expected a cosine distance in [0, 2]")


def within(similarity: Tensor, threshold: float) -> Tensor:
    """Whether cosine similarities are within a threshold of cosine distance, up to rounding."""
    return similarity >= 1.0 - threshold - _TOLERANCE


def nearest_words(features: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine similarity to, and id of, the nearest word of each patch, by comparing all pairs in float32.

    Args:
        features: (..., D), any float dtype.
        directions: (K, D) float32 words of unit length.

    Returns:
        Similarities (...) float32 and ids (...) int64. Ties go to the lower id. A patch of length zero has
        similarity 0 to every word. On a GPU that is told to multiply in TF32, similarities are as coarse as that.
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


class WordIndex(nn.Module):
    """Finds the nearest word of each patch within a threshold; built once from the words.

    The answer is that of comparing all pairs. Few words are compared like that, and any number on a GPU, which does so
    without waiting for the host. Where pairs are ruled out, float64 settles those that float32 cannot tell apart.

    Args:
        words: (K, D), any length.
    """

    ids: Tensor
    directions: Tensor
    basis: Tensor
    coarse: Tensor
    fine: Tensor

    def __init__(self, words: Tensor) -> None:
        super().__init__()
        directions = F.normalize(words.float(), dim=-1).cpu()
        ids = _first_of_each(directions)
        directions = directions[ids]
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("directions", directions, persistent=False)
        self.all_differ = len(ids) == len(words)
        self.sketched = len(directions) >= _FEW_WORDS and words.shape[1] > 2 * _SHORT
        if self.sketched:
            self.long = words.shape[1] > 2 * _FINE
            basis = principal_directions(directions, _FINE if self.long else _SHORT)
            coarse = _sketch_words(directions, basis[:, : _COARSE if self.long else _SHORT])
            rounded = coarse.to(torch.bfloat16) if _bfloat16_is_faster() else coarse
            self.rounding = float((rounded.float() - coarse).norm(dim=1).max()) + _ROUNDING
            self.register_buffer("basis", basis, persistent=False)
            self.register_buffer("coarse", rounded, persistent=False)
            if self.long:
                self.register_buffer("fine", _sketch_words(directions, basis), persistent=False)

    @torch.compiler.disable  # counts decide what is done next
    @torch.no_grad()
    def forward(self, features: Tensor, threshold: float) -> Tensor:
        """Id (...) int64 of each patch's nearest word, or -1 where its cosine distance is above the threshold.

        Args:
            features: (..., D), any float dtype.
            threshold: cosine distance in [0, 2]; a word at exactly this distance matches. Ties go to the lower id.
        """
        with torch.autocast(features.device.type, enabled=False):  # which would multiply in half precision
            few = features.numel() * len(self.directions) < _FEW_PRODUCTS or not features.numel()
            if few or not self.sketched or threshold > _FAR or features.device.type != "cpu":
                return self._match_all(features, threshold)
            patches = F.normalize(features.reshape(-1, features.shape[-1]).float(), dim=-1)
            rows = max(1, _BLOCK // len(self.directions))
            ids = [self._match(block, threshold) for block in patches.split(rows)]
            return torch.cat(ids).view(features.shape[:-1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WordIndex":
        # Words follow the model to its device but keep their precision: others would be nearest in half of it.

        def moved(tensor: Tensor) -> Tensor:
            like = fn(tensor.new_empty(1))
            here = tensor.to(like.device)
            return here.share_memory_() if like.is_shared() else here

        return super()._apply(moved, recurse)

    def _match_all(self, features: Tensor, threshold: float) -> Tensor:
        """By comparing all pairs in float32."""
        similarity, index = nearest_words(features, self.directions)
        index = index if self.all_differ else self.ids[index]
        return torch.where(within(similarity, threshold), index, -1)

    def _match(self, patches: Tensor, threshold: float) -> Tensor:
        """By ruling pairs out, for unit patches (M, D)."""
        least = 1.0 - threshold - _TOLERANCE
        projected = patches @ self.basis
        owner, word, floor = self._rule_out(patches, projected[:, : self.coarse.shape[1] - 2], least)
        if self.long:
            owner, word = self._rule_out_more(patches, sketch(projected), owner, word, floor)
        if len(owner) > len(patches) * len(self.directions) // _MANY:
            return self._match_all(patches, threshold)
        cosine = _dot(patches, owner, self.directions, word)
        best = _highest(cosine, owner, len(patches)).clamp_(min=least)
        close = (cosine >= best[owner] - _ROUNDING).nonzero()[:, 0]
        return self._settle(patches, owner[close], word[close], cosine[close], least)

    def _rule_out(self, patches: Tensor, projected: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs (owner, word) whose coarse bound reaches what the patch's most promising word does."""
        exact = sketch(projected)
        short = exact.to(self.coarse.dtype)
        # Bounds may be too low by the rounding of both sketches, of themselves, and of the floor they are held to.
        slack = (short.float() - exact).norm(dim=1) + self.rounding
        if short.dtype == torch.bfloat16:
            slack += 2.0**-8
        bounds = torch.mm(self.coarse, short.T).view(-1, _TILE, len(patches))  # (tiles, 64, M)
        tops = _ordered(bounds).amax(1)  # (tiles, M)
        tile = tops.argmax(0)
        every = torch.arange(len(patches), device=patches.device)
        promising = _ordered(bounds)[tile, :, every].argmax(1) + _TILE * tile
        known = (patches * self.directions[promising.clamp(max=len(self.directions) - 1)]).sum(1)
        floor = known.clamp_(min=least).sub_(_ROUNDING)
        low = _ordered((floor - slack).to(short.dtype))
        tile, owner = (tops >= low).nonzero(as_tuple=True)
        pair, word = (_ordered(bounds)[tile, :, owner] >= low[owner, None]).nonzero(as_tuple=True)
        word = (word + _TILE * tile[pair]).clamp_(max=len(self.directions) - 1)  # beyond, for patches of NaN alone
        return owner[pair], word, floor

    def _rule_out_more(
        self, patches: Tensor, finer: Tensor, owner: Tensor, word: Tensor, floor: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same by the fine bound, for all patches with all words that are left in any pair.

        That is more pairs than are left, but one matrix product is cheaper than fetching the rows of each pair.
        """
        owners, words = _distinct(owner, len(patches)), _distinct(word, len(self.directions))
        bounds = finer[owners] @ self.fine[words].T
        if not bounds.numel():
            return owner, word
        known = _dot(patches, owners, self.directions, words[bounds.argmax(1)])
        floor = torch.maximum(floor[owners], known) - _ROUNDING
        row, column = (bounds >= floor[:, None]).nonzero(as_tuple=True)
        return owners[row], words[column]

    def _settle(self, patches: Tensor, owner: Tensor, word: Tensor, cosine: Tensor, least: float) -> Tensor:
        """The nearest word (M,) int64, or -1, of pairs that are all near enough and nearest but for rounding."""
        nearest = owner.new_full((len(patches),), -1).index_put_((owner,), word)
        if ((nearest[owner] != word) | (cosine < least + _ROUNDING)).any():
            # Some patch has two words as near, or one at just the threshold: float64 decides.
            cosine = _dot(patches, owner, self.directions, word, torch.float64)
            best = _highest(cosine, owner, len(patches))
            none = len(self.directions)
            nearest.fill_(none).scatter_reduce_(0, owner, torch.where(cosine == best[owner], word, none), "amin")
            nearest.masked_fill_(best < least, -1)
        return nearest if self.all_differ else self.ids[nearest].where(nearest >= 0, -1)


def principal_directions(directions: Tensor, count: int) -> Tensor:
    """Orthonormal basis (D, count) of the directions (K, D) in which they vary most, about the origin."""
    _, vectors = torch.linalg.eigh(directions.double().T @ directions.double())
    return vectors.flip(1)[:, :count].float().contiguous()


def sketch(projected: Tensor) -> Tensor:
    """Unit vectors, projected to (n, m), with the length of what is left, and a column of ones: (n, m + 2).

    What is left is rounded up: in float32 it may be lost between two numbers close to 1.
    """
    left = (1.0 + 4e-6 - projected.square().sum(1, keepdim=True)).clamp_(min=0.0).sqrt_()
    return torch.cat([projected, left, torch.ones_like(left)], dim=1)


def _sketch_words(directions: Tensor, basis: Tensor) -> Tensor:
    """Sketches of words (K, D) that give bounds with those of patches, filled to whole tiles with words far away."""
    words = sketch(directions.double() @ basis.double()).float()
    words[:, -1] = 0.0
    far = words.new_zeros(-len(words) % _TILE, words.shape[1])
    far[:, -1] = -8.0
    return torch.cat([words, far])


def _dot(left: Tensor, rows: Tensor, right: Tensor, columns: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """left[rows] · right[columns], one pair after another: (n,)."""
    pairs = max(1, _BLOCK // left.shape[1])
    parts = zip(rows.split(pairs), columns.split(pairs), strict=True)
    return torch.cat([(left.index_select(0, r).to(dtype) * right.index_select(0, c)).sum(1) for r, c in parts])


def _first_of_each(directions: Tensor) -> Tensor:
    """Ids (U,) of the words that equal no earlier word, ascending."""
    first: dict[bytes, int] = {}
    for word, row in enumerate(directions.numpy()):
        first.setdefault(row.tobytes(), word)
    return torch.tensor(list(first.values()), device=directions.device)


def _distinct(ids: Tensor, count: int) -> Tensor:
    """The ids below `count` that occur, ascending."""
    return torch.zeros(count, dtype=torch.bool, device=ids.device).index_fill_(0, ids, True).nonzero()[:, 0]


def _highest(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """The highest value of each owner (count,), -2 for one who has none."""
    return values.new_full((count,), -2.0).scatter_reduce(0, owner, values, "amax")


def _ordered(bounds: Tensor) -> Tensor:
    """Numbers in the order of the bounds, where these are positive; integers are compared faster than bfloat16."""
    return bounds.view(torch.int16) if bounds.dtype == torch.bfloat16 else bounds


@functools.cache
def _bfloat16_is_faster() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32; the answer stays exact either way."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.ones(4096, _COARSE + 2, dtype=dtype, device="cpu")
        right = torch.ones(_COARSE + 2, 192, dtype=dtype, device="cpu")
        runs = []
        for _ in range(5):
            begin = time.perf_counter()
            torch.mm(left, right)
            runs.append(time.perf_counter() - begin)
        seconds[dtype] = min(runs)
    return seconds[torch.bfloat16] < seconds[torch.float32]
