"""The points of a report's front: the model itself, the plan, other plans, and what they are compared with."""

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vwt.documents import is_number
from vwt.errors import CodebookError, DocumentError, MismatchError
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


def read_peers(path: str | os.PathLike[str], plan: Plan) -> list[Row]:
    """The points of other methods, as `benchmarks/fidelity.py --results-file` wrote them.

    Their latency is a ratio to the model's in their own run; its milliseconds are that of the model's in the plan.

    Raises:
        DocumentError: if the file cannot be read, or has no such points.
        MismatchError: if they are of another model, or the plan is not for one image at a time, as they are.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        model, table = str(content["arguments"]["model"]), list(content["tables"]["fidelity"])
        rows = [row for row in table if all(is_number(row.get(name)) for name in ("ratio", "kl", "agreement"))]
    except OSError as error:
        raise DocumentError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DocumentError(f"{path} has no table of fidelity; give what benchmarks/fidelity.py wrote") from error
    if model.split(".")[0] != plan.model.split(".")[0] or plan.batch_size != 1:
        raise MismatchError(
            f"{path} is of {model}, an image at a time; the plan is of {plan.model}, {plan.batch_size} at a time"
        )
    whole = plan.chosen.milliseconds / plan.chosen.ratio
    return [
        Row(str(row["name"]), str(row["group"]), row["ratio"] * whole, row["ratio"], row["kl"], row["agreement"],
            row.get("tokens"))
        for row in rows
        if row["kl"] > 0
    ]  # fmt: skip
