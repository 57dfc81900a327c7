"""The kinds of reductions, by the names that files have for them, and whether a model can do what is asked."""

from collections.abc import Mapping

from vwt.errors import ArgumentError
from vwt.reductions.absorb import Absorb
from vwt.reductions.merge import Merge
from vwt.reductions.prune import Prune
from vwt.reductions.reduction import Reduction

KINDS: dict[str, type[Reduction]] = {"prune": Prune, "merge": Merge, "absorb": Absorb}


def check_amounts(reductions: Mapping[int, Reduction], blocks: int, patches: int | None = None) -> None:
    """Raise ArgumentError unless a model can do what is asked.

    Args:
        reductions: by block.
        blocks: the model's depth.
        patches: patch tokens (or words) that enter the first block, None where images differ. An image that has too few
            loses as many as it can.
    """
    for block, reduction in sorted(reductions.items()):
        if block not in range(blocks):
            raise ArgumentError(
                f"the schedule names block {block}; expected one of the model's {blocks}, from 0 to {blocks - 1}"
            )
        if patches is None:
            continue
        wanted, most = reduction.wanted(patches), reduction.most(patches)
        if not 1 <= wanted <= most:
            expected = f"expected 1 to {most}" if most > 0 else "leave the block out, nothing can go there"
            raise ArgumentError(
                f"{reduction} in block {block} removes {wanted} of the {patches} patch tokens that enter it; {expected}"
            )
        patches -= wanted
