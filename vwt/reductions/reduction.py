"""Fewer tokens inside a block, between its attention and its MLP: pruning and merging.

Pruning is that of "Pruning One More Token is Enough" (Eliopoulos et al., WACV 2025, arXiv 2407.05941), section 3.2,
except that an image's scores depend on that image alone, and that any number of prefix tokens is left in peace. Merging
is the bipartite soft matching of "Token Merging" (Bolya et al., ICLR 2023, arXiv 2210.09461), section 3, done once with
a large count rather than a little in every block. Absorbing is our own; see `Absorb`.

Shapes: B images, n tokens of which the first P are prefix tokens and m = n - P are patches (or words), H heads, C
channels. All functions are dense; `vwt.models.backbone` calls them on a batch of equal lengths, or image by image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vwt.errors import ArgumentError, brief
from vwt.reductions.assignment import Assignment
from vwt.tokens.attention import Attend


@dataclass(frozen=True, repr=False)
class Reduction:
    """How many of the patch tokens that enter a block leave it.

    Args:
        amount: tokens to remove, at least 1, or their share, in (0, 1).

    Raises:
        ArgumentError: for any other amount.
    """

    amount: int | float

    def __post_init__(self) -> None:
        amount = self.amount
        whole = isinstance(amount, int) and not isinstance(amount, bool)
        if not (amount >= 1 if whole else isinstance(amount, float) and 0 < amount < 1):
            raise ArgumentError(
                f"{brief(self)}: expected a number of tokens to remove, at least 1, or a share in (0, 1)"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.amount!r})"

    bias_on_self: ClassVar[bool] = True  # whether attention counts a token so too when it attends to itself

    @property
    def kind(self) -> str:
        """The operation's name in files and tables."""
        return type(self).__name__.lower()

    @staticmethod
    def most(patches: int) -> int:
        """The most tokens that it can remove of so many."""
        raise NotImplementedError

    def wanted(self, patches: int) -> int:
        """Tokens to remove of so many, whether that can be done or not."""
        return self.amount if isinstance(self.amount, int) else int(self.amount * patches + 1e-9)

    def removed(self, patches: int) -> int:
        """Tokens that are removed of so many: what is wanted, as far as there are enough."""
        return max(0, min(self.wanted(patches), self.most(patches)))

    def watch(self, prefix: int, seen: list[Tensor]) -> Attend:
        """Attention that appends to `seen` what `assign` needs."""
        raise NotImplementedError

    def assign(self, seen: Tensor, tokens: Tensor, prefix: int, following: float) -> Assignment:
        """Which patch tokens of a batch become which.

        Args:
            seen: what `watch` kept.
            tokens: (B, n, C), after the attention.
            prefix: P.
            following: share of the blocks (of the vision tower) that come after this one, in [0, 1).
        """
        raise NotImplementedError

    @staticmethod
    def key_size(
        assignment: Assignment, key_size: Tensor | None, sizes: Tensor | None, total: Tensor, following: float
    ) -> Tensor | None:
        """How often attention counts each new token as a key (B, n'), None where once each.

        Args:
            assignment: what `assign` gave.
            key_size: (B, n) float32, the same of the former tokens.
            sizes: (B, n) float32, patches that each of these stands for, None where all are 1.
            total: (B, n') float32, the same of the new ones.
            following: as in `assign`.
        """
        raise NotImplementedError


def patches_entering(reductions: Mapping[int, Reduction], blocks: int, patches: int) -> list[int]:
    """Patch tokens that enter each of `blocks` blocks, and, last, those that leave, when so many enter the first."""
    counts = [patches]
    for block in range(blocks):
        reduction = reductions.get(block)
        counts.append(counts[-1] - (reduction.removed(counts[-1]) if reduction else 0))
    return counts
