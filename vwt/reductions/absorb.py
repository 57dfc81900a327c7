"""Absorb: each patch that goes merges into the kept one that is most like it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vwt.reductions.assignment import Assignment
from vwt.reductions.observe import attention_received, explicitly
from vwt.reductions.reduction import Reduction
from vwt.tokens.attention import Attend
from vwt.tokens.tensors import numbers, select, without_autocast

LOST = 0.4  # how much less than once a patch that joined would count if all blocks followed; see docs/operators.md


def absorb(received: Tensor, patches: Tensor, removed: int, prefix: int, following: float) -> Assignment:
    """Keep the patches of highest score; each of the others merges into the most similar kept one.

    Score: attention received times a power of the distance to the most similar patch that receives more, see
    `exponent`. Kept patches come in the order of their scores, and count twice in the mean.

    Args:
        received: (B, m) float32, the attention that each patch receives.
        patches: (B, m, C), compared by the correlation of their channels.
        removed: R patches that merge into others, at most m - 1.
        prefix: P tokens that come before the patches, and take no part.
        following: see `Reduction.assign`.
    """
    similarity, distance = isolation(received, patches)
    score = received.pow(1 / exponent(following)) * distance  # in the order of received · distance ** exponent
    order = score.sort(dim=1, descending=True).indices
    kept = order[:, : order.shape[1] - removed]
    own = numbers(kept.shape[1], kept.device).expand(kept.shape)
    target = select(similarity, kept).max(dim=1).indices.scatter(1, kept, own)
    return Assignment(target, kept.shape[1], prefix, kept)


def exponent(following: float) -> float:
    """Of the distance in the score: its root where at least half of the blocks follow; see docs/operators.md."""
    return 0.5 if following >= 0.5 else 1.0


def isolation(received: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    """How similar patches are, and how far each is from the most similar one that receives more attention.

    Args:
        received: see `absorb`.
        patches: see `absorb`.

    Returns:
        Similarity (B, m, m), the correlation times C; distance (B, m), C less the similarity, C if none receives more.
    """
    width = patches.shape[-1]
    with without_autocast(patches.device):
        unit = F.layer_norm(patches.float(), (width,), eps=1e-12)
        similarity = unit @ unit.transpose(-2, -1)  # (B, m, m), the correlation times C
    more = received[:, None] > received[..., None]
    # A copy of a patch that receives more keeps a little of its score, so that copies are ranked by attention.
    distance = (width - torch.where(more, similarity, 0.0).amax(dim=-1)).clamp(min=1e-3 * width)
    return similarity, distance


class Absorb(Reduction):
    """Keep the patches of highest score; each of the others merges into the most similar kept one.

    Score: attention received (the first term of `importance`) times the distance to the most similar patch that
    receives more, or its square root where at least half of the blocks follow: of several that are similar, one is
    enough. The kept patch counts twice in the mean, so that it stays near a token that the model knows; else the mean
    is weighted by the patches that each stands for.
    Attention counts the kept patch once and each that joined it 1 - 0.4 f times (proportional attention), f the share
    of the blocks that follow: the more of these, the further the two would have grown apart. The last `Absorb` decides
    for all patches that a token stands for. A token that attends to itself counts once.

    From the third block on this was measured to change the answer less than half as much as the same number of `Prune`
    or `Merge`, and more than half of the patches can go.

    Args:
        amount: R, at least 1, or its share of the patch tokens that enter, in (0, 1).
    """

    @staticmethod
    def most(patches: int) -> int:
        """One patch stays."""
        return patches - 1

    def watch(self, prefix: int, seen: list[Tensor]) -> Attend:
        """Explicit attention; the attention that patches receive (B, m) is kept."""
        return explicitly(seen, lambda query, key, value, weights: attention_received(weights, prefix))

    bias_on_self = False

    @staticmethod
    def key_size(
        assignment: Assignment, key_size: Tensor | None, sizes: Tensor | None, total: Tensor, following: float
    ) -> Tensor:
        """See `Reduction`: a token of s patches as 1 + (1 - 0.4 f) (s - 1)."""
        lost = LOST * following
        return (1 - lost) * total + lost

    def assign(self, seen: Tensor, tokens: Tensor, prefix: int, following: float) -> Assignment:
        """Attention received (B, m) and tokens to what is kept, and into what the others merge."""
        return absorb(seen, tokens[:, prefix:], self.removed(seen.shape[1]), prefix, following)
