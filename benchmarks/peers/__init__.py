"""Comparators, each written from its paper in a file of its own; nothing in `vwt` depends on them."""

from peers.pad_and_mask import PadAndMask
from peers.pomt import PruneOneMoreToken
from peers.quantised import in_bfloat16, in_int8
from peers.random_drop import RandomDrop
from peers.tome import TokenMerging
from peers.topk import ClassAttentionTopK

__all__ = [
    "ClassAttentionTopK",
    "PadAndMask",
    "PruneOneMoreToken",
    "RandomDrop",
    "TokenMerging",
    "in_bfloat16",
    "in_int8",
]
