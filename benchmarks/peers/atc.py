"""Agglomerative Token Clustering, ATC (Haurum et al., ECCV 2024, arXiv 2409.11923), off the shelf, average linkage."""

import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import linkage
from torch import Tensor

from peers._peer import Attended, Peer, after_class_token, merge


class AgglomerativeClustering(Peer):
    """Patches are clustered bottom-up by the cosine of their keys; each cluster becomes its size-weighted mean.

    Off the shelf, the paper does so in every block. The class token stays alone. Attention is proportional.
    """

    def features(self, attended: Attended, tokens: Tensor) -> Tensor:
        """What patches are compared by: (B, m, d)."""
        return attended.keys.mean(dim=1)[:, 1:]

    def reduce(self, block: int, attended: Attended, tokens: Tensor, left: int) -> tuple[Tensor, Tensor]:
        """See `Peer`."""
        unit = F.normalize(self.features(attended, tokens).float(), dim=-1)
        distance = (1 - unit @ unit.transpose(-2, -1)).clamp(min=0).cpu()
        rows = torch.stack([cluster(own, left - 1) for own in distance]).to(tokens.device)
        return merge(tokens, attended.size, after_class_token(rows), left)


class AgglomerativeClusteringOfTokens(AgglomerativeClustering):
    """The same by the cosine of the tokens themselves, which the paper compares keys with."""

    def features(self, attended: Attended, tokens: Tensor) -> Tensor:
        """See `AgglomerativeClustering`."""
        return tokens[:, 1:]


def cluster(distance: Tensor, count: int) -> Tensor:
    """Average linkage: the two clusters of least mean distance merge until so many are left.

    Args:
        distance: (m, m), symmetric.
        count: clusters, at least 1.

    Returns:
        The cluster of each point (m,) int64, from 0 to count - 1, in the order of their first points.
    """
    points = len(distance)
    upper = distance[*torch.triu_indices(points, points, offset=1)]
    members = {point: [point] for point in range(points)}
    for index, (one, other, _, _) in enumerate(linkage(upper.double().numpy(), "average")[: points - count]):
        members[points + index] = members.pop(int(one)) + members.pop(int(other))
    rows = torch.empty(points, dtype=torch.int64)
    for number, own in enumerate(sorted(members.values(), key=min)):
        rows[own] = number
    return rows
