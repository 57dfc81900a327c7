"""Words: which patches make which token; merge and unmerge.

Patches, not prefix tokens: class and register tokens never come here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vwt.tokens.tensors import Equal, count_images, equal_lengths, flat_index, lazy_property, numbers, sum_at


@dataclass(frozen=True, eq=False)
class Words:
    """How the N patches of each image make its tokens.

    Attributes:
        group: (B, N) int64, the token of each patch, numbered from 0 within its image in row-major order of first
            appearance (in the order of the tokens, once a block has made fewer of them); -1 where the patch is dropped.
        weight: (B, N) float32, the patch's share in its token; sums to 1 over each token, 0 where dropped.
        counts: (B,) int64, tokens an image, prefix tokens not counted.
        grid: (rows, columns) of the patches, rows * columns = N.
        count: tokens an image where the strategy gives every image as many, else None. It spares a device
            synchronisation and keeps shapes static.
        kept: (B, count) int64, where each token is one patch, or mostly that: which one, else None. See `KeptPatches`.
    """

    group: Tensor
    weight: Tensor
    counts: Tensor
    grid: tuple[int, int]
    count: int | None = None
    kept: Tensor | None = None

    @lazy_property
    def lengths(self) -> Sequence[int]:
        """Tokens of each image as Python integers (one device synchronisation, if counts vary)."""
        if self.count is not None:
            return equal_lengths(self.count, (self.group if self.kept is None else self.kept).shape[0])
        return tuple(self.counts.tolist())

    @property
    def number(self) -> int:
        """T, tokens of all images."""
        lengths = self.lengths
        return lengths.length * lengths.images if type(lengths) is Equal else sum(lengths)

    @lazy_property
    def rows(self) -> Tensor:
        """Row of each patch's token (B, N) in the matrix that `merge` returns; meaningless where dropped."""
        starts = self.counts.cumsum(0) - self.counts
        return self.group + starts[:, None]

    @lazy_property
    def sizes(self) -> Tensor:
        """Patches in each token (T,) float32, in the order of `merge`."""
        inside = (self.group >= 0).float()
        if self.count is None:
            return sum_words(inside[..., None], self)[:, 0]
        return sum_at(inside, self.group.clamp(min=0), self.count).flatten()


def group_words(labels: Tensor, num_labels: int, grid: tuple[int, int]) -> Words:
    """Words in which all patches of one label make one token, their mean.

    Args:
        labels: (B, N) int64 in [0, num_labels), or -1 for a patch that stays as it is.
        num_labels: how many labels there can be, at least 1.
        grid: (rows, columns) of the patches.

    >>> group_words(torch.tensor([[7, -1, 7, -1]]), 10, (2, 2)).group
    tensor([[0, 1, 0, 2]])
    """
    batch, patches = labels.shape
    position = torch.arange(patches, device=labels.device).expand(batch, -1)
    # A patch without a label gets one of its own, beyond all others; the first patch of a label speaks for all of it.
    label = torch.where(labels < 0, position + num_labels, labels)
    speaker = labels.new_full((batch, num_labels + patches), patches)
    speaker = speaker.scatter_reduce(1, label, position, "amin").gather(1, label)
    opens = speaker == position
    group = (opens.cumsum(1) - 1).gather(1, speaker)
    size = torch.zeros_like(group).scatter_add(1, group, torch.ones_like(group)).gather(1, group)
    return Words(group, size.float().reciprocal(), opens.sum(1), grid)


class KeptPatches(Words):
    """Words whose tokens are patches, as they are or mostly; all but these is worked out when it is asked for.

    Args:
        kept: (B, n) int64, distinct patch indices of each image, ascending.
        grid: (rows, columns) of the patches.
        dropped: (B, N - n) int64, the other patches, if one of the kept ones stands for each.
        standing: (B, N - n) int64, the kept patch that stands for each of these.
        times: how often a kept patch counts in the mean with those that it stands for.
    """

    kept: Tensor
    dropped: Tensor | None
    standing: Tensor
    times: float

    def __init__(
        self,
        kept: Tensor,
        grid: tuple[int, int],
        dropped: Tensor | None = None,
        standing: Tensor | None = None,
        times: float = 1.0,
    ) -> None:
        own = {"kept": kept, "grid": grid, "count": kept.shape[1]}
        own |= {"dropped": dropped, "standing": standing, "times": times}
        for name, value in own.items():
            object.__setattr__(self, name, value)

    @lazy_property
    def _place(self) -> Tensor:
        """The token that each patch is itself, -1 where it is none."""
        batch, count = self.kept.shape
        place = self.kept.new_full((batch, self.grid[0] * self.grid[1]), -1)
        return place.scatter(1, self.kept, torch.arange(count, device=self.kept.device).expand(batch, -1))

    @lazy_property
    def group(self) -> Tensor:
        """See `Words`."""
        if self.dropped is None:
            return self._place
        return self._place.scatter(1, self.dropped, self._place.gather(1, self.standing))

    @lazy_property
    def weight(self) -> Tensor:
        """See `Words`."""
        if self.dropped is None:
            return (self._place >= 0).float()
        return weigh(self.group, self._place >= 0, self.sizes.view(self.kept.shape), self.times)

    @lazy_property
    def counts(self) -> Tensor:
        """See `Words`."""
        return self.kept.new_full(self.kept.shape[:1], self.kept.shape[1])

    @lazy_property
    def sizes(self) -> Tensor:
        """See `Words`."""
        ones = self.kept.new_ones(1, dtype=torch.float32)
        if self.dropped is None:
            return ones.expand(self.kept.shape[0] * self.kept.shape[1])
        others = sum_at(ones.expand(self.standing.shape), self.standing, self.grid[0] * self.grid[1])
        return (others.gather(1, self.kept) + 1).flatten()


