"""Strategies: features of patches to Words, before the first block.

A strategy reads the features of its `space` and says which patches make which token. It knows nothing of the model,
except through `bind`.
"""

import copy
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vwt.codebook import Codebook
from vwt.errors import ArgumentError
from vwt.matching import WordIndex, check_threshold
from vwt.patches import PatchSpec, Space
from vwt.words import Words, group_words, keep_patches


@runtime_checkable
class Strategy(Protocol):
    """What `VWTokenizer` asks of a strategy."""

    space: Space
    fixed_count: bool  # every image gets as many tokens, whatever it shows

    def bind(self, spec: PatchSpec) -> nn.Module:
        """The strategy as a module for one model; raises MismatchError if it cannot serve it."""
        ...

    def __call__(self, features: Tensor, grid: tuple[int, int]) -> Words:
        """Features (B, N, D) of the patches of a grid (rows, columns) to Words."""
        ...


class IntraImage(nn.Module):
    """Keep the patches of highest pixel variance (Visual Word Tokenizer, intra-image mode; arXiv 2411.15397).

    A patch scores the unbiased variance of its normalised pixels; the int(N · (1 - drop)) highest are kept as they
    are, in row-major order, and the others are dropped.

    Args:
        drop: share of patches to drop, in [0, 1); the paper uses 0.25, 0.33 and 0.5.
    """

    space: Space = "pixel"
    fixed_count = True

    def __init__(self, drop: float = 0.5) -> None:
        super().__init__()
        if not 0 <= drop < 1:
            raise ArgumentError(f"drop is {drop}; expected a share in [0, 1)")
        self.drop = drop

    def bind(self, spec: PatchSpec) -> "IntraImage":
        """The strategy itself: it serves any model."""
        return self

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Words:
        """Normalised pixel patches (B, N, C·ph·pw) to Words of max(1, int(N · (1 - drop))) tokens an image."""
        count = max(1, int(features.shape[1] * (1 - self.drop) + 1e-9))
        centred = features.float() - features.float().mean(dim=-1, keepdim=True)
        score = torch.linalg.vector_norm(centred, dim=-1)  # rises with the variance
        return keep_patches(score.topk(count, dim=1).indices.sort(dim=1).values, grid)

    def extra_repr(self) -> str:
        """For repr()."""
        return f"drop={self.drop}"


class InterImage(nn.Module):
    """Make one token of all patches of a visual word (Visual Word Tokenizer, inter-image mode; arXiv 2411.15397).

    A patch belongs to its nearest word if the cosine distance is at most the threshold, and stays as it is otherwise:
    infrequent patches remain intact. The patches of a word become the mean of their embeddings, each with its own
    position.

    Args:
        codebook: the words, in pixel or embedding space.
        threshold: cosine distance in [0, 2]; the paper uses 0.1.
    """

    fixed_count = False

    def __init__(self, codebook: Codebook, threshold: float = 0.1) -> None:
        super().__init__()
        check_threshold(threshold)
        if not isinstance(codebook, Codebook):
            raise ArgumentError(f"codebook is {type(codebook).__name__}; expected one from vwt.Codebook.load(path)")
        self.codebook, self.threshold, self.space = codebook, threshold, codebook.space
        self.index = WordIndex(codebook.words)

    def bind(self, spec: PatchSpec) -> "InterImage":
        """The same strategy with the codebook in the model's terms; raises MismatchError if it was made for another."""
        codebook = self.codebook.for_model(spec)
        # A copy, which another device may have, without building the index of the same words again.
        return copy.deepcopy(self) if codebook is self.codebook else InterImage(codebook, self.threshold)

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Words:
        """Features (B, N, D) in the codebook's space to Words, a data-dependent number of tokens an image."""
        return group_words(self.index(features, self.threshold), len(self.codebook), grid)

    def extra_repr(self) -> str:
        """For repr()."""
        return f"{self.codebook!r}, threshold={self.threshold}"
