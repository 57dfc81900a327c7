"""vwt: visual words for Vision Transformers. Fewer tokens for timm models, without training."""

from importlib.metadata import version

from vwt.building import build_codebook
from vwt.codebook import Codebook
from vwt.plan import Plan
from vwt.profile import LatencyProfile
from vwt.pruning import Absorb, Merge, Prune
from vwt.schedule import PruningSchedule
from vwt.strategies import InterImage, IntraImage, Neighbours
from vwt.tokenizer import VWTokenizer
from vwt.tuning import tune

__version__ = version("vwt")
__all__ = [
    "Absorb",
    "Codebook",
    "InterImage",
    "IntraImage",
    "LatencyProfile",
    "Merge",
    "Neighbours",
    "Plan",
    "Prune",
    "PruningSchedule",
    "VWTokenizer",
    "build_codebook",
    "tune",
]
