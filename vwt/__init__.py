"""vwt: visual words for Vision Transformers. Fewer tokens for timm models, without training."""

from importlib.metadata import version

from vwt.codebook.building import build_codebook
from vwt.codebook.codebook import Codebook
from vwt.reductions.absorb import Absorb
from vwt.reductions.merge import Merge
from vwt.reductions.prune import Prune
from vwt.strategies.inter_image import InterImage
from vwt.strategies.intra_image import IntraImage
from vwt.strategies.neighbours import Neighbours
from vwt.tokenizer import VWTokenizer
from vwt.tuning.plan import Plan
from vwt.tuning.profile import LatencyProfile
from vwt.tuning.schedule import PruningSchedule
from vwt.tuning.tune import tune

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
