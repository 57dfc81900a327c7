"""vwt: visual words for Vision Transformers. Fewer tokens for timm models, without training."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from vwt import errors as errors

if TYPE_CHECKING:
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

# Where each name is; imported when it is asked for, as torch and timm take seconds.
_MODULES = {
    "Absorb": "vwt.reductions.absorb",
    "Codebook": "vwt.codebook.codebook",
    "InterImage": "vwt.strategies.inter_image",
    "IntraImage": "vwt.strategies.intra_image",
    "LatencyProfile": "vwt.tuning.profile",
    "Merge": "vwt.reductions.merge",
    "Neighbours": "vwt.strategies.neighbours",
    "Plan": "vwt.tuning.plan",
    "Prune": "vwt.reductions.prune",
    "PruningSchedule": "vwt.tuning.schedule",
    "VWTokenizer": "vwt.tokenizer",
    "build_codebook": "vwt.codebook.building",
    "tune": "vwt.tuning.tune",
}

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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
