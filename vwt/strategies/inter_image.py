"""The inter-image mode of the Visual Word Tokenizer."""

import copy

from torch import Tensor, nn

from vwt.codebook.codebook import Codebook
from vwt.codebook.matching import WordIndex, check_threshold
from vwt.errors import ArgumentError
from vwt.models.spec import PatchSpec
from vwt.tokens.words import Words, group_words


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
