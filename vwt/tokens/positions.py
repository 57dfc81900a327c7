"""Where tokens are on the grid, for models whose attention asks for it in every block.

Position embeddings that are added before the blocks are in the tokens already. Rotary embeddings and relative position
biases are not: they have to follow the tokens when patches become words.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vwt.tokens.tensors import count_images, lazy_property
from vwt.tokens.words import Words, merge

PREFIX = -1.0  # the row and the column of prefix tokens, which are nowhere


@dataclass(frozen=True, eq=False)
class Positions:
    """Where the tokens of packed images are.

    Attributes:
        grid: (rows, columns) of the patches.
        prefix: P, the prefix tokens of each image.
        lengths: tokens of each image, prefix tokens included; they sum to T.
        table: the model's own rotary embedding (N, 2d) of the places of the grid, sines and cosines, or one for each
            block and head (depth, H, N, 2d); None for a model that adds a bias for relative positions instead.
        at: (T, 2) float32, row and column of the patch that each token mostly is, else the mean of those that it stands
            for, -1 for prefix tokens; None where every patch of each image is a token, in order.
        whole: every token is one patch, or mostly one, so that its place is one of the grid.
    """

    grid: tuple[int, int]
    prefix: int
    lengths: Sequence[int]
    table: Tensor | None = None
    at: Tensor | None = None
    whole: bool = True

    @property
    def rows(self) -> Tensor:
        """(T, 2): `at`, also where that is None."""
        if self.at is not None:
            return self.at
        device = None if self.table is None else self.table.device
        every = torch.cat([torch.full((self.prefix, 2), PREFIX, device=device), grid_positions(self.grid, device)])
        return every.repeat(count_images(self.lengths), 1)

    @lazy_property
    def together(self) -> Tensor:
        """Rotary embedding for attention over one sequence of all images, whose first P tokens are not rotated.

        (T - P, 2d), or (depth, H, T - P, 2d). Prefix tokens of further images are rotated by nothing.
        """
        return _rotations(self, self.rows[self.prefix :], prefixed=True)

    @lazy_property
    def dense(self) -> Tensor:
        """Rotary embedding of B images of n tokens: (B, 1, n - P, 2d), or (depth, B, H, n - P, 2d).

        Where every patch is a token, what the model itself uses: (N, 2d), or (depth, H, N, 2d).
        """
        if self.at is None:
            assert self.table is not None
            return self.table
        images = count_images(self.lengths)
        at = self.at.view(images, self.lengths[0], 2)[:, self.prefix :]
        return _by_image(_rotations(self, at.flatten(0, 1)), images)

    @lazy_property
    def apart(self) -> list[Tensor]:
        """Rotary embedding of each image by itself: (1, 1, n - P, 2d), or (depth, 1, H, n - P, 2d)."""
        return [_by_image(_rotations(self, at[self.prefix :]), 1) for at in self.rows.split(list(self.lengths))]

    @lazy_property
    def index(self) -> Tensor:
        """(T,) int64: each token's row in the table of relative positions, in which a prefix token comes first."""
        return torch.where(self.rows[:, 0] < 0, 0, _flat(self.rows, self.grid) + self.prefix)

    def replace(self, at: Tensor, lengths: Sequence[int], *, whole: bool) -> "Positions":
        """The places of other tokens of the same images."""
        return replace(self, at=at, lengths=lengths, whole=whole)


def grid_positions(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Row and column of each patch (N, 2) float32."""
    return torch.cartesian_prod(*(torch.arange(float(n), device=device) for n in grid)).view(-1, 2)


def word_positions(words: Words) -> Tensor:
    """Mean row and column of the patches of each token, image after image: (T', 2) float32, prefix tokens not counted.

    >>> from vwt.tokens.words import group_words
    >>> word_positions(group_words(torch.tensor([[0, 1, 0, 2]]), 3, (2, 2)))
    tensor([[0.5000, 0.0000],
            [0.0000, 1.0000],
            [1.0000, 1.0000]])
    """
    places = grid_positions(words.grid, words.group.device)
    return merge(places.expand(words.group.shape[0], -1, -1), words)


def gather_bias(bias: Tensor, index: Tensor) -> Tensor:
    """A bias for each two tokens (1, H, F, F) to that of chosen ones (b, n) of each image: (b, H, n, n)."""
    return bias[0][:, index[:, :, None], index[:, None, :]].transpose(0, 1)


def _flat(at: Tensor, grid: tuple[int, int]) -> Tensor:
    return (at[:, 0] * grid[1] + at[:, 1]).long()


def _by_image(rows: Tensor, images: int) -> Tensor:
    """(..., B n, 2d) to (B, 1, n, 2d) or, where blocks and heads have their own, (depth, B, H, n, 2d)."""
    own = rows.ndim > 2
    rows = rows.view(*rows.shape[:-2], images, -1, rows.shape[-1])
    return rows.transpose(1, 2) if own else rows[:, None]


def _rotations(places: Positions, at: Tensor, *, prefixed: bool = False) -> Tensor:
    """Rotary embedding (..., t, 2d) of tokens at (t, 2), prefix tokens among them or not."""
    table = places.table
    assert table is not None
    nowhere = at[:, 0] < 0
    if places.whole:
        index = _flat(at, places.grid)
        if prefixed:
            still = torch.zeros_like(table[..., :1, :])  # the sines of no turn, and its cosines
            still[..., still.shape[-1] // 2 :] = 1
            index, table = torch.where(nowhere, table.shape[-2], index), torch.cat([table, still], dim=-2)
        return table.index_select(-2, index)
    first, down, right = (turn[..., None, :] for turn in _turns(table.float(), places.grid))
    angles = first + at[:, :1] * down + at[:, 1:] * right
    angles = angles.masked_fill(nowhere[:, None], 0)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(table.dtype)


def _turns(table: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Angles (..., d) of the first place, and by how much they grow from row to row and from column to column.

    All rotary embeddings turn evenly from place to place, so that neighbours tell all there is between them. Where a
    step is more than half a turn, what is between two places is the shorter way.
    """

    def turn(place: int) -> Tensor:
        (sin, cos), (sin0, cos0) = (table[..., p, :].chunk(2, dim=-1) for p in (place, 0))
        return torch.atan2(sin * cos0 - cos * sin0, cos * cos0 + sin * sin0)

    def step(count: int, stride: int) -> Tensor:
        if count == 1:
            return torch.zeros_like(first)
        near = turn(stride)  # its rounding error would grow from step to step; the last place keeps it small
        rest = turn((count - 1) * stride) - (count - 1) * near
        return near + (rest - 2 * math.pi * (rest / (2 * math.pi)).round()) / (count - 1)

    first = torch.atan2(*table[..., 0, :].chunk(2, dim=-1))
    return first, step(grid[0], grid[1]), step(grid[1], 1)
