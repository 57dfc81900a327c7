"""What a tokenizer leaves of one image: before the blocks, and after each reduction inside them."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from vwt.models.spec import prepare
from vwt.reductions.reducing import follow
from vwt.tokenizer import VWTokenizer
from vwt.tokens.words import Words

DROPPED = -1


@dataclass(frozen=True, eq=False)
class Stage:
    """What is left of one image at one place.

    Attributes:
        block: the one that reduced tokens; None before the first.
        done: "enter the blocks", "pruned in block 3" or "merged in block 3".
        tokens: that are left, prefix tokens included.
        keeper: (N,) int64, the patch that has the largest share in the token of each patch (the first of those that
            have as much); `DROPPED` where a patch is dropped, or pruned into a mean.
        grid: (rows, columns) of the N patches.
    """

    block: int | None
    done: str
    tokens: int
    keeper: Tensor
    grid: tuple[int, int]

    @property
    def title(self) -> str:
        """What was done, and how many tokens are left."""
        return f"{self.done}: {self.tokens} tokens"

    @property
    def shared(self) -> set[int]:
        """The keepers of the tokens that have several patches."""
        members = Counter(self.keeper.tolist())
        return {keeper for keeper, count in members.items() if count > 1 and keeper != DROPPED}


@torch.inference_mode()
def stages(fast: VWTokenizer, image: Tensor) -> list[Stage]:
    """What enters the blocks of one image (C, H, W) uint8, and what each reduction of the schedule leaves."""
    prefix = fast.backbone.prefix
    packed, words = fast.pack(prepare(image[None], fast.model))
    dropped = words.group[0] < 0
    found = [_stage(None, "enter the blocks", prefix, words, dropped)]
    # Of a model whose head reads prefix tokens only, what the last block would reduce does not happen.
    last = fast.backbone.depth - fast.backbone.reads_prefix_only
    happens = {block: reduction for block, reduction in fast.schedule.items() if block < last}
    _, steps = fast.backbone.run(fast.backbone.pre_norm(packed), happens)
    for (block, reduction), step in zip(happens.items(), steps, strict=True):
        words, (assignment,) = follow(words, [step]), step.assignments
        token = step.counts[0] - 1  # the mean of what is pruned comes last
        if reduction.kind == "prune" and int((assignment.target == token).sum()) > 1:
            dropped = dropped | (words.group[0] == token)
        done = "pruned" if reduction.kind == "prune" else "merged"
        found.append(_stage(block, f"{done} in block {block}", prefix, words, dropped))
    return found


def _stage(block: int | None, done: str, prefix: int, words: Words, dropped: Tensor) -> Stage:
    keeper = torch.where(dropped, DROPPED, keepers(words)).cpu()
    return Stage(block, done, prefix + int(words.counts[0]), keeper, words.grid)


def keepers(words: Words) -> Tensor:
    """Of one image, the patch (N,) int64 of largest share in the token of each patch, the first of equals.

    Meaningless where a patch is dropped.
    """
    group, share = words.group[0].clamp(min=0), torch.where(words.group[0] < 0, -1.0, words.weight[0])
    tokens, patches = int(words.counts[0]), len(group)
    largest = share.new_full((tokens,), -1.0).scatter_reduce(0, group, share, "amax")
    # Shares of one token that are equal may differ by rounding.
    place = torch.arange(patches, device=group.device)
    leads = torch.where(share >= largest[group] * (1 - 1e-5), place, patches)
    return place.new_full((tokens,), patches).scatter_reduce(0, group, leads, "amin")[group]
