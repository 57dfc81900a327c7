"""PiToMe (Tran et al., NeurIPS 2024, arXiv 2405.16148): patches in dense regions of feature space merge."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peers._peer import Attended, Peer, after_class_token, check_model, merge, select
from vwt.errors import ArgumentError

MARGIN = 0.9  # in the first block, from where it falls to 0


class EnergyMerging(Peer):
    """The 2 R patches of highest energy are split in two; each of one half merges into the most similar of the other.

    Energy: the mean over patches of the cosine of the keys, where it is at least a margin, else of
    exp(cosine - margin) - 1. Attention is proportional.
    """

    @classmethod
    def keeping(cls, model: Any, rate: float) -> "EnergyMerging":
        """With a share of the patches kept in every block, as the paper does it."""
        if not 0.5 <= rate < 1:
            raise ArgumentError(f"the rate is {rate}; expected a share of patches to keep in [0.5, 1)")
        check_model(model)
        count, removed = model.patch_embed.num_patches, {}
        for block in range(len(model.blocks)):
            removed[block] = int(count - count * rate + 1e-9)
            count -= removed[block]
        return cls(model, removed)

    @staticmethod
    def most(patches: int) -> int:
        """See `Peer`: half of the patches merge into the other half."""
        return patches // 2

    def reduce(self, block: int, attended: Attended, tokens: Tensor, left: int) -> tuple[Tensor, Tensor]:
        """See `Peer`."""
        margin = MARGIN * (1 - block / len(self.model.blocks))
        rows = match_energetic(attended.keys.mean(dim=1)[:, 1:].float(), tokens.shape[1] - left, margin)
        return merge(tokens, attended.size, after_class_token(rows), left)


def match_energetic(metric: Tensor, r: int, margin: float) -> Tensor:
    """The place of each patch (B, m) int64 when r of them merge: first those of low energy, then the other half's.

    Args:
        metric: (B, m, d), compared by cosine.
        r: patches that merge, at most m // 2.
        margin: cosine from which on a patch is a neighbour.
    """
    unit = F.normalize(metric, dim=-1)
    cosine = unit @ unit.transpose(-2, -1)
    energy = torch.where(cosine >= margin, cosine, (cosine - margin).exp() - 1).mean(dim=-1)
    order = energy.sort(dim=1, descending=True).indices
    one, other = order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2]
    partner = select(select(cosine, one).transpose(1, 2), other).argmax(dim=1)  # (B, r), cosine (B, other, one)
    protected = order.shape[1] - 2 * r
    places = torch.arange(protected + r, device=metric.device).expand(metric.shape[0], -1)
    rows = torch.empty_like(order).scatter(1, torch.cat([order[:, 2 * r :], other], dim=1), places)
    return rows.scatter(1, one, protected + partner)
