"""Drops patches that are similar to a direct neighbour."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vwt.codebook.matching import check_threshold
from vwt.errors import ArgumentError
from vwt.models.spec import PatchSpec
from vwt.tokens.patches import Space
from vwt.tokens.tensors import without_autocast
from vwt.tokens.words import KeptPatches, Words, weigh


class Neighbours(nn.Module):
    """Drop the patches that are most similar to a direct neighbour, and merge each into that neighbour.

    Similarity is the cosine in embedding space, between a patch and the four patches next to it. The grid is coloured
    like a chessboard, and only patches of one colour are dropped, so that all neighbours of a dropped patch are kept.
    Each image drops patches of the colour whose patches are more similar to their neighbours. The corners of the grid
    are kept.

    The token of a kept patch is a weighted mean, in which the kept patch has weight 8 and each patch merged into it
    weight 1. A plain mean would be a token unlike those that the model was trained on. A token of s patches has key
    size s ** 0.5 when other tokens attend to it, and 1 when it attends to itself (proportional attention as in Token
    Merging, arXiv 2210.09461, section 3, which has s for both).

    Args:
        drop: share of the patches to drop, in [0, 0.5), the same for all images; or
        threshold: cosine distance in [0, 2] up to which a patch is dropped; the number differs between images.
        always: indices of patches that are never dropped, such as those that a model uses as attention sinks.

    Raises:
        ArgumentError: unless exactly one of drop and threshold is given, in its range.
    """

    space: Space = "embedding"
    size_exponent = 0.5
    times = 8.0  # that a patch counts in its mean with those that it stands for

    def __init__(
        self, drop: float | None = None, *, threshold: float | None = None, always: Sequence[int] = ()
    ) -> None:
        super().__init__()
        if (drop is None) == (threshold is None):
            raise ArgumentError("Neighbours needs either drop, a share of the patches, or threshold, a cosine distance")
        if drop is not None and not 0 <= drop < 0.5:
            raise ArgumentError(f"drop is {drop}; expected a share in [0, 0.5), as neighbours of dropped patches stay")
        if threshold is not None:
            check_threshold(threshold)
        if not all(isinstance(index, int) and index >= 0 for index in always):
            raise ArgumentError(f"always is {always!r}; expected indices of patches, from 0")
        self.drop, self.threshold, self.always = drop, threshold, tuple(sorted(set(always)))
        self.fixed_count = drop is not None
        self._boards: dict[tuple[tuple[int, int], torch.device], _Checkerboard] = {}

    def bind(self, spec: PatchSpec) -> "Neighbours":
        """The strategy itself: it serves any model."""
        return self

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Words:
        """Features (B, N, D) to Words of N - int(N · drop) tokens an image, or of as many as the threshold leaves.

        Raises:
            ArgumentError: if one colour has too few patches to drop, or an index of `always` is outside the grid.
        """
        board = self._board(grid, features.device)
        with without_autocast(features.device):
            unit = F.normalize(features.float(), dim=-1)
            likeness = (unit @ unit.transpose(-2, -1)).flatten(1).index_select(1, board.pairs)
        best, side = (likeness.unflatten(1, (-1, 4)) + board.outside).max(dim=-1)
        drop = self._dropped if self.threshold is None else self._dropped_within
        return drop(best, side, board, grid)

    def can_drop(self, grid: tuple[int, int]) -> bool:
        """Whether so many patches of a grid can go; with a threshold, always."""
        return self._count(grid[0] * grid[1]) <= self._board(grid, torch.device("cpu")).most

    def _count(self, patches: int) -> int:
        return int(patches * (self.drop or 0.0) + 1e-9)

    def _dropped(self, best: Tensor, side: Tensor, board: "_Checkerboard", grid: tuple[int, int]) -> Words:
        """Drop as many patches of each image, the most alike of the colour that is more alike altogether."""
        count = self._count(best.shape[1])
        if count > board.most:
            raise ArgumentError(
                f"{self} drops {count} of {best.shape[1]} patches; {board.most} can go here; drop fewer"
            )
        colour = (best @ board.contrast > 0).long()
        dropped = (best + board.forbidden.index_select(0, colour)).topk(count, dim=1, sorted=False).indices
        # What is dropped goes to the end, so that the others come first, in their order.
        order = board.everything.expand(best.shape[0], -1).scatter(1, dropped, best.shape[1]).sort(dim=1).values
        standing = board.neighbours.take(torch.add(side.gather(1, dropped), dropped, alpha=4))
        return KeptPatches(order[:, : best.shape[1] - count], grid, dropped, standing, self.times)

    def _dropped_within(self, best: Tensor, side: Tensor, board: "_Checkerboard", grid: tuple[int, int]) -> Words:
        """Drop what is alike enough, of the colour in which there is more of it."""
        alike = (best >= 1 - (self.threshold or 0.0) - 1e-6)[:, None] & (board.forbidden == 0)  # (B, 2, N)
        colour = alike.sum(dim=2).argmax(dim=1)
        dropped = alike[torch.arange(len(best), device=best.device), colour]
        partner = board.neighbours.take(torch.add(side, board.everything, alpha=4))
        stands_for = torch.where(dropped, partner, board.everything)
        group = ((~dropped).cumsum(dim=1) - 1).gather(1, stands_for)
        sizes = torch.zeros_like(best).scatter_add(1, group, torch.ones_like(best))
        return Words(group, weigh(group, ~dropped, sizes, self.times), (~dropped).sum(dim=1), grid)

    def _board(self, grid: tuple[int, int], device: torch.device) -> "_Checkerboard":
        if torch.compiler.is_compiling():  # which folds constants itself
            return _make_checkerboard(grid, self.always, device)
        key = (grid, device)
        board = self._boards.get(key)
        if board is None:
            with torch.inference_mode(False):  # they serve later calls, with gradients too
                board = _make_checkerboard(grid, self.always, device)
            if len(self._boards) >= _KEPT:
                self._boards = {}  # at once, as other threads may read it
            self._boards[key] = board
        return board

    def extra_repr(self) -> str:
        """For repr()."""
        how = f"drop={self.drop}" if self.threshold is None else f"threshold={self.threshold}"
        return how + (f", always={self.always}" if self.always else "")


class _Checkerboard(NamedTuple):
    """A grid as a chessboard.

    Attributes:
        everything: (N,) 0, 1, ….
        neighbours: (N, 4) the patch above, below, left and right; any where there is none.
        pairs: (4 N,) where the likeness of a patch and each of its neighbours is found among all pairs of patches.
        outside: (N, 4) far below any likeness where there is no neighbour, or the patch always stays, else 0.
        contrast: (N,) whose product with the patches' likeness says which colour has more: the second, if positive.
        forbidden: (2, N) for each colour, far below any likeness where a patch is of the other one, else 0.
        most: patches of either colour that can be dropped.
    """

    everything: Tensor
    neighbours: Tensor
    pairs: Tensor
    outside: Tensor
    contrast: Tensor
    forbidden: Tensor
    most: int


_FAR = 1e3  # from any likeness


_KEPT = 32  # boards, each of a size of images and a device; then all are forgotten


def _make_checkerboard(grid: tuple[int, int], always: Sequence[int], device: torch.device) -> _Checkerboard:
    rows, columns = grid
    if any(index >= rows * columns for index in always):
        raise ArgumentError(f"always is {list(always)}; expected indices of the {rows}x{columns} patches, from 0")
    neighbours, outside, colour, stays = [], [], [], []
    for row, column in itertools.product(range(rows), range(columns)):
        around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        inside = [0 <= r < rows and 0 <= c < columns for r, c in around]
        neighbours.append([r * columns + c if ok else 0 for (r, c), ok in zip(around, inside, strict=True)])
        corner = row in (0, rows - 1) and column in (0, columns - 1)
        stays.append(corner or row * columns + column in always)
        outside.append([0.0 if ok and not stays[-1] else -_FAR for ok in inside])
        colour.append((row + column) % 2)
    table, second = torch.tensor(neighbours, device=device), torch.tensor(colour, device=device)
    everything = torch.arange(rows * columns, device=device)
    may_go = [sum(own == which and not stay for own, stay in zip(colour, stays, strict=True)) for which in (0, 1)]
    share = torch.where(second == 1, 1 / max(may_go[1], 1), -1 / max(may_go[0], 1))
    return _Checkerboard(
        everything,
        table,
        (everything[:, None] * len(colour) + table).flatten(),
        torch.tensor(outside, device=device),
        share.masked_fill(torch.tensor(stays, device=device), 0.0),
        torch.stack([second * -_FAR, (1 - second) * -_FAR]),
        min(may_go),
    )
