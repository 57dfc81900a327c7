"""The points of a report's front: the model itself, the plan, other plans, and what they are compared with."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vwt.errors import CodebookError
from vwt.models.spec import prepare
from vwt.pictures.palette import FRONT, MODEL, PLAN
from vwt.reductions.reduction import patches_entering
from vwt.tokenizer import VWTokenizer
from vwt.tuning.plan import Plan, Point, make_strategy

NAMES = {MODEL: "the model itself", PLAN: "the plan", FRONT: "other plans"}
BATCH = 16


@dataclass(frozen=True)
class Row:
    """A point of a chart of the front.

    Attributes:
        name: of what was measured.
        method: one of `vwt.pictures.palette.LOOKS`.
        milliseconds: a batch.
        ratio: of that to the model's.
        kl: mean KL(full ‖ reduced), in nats.
        agreement: share of the images that get the model's first class.
        tokens: an image, mean over the blocks; None if unknown.
    """

    name: str
    method: str
    milliseconds: float
    ratio: float
    kl: float
    agreement: float
    tokens: float | None = None

    @property
    def label(self) -> str:
        """The method as the legend has it."""
        return NAMES.get(self.method, self.method)


def front_rows(plan: Plan, fast: VWTokenizer, pixels: Tensor) -> list[Row]:
    """The points of a plan, the slowest first.

    The tokens of a point whose codebook is gone are unknown, and a warning says so.

    Args:
        plan: of the model.
        fast: the model as planned.
        pixels: (n, C, H, W) uint8, on which tokens are counted.
    """
    rows = [row_of(plan.chosen, PLAN, fast, pixels)]
    for point in plan.front:
        if point != plan.chosen:
            method = FRONT if point.strategy is not None or point.schedule else MODEL
            rows.append(row_of(point, method, fast, pixels))
    return sorted(rows, key=lambda row: -row.milliseconds)


def row_of(point: Point, method: str, fast: VWTokenizer, pixels: Tensor) -> Row:
    """One of them."""
    try:
        tokens = tokens_of(point, fast, pixels)
    except CodebookError as error:
        warnings.warn(f"the tokens of {point.name} are not known: {error}", stacklevel=3)
        tokens = None
    return Row(point.name, method, point.milliseconds, point.ratio, point.kl, point.agreement, tokens)


@torch.inference_mode()
def tokens_of(point: Point, fast: VWTokenizer, pixels: Tensor) -> float:
    """Tokens an image, prefix tokens included, mean over blocks and images."""
    backbone = fast.backbone
    strategy = make_strategy(point.strategy)
    reduced = VWTokenizer(fast.model, strategy, point.schedule, check=False)
    seen = pixels[:1] if strategy is None or strategy.fixed_count else pixels
    counts = [n for batch in seen.split(BATCH) for n in reduced.tokenize(prepare(batch, fast.model)).counts.tolist()]
    entering = [patches_entering(point.schedule, backbone.depth, count)[:-1] for count in counts]
    return backbone.prefix + float(np.mean(entering))
