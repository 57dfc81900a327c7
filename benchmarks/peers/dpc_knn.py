"""Density peaks, DPC-KNN (Du et al., 2016), of tokens as in TCFormer (Zeng et al., CVPR 2022, arXiv 2204.08680)."""

import torch
from torch import Tensor

from peers._peer import Attended, Peer, after_class_token, merge

NEIGHBOURS = 5


class DensityPeaks(Peer):
    """Patches of high density, far from any of higher density, are centres; the others join the nearest.

    A cluster becomes its mean by size, as there are no learned weights; attention is proportional. TCFormer is trained;
    so there are no rates for a model that is not.
    """

    def reduce(self, block: int, attended: Attended, tokens: Tensor, left: int) -> tuple[Tensor, Tensor]:
        """See `Peer`."""
        rows = join_peaks(tokens[:, 1:].float(), left - 1)
        return merge(tokens, attended.size, after_class_token(rows), left)


def join_peaks(points: Tensor, count: int) -> Tensor:
    """The cluster of each point (B, m) int64.

    Args:
        points: (B, m, C), compared by Euclidean distance / √C.
        count: clusters.
    """
    distance = torch.cdist(points, points) / points.shape[-1] ** 0.5
    others = distance + torch.diag_embed(distance.new_full(distance.shape[:2], torch.inf))
    nearest = others.topk(min(NEIGHBOURS, points.shape[1] - 1), dim=-1, largest=False).values
    density = (-nearest.square().mean(dim=-1)).exp()
    denser = density[:, None] > density[..., None]
    farthest = distance.amax(dim=(1, 2), keepdim=True)
    isolation = torch.where(denser, distance, farthest).amin(dim=-1)
    centres = (density * isolation).topk(count, dim=1).indices
    at = torch.arange(points.shape[0], device=points.device)[:, None]
    rows = distance[at, centres].argmin(dim=1)  # (B, count, m) to (B, m)
    rows[at, centres] = torch.arange(count, device=points.device)
    return rows
