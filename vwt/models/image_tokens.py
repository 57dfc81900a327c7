"""Which of the image features that a vision-language model makes are read, where patches share a token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vwt.tokens.words import Words


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """Which image features a language model reads of F that there are.

    Attributes:
        kept: (F,) bool, whether a feature is read.
        rows: (n,) int64, of each feature that is read its row in what `merge` makes of `words`; -1 where it is not that
            of a patch (a class token, the end of a row of tiles).
        words: of the patches of each image, or of each tile of one, those tokens that are read, in their order.
    """

    kept: Tensor
    rows: Tensor
    words: Words


def place_tokens(words: Words, patch: Tensor) -> ImageTokens:
    """One feature for each token: that of the patch that makes most of it, the first of several.

    A token of whose patches the model makes no feature is not read.

    Args:
        words: of images with N patches.
        patch: (F,) int64, in the order in which they are read, which patch each feature is of, counted over all images;
            -1 where it is of none. Such features are always kept.
    """
    device, total, features = patch.device, words.number, patch.shape[0]
    group = words.group.flatten()
    row = torch.where(group >= 0, words.rows.flatten(), total)  # one row more, for what is dropped
    row = torch.where(patch >= 0, row[patch.clamp(min=0)], total)
    weight = words.weight.flatten()[patch.clamp(min=0)]
    most = weight.new_zeros(total + 1).scatter_reduce(0, row, weight, "amax")
    main = torch.where((row < total) & (weight >= most[row]), row, total)
    order = torch.arange(features, device=device)
    place = order.new_full((total + 1,), features).scatter_reduce(0, main, order, "amin")[:total]

    image = torch.repeat_interleave(torch.arange(words.group.shape[0], device=device), words.counts)
    read = place < features
    new = (image * (features + 1) + place).argsort()[:total]  # by image, and in it by place, what is not read last
    number = torch.empty_like(new)
    counts = torch.zeros_like(words.counts).index_add(0, image, read.long())
    starts = words.counts.cumsum(0) - words.counts
    number[new] = torch.arange(total, device=device) - starts[image[new]]
    number = torch.where(read, number, -1)
    inside = words.group >= 0
    group = torch.where(inside, number[words.rows.clamp(min=0)], -1)
    left = Words(group, torch.where(group >= 0, words.weight, 0.0), counts, words.grid)

    kept = patch < 0
    kept[place[read]] = True
    old = row[kept]
    new_row = number + (counts.cumsum(0) - counts)[image]
    rows = torch.where(patch[kept] < 0, -1, torch.cat([new_row, new_row.new_tensor([-1])])[old])
    return ImageTokens(kept, rows, left)
