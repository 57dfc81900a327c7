"""Comparators, each written from its paper in a file of its own; nothing in `vwt` depends on them."""

from peers._peer import Peer, check_model
from peers.atc import AgglomerativeClustering, AgglomerativeClusteringOfTokens
from peers.diffrate import DiffRate
from peers.dpc_knn import DensityPeaks
from peers.pad_and_mask import PadAndMask
from peers.pitome import EnergyMerging
from peers.pomt import PruneOneMoreToken
from peers.ppt import PruneOrPool
from peers.quantised import in_bfloat16, in_int8
from peers.random_drop import RandomDrop, RandomDropInside
from peers.tome import TokenMerging
from peers.topk import ClassAttentionTopK

__all__ = [
    "AgglomerativeClustering",
    "AgglomerativeClusteringOfTokens",
    "ClassAttentionTopK",
    "DensityPeaks",
    "DiffRate",
    "EnergyMerging",
    "PadAndMask",
    "Peer",
    "PruneOneMoreToken",
    "PruneOrPool",
    "RandomDrop",
    "RandomDropInside",
    "TokenMerging",
    "check_model",
    "in_bfloat16",
    "in_int8",
]