def keep_patches(kept: Tensor, grid: tuple[int, int]) -> Words:
    """Words in which some patches (B, n) int64 are tokens as they are, and the others are dropped."""
    return KeptPatches(kept, grid)


def keep_all(batch: int, grid: tuple[int, int], device: torch.device) -> Words:
    """Words in which every patch of each image is a token as it is."""
    return KeptPatches(numbers(grid[0] * grid[1], device).expand(batch, -1), grid)


def merge(tokens: Tensor, words: Words) -> Tensor:
    """Patch tokens (B, N, C) to merged tokens (T, C), image after image; T is the sum of `words.counts`.

    Each merged token is the weighted sum of its patches, accumulated in float32 for lower precisions.
    """
    if isinstance(words, KeptPatches):
        return _merge_kept(tokens, words)
    weighted = tokens * words.weight[..., None]  # float32, or wider
    return sum_words(weighted, words).to(tokens.dtype)


def weigh(group: Tensor, kept: Tensor, sizes: Tensor, times: float) -> Tensor:
    """Each patch's share (B, N) of its token, in the mean of which a kept patch counts `times` times.

    Args:
        group: (B, N) int64, the token of each patch.
        kept: (B, N), whether it is the one of its token that is kept.
        sizes: (B, n) float32, patches in each token, in the order of their numbers.
        times: at least 1.
    """
    return torch.where(kept, times, 1.0) / (sizes.gather(1, group) + (times - 1))


def _merge_kept(tokens: Tensor, words: KeptPatches) -> Tensor:
    rows, wide = tokens.flatten(0, 1), torch.promote_types(tokens.dtype, torch.float32)
    if words.dropped is None:
        return rows.index_select(0, flat_index(words.kept, tokens.shape[1]))
    dropped = rows.index_select(0, flat_index(words.dropped, tokens.shape[1])).to(wide)
    if torch.compiler.is_exporting():
        own = sum_at(dropped.unflatten(0, words.standing.shape), words.standing, tokens.shape[1])
        sums = rows.to(wide) + own.flatten(0, 1) / words.times
    else:
        sums = rows.to(wide).index_add(0, flat_index(words.standing, tokens.shape[1]), dropped, alpha=1 / words.times)
    merged = sums.index_select(0, flat_index(words.kept, tokens.shape[1]))
    return merged.div_((words.sizes[:, None] - 1) / words.times + 1).to(tokens.dtype)


def regroup(words: Words, places: Tensor, counts: Sequence[int], times: Tensor | None = None) -> Words:
    """Words whose tokens were made into fewer ones, each a mean weighted by the patches that the former stood for.

    Args:
        words: of which image after image has T tokens.
        places: (T,) int64, the new number of each token in its image.
        counts: new tokens of each image.
        times: (T,) float32, how often each counts in its mean, beside its size; None where once each.
    """
    count = counts[0] if words.count is not None and count_images(counts) else None
    if count is not None:
        left = places.new_full(words.group.shape[:1], count)
    else:
        left = torch.tensor(counts, dtype=torch.int64, device=places.device)
    new = Words(
        torch.where(words.group >= 0, places[words.rows.clamp(min=0)], -1), words.weight, left, words.grid, count
    )
    amount = words.sizes if times is None else words.sizes * times
    if words.count is not None and count is not None:
        total = sum_at(amount.view(-1, words.count), places.view(-1, words.count), count).flatten()
    else:
        offsets = (new.counts.cumsum(0) - new.counts).repeat_interleave(words.counts)
        total = amount.new_zeros(new.number).index_add(0, places + offsets, amount)
    share = amount[words.rows.clamp(min=0)] / total[new.rows.clamp(min=0)]
    return replace(new, weight=words.weight * share)


def unmerge(merged: Tensor, words: Words) -> Tensor:
    """Inverse of `merge` on the full grid: merged tokens (T, C) to patch tokens (B, N, C).

    Every patch takes the value of its token; a dropped patch that of the nearest kept one (see `fill`).
    `unmerge(merge(x)) == x` where every group has one member.
    """
    return merged[fill(words).rows]


def fill(words: Words) -> Words:
    """The same tokens, with every dropped patch assigned to the token of the nearest patch that was not dropped.

    Nearest on the grid, Euclidean; ties go to the lower patch index.
    """
    if isinstance(words, KeptPatches) and words.dropped is not None:
        return words
    dropped = words.group < 0
    if words.count == dropped.shape[1] or (words.count is None and not _any(dropped)):
        return words
    rows, columns = words.grid
    place = torch.cartesian_prod(*(torch.arange(n, device=dropped.device) for n in (rows, columns)))
    distance = (place[:, None] - place[None]).square().sum(-1)  # (N, N)
    if words.kept is not None:
        group = torch.where(dropped, distance[words.kept].argmin(1), words.group)  # token i is the patch kept[i]
    else:
        far = rows * rows + columns * columns
        nearest = torch.stack([(distance + far * image).argmin(1) for image in dropped])
        group = words.group.gather(1, nearest)
    return Words(group, words.weight, words.counts, words.grid, words.count)


@torch.compiler.disable  # a value decides what is done next
def _any(flags: Tensor) -> bool:
    return bool(flags.any())


def sum_words(values: Tensor, words: Words) -> Tensor:
    """Sum of the values (B, N, C) of the patches of each token: (T, C)."""
    total = words.number
    index = torch.where(words.group >= 0, words.rows, total)  # one row more, for what is dropped
    sums = values.new_zeros(total + 1, values.shape[-1])
    return sums.index_add(0, index.flatten(), values.flatten(0, 1))[:total]
