"""DiffRate (Chen et al., ICCV 2023, arXiv 2305.17997): its operator, and the rates that it learned for DeiT."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers._peer import Attended, Peer, check_model, select
from vwt.errors import ArgumentError
from vwt.tokens.tensors import flat_index

# Tokens that pruning and then merging leave in each block of DeiT, class token included, by GMACs; as published beside
# the paper's code. 0 is the first block.
DEIT_TINY = {
    "0.8": (
        (197, 197, 196, 186, 166, 147, 117, 103, 92, 80, 74, 3),
        (197, 196, 190, 172, 154, 125, 107, 96, 84, 78, 70, 3),
    ),
    "0.9": (
        (197, 197, 196, 190, 182, 166, 141, 125, 113, 105, 99, 3),
        (197, 196, 194, 188, 172, 147, 129, 115, 107, 103, 96, 3),
    ),
    "1.0": (
        (197, 197, 196, 194, 188, 184, 178, 164, 156, 137, 129, 21),
        (197, 197, 196, 190, 186, 154, 148, 156, 145, 135, 125, 21),
    ),
}
DEIT_SMALL = {
    "2.3": (
        (197, 192, 168, 143, 121, 105, 92, 74, 62, 45, 33, 3),
        (197, 180, 156, 127, 109, 98, 80, 66, 52, 37, 31, 3),
    ),
    "2.9": (
        (197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3),
        (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3),
    ),
    "3.1": (
        (197, 197, 194, 180, 160, 147, 137, 129, 115, 92, 76, 3),
        (197, 196, 186, 164, 150, 141, 133, 121, 103, 78, 68, 3),
    ),
}
DEIT = {"DeiT-Tiny": DEIT_TINY, "DeiT-Small": DEIT_SMALL}
RATES = DEIT_TINY | DEIT_SMALL


def nearest(width: int) -> str:
    """The DeiT whose rates suit a model of so many channels."""
    return "DeiT-Small" if width >= 384 else "DeiT-Tiny"


class DiffRate(Peer):
    """Patches are ranked by class attention: the last are dropped, those before them merge into the most similar one.

    Similarity is the cosine of tokens, and only patches that stay are merged into; the merged token is the plain mean.
    A merged patch adds its size times its similarity (at least 0), as in the published code.

    Args:
        model: see `Peer`.
        removed: see `Peer`.
        pruned: how many of these are dropped; by default all merge.
    """

    def __init__(self, model: nn.Module, removed: Mapping[int, int], pruned: Mapping[int, int] | None = None) -> None:
        super().__init__(model, removed)
        self.pruned = dict(pruned or {})

    @classmethod
    def published(cls, model: Any, gmacs: str) -> "DiffRate":
        """With those of `RATES`.

        Raises:
            ArgumentError: for a model of another number of blocks or tokens.
        """
        check_model(model)
        pruning, merging = RATES[gmacs]
        count, removed, pruned = pruning[0], {}, {}
        blocks, tokens = len(model.blocks), 1 + model.patch_embed.num_patches
        if (blocks, tokens) != (len(pruning), count):
            raise ArgumentError(
                f"DiffRate's rates for DeiT are for {len(pruning)} blocks and {count} tokens, not {blocks} and {tokens}"
            )
        for block, (after_pruning, after_merging) in enumerate(zip(pruning, merging, strict=True)):
            stay = min(count, after_pruning)
            pruned[block] = count - stay
            removed[block] = count - min(stay, after_merging)
            count -= removed[block]
        return cls(model, removed, pruned)

    def reduce(self, block: int, attended: Attended, tokens: Tensor, left: int) -> tuple[Tensor, Tensor]:
        """See `Peer`."""
        size = tokens.new_ones(tokens.shape[:2], dtype=torch.float32) if attended.size is None else attended.size
        order = F.pad(attended.of_class_token().sort(dim=1, descending=True).indices + 1, (1, 0))
        order = order[:, : tokens.shape[1] - self.pruned.get(block, 0)]
        tokens, size = select(tokens, order), size.gather(1, order)
        return merge_last(tokens, size, left) if tokens.shape[1] > left else (tokens, size)


def merge_last(tokens: Tensor, size: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """Merge all but the first `left` of the tokens (B, n, C), the class token first, into the most similar of these.

    Returns:
        Tokens (B, left, C) and their sizes (B, left) float32.
    """
    unit = F.normalize(tokens.float(), dim=-1)
    similarity, target = (unit[:, left:] @ unit[:, 1:left].transpose(-2, -1)).max(dim=-1)
    index = flat_index(target + 1, left)  # no patch joins the class token

    def add(values: Tensor, to: Tensor) -> Tensor:
        return to.flatten(0, 1).index_add(0, index, values.flatten(0, 1)).view(to.shape)

    members = add(torch.ones_like(similarity), torch.ones_like(size[:, :left]))
    means = add(tokens[:, left:], tokens[:, :left]) / members[..., None].to(tokens.dtype)
    return means, add(size[:, left:] * similarity.clamp(min=0), size[:, :left])
