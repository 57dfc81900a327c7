"""Strategies: features of patches to Words, before the first block.

A strategy reads the features of its `space` and says which patches make which token. It knows nothing of the model,
except through `bind`.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from vwt.models.spec import PatchSpec
from vwt.tokens.patches import Space
from vwt.tokens.words import Words


@runtime_checkable
class Strategy(Protocol):
    """What `VWTokenizer` asks of a strategy."""

    space: Space
    fixed_count: bool  # every image gets as many tokens, whatever it shows
    # It may also have `size_exponent`: a token of s patches has key size s ** size_exponent (0 without).

    def bind(self, spec: PatchSpec) -> nn.Module:
        """The strategy as a module for one model; raises MismatchError if it cannot serve it."""
        ...

    def __call__(self, features: Tensor, grid: tuple[int, int]) -> Words:
        """Features (B, N, D) of the patches of a grid (rows, columns) to Words."""
        ...
