"""The kinds of reductions, by the names that files have for them."""

from vwt.reductions.absorb import Absorb
from vwt.reductions.merge import Merge
from vwt.reductions.prune import Prune
from vwt.reductions.reduction import Reduction

KINDS: dict[str, type[Reduction]] = {"prune": Prune, "merge": Merge, "absorb": Absorb}
