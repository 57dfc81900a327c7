"""PruningSchedule: which blocks reduce their tokens, by which method, and by how many."""

import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from vwt.datasets import ImageSource
from vwt.documents import load_document, save_document
from vwt.errors import ArgumentError, DocumentError, brief
from vwt.export.runtimes import check_runtime, run_in
from vwt.measure.timing import TIMED, Latency, measure_latency
from vwt.models.backbone import Backbone
from vwt.progress import Steps
from vwt.reductions.kinds import KINDS, check_amounts
from vwt.reductions.prune import Prune
from vwt.reductions.reduction import Reduction, patches_entering
from vwt.tokenizer import VWTokenizer
from vwt.tuning.calibration import ENOUGH, Calibration, load_images
from vwt.tuning.profile import LatencyProfile
from vwt.tuning.search import SCREENING_IMAGES, TRIES, Option, Search

VERSION = 1


RETRY_TRIES = 8  # candidates that are tried when a search is put right


RETRY_SECONDS = 60  # after which none is put right any more


UNSURE = 0.1  # of a ratio, by which its bounds may differ without a word


WITHIN_BUDGET = (0.97, 1.01)  # measured latency over the budget, for a search to end: it uses the budget, and keeps it


class PruningSchedule(Mapping[int, Reduction]):
    """Which blocks reduce their patch tokens, between attention and MLP.

    A mapping from the index of a block, from 0, to `Prune`, `Merge` or `Absorb`. A bare number means `Prune`. An empty
    schedule reduces nothing.

    Args:
        reductions: by block; an amount of at least 1 is a number of tokens to remove (`56`), one in (0, 1) a share of
            the patch tokens that enter the block (`0.3`).

    Raises:
        ArgumentError: if a block is not an index from 0, or an amount is out of range.

    >>> PruningSchedule({3: 56})
    PruningSchedule({3: Prune(56)})
    """

    def __init__(self, reductions: Mapping[int, int | float | Reduction]) -> None:
        if not isinstance(reductions, Mapping):
            raise ArgumentError(f"a schedule is {reductions!r}; expected a mapping such as {{3: 56, 6: Merge(40)}}")
        made = {_check_block(block): _check_reduction(what) for block, what in reductions.items()}
        self._reductions = dict(sorted(made.items()))

    def __getitem__(self, block: int) -> Reduction:
        return self._reductions[block]

    def __iter__(self) -> Iterator[int]:
        return iter(self._reductions)

    def __len__(self) -> int:
        return len(self._reductions)

    def __repr__(self) -> str:
        return f"PruningSchedule({self._reductions})"

    def __hash__(self) -> int:
        return hash(tuple(self._reductions.items()))

    def check(self, blocks: int, patches: int | None = None) -> None:
        """Raise ArgumentError unless a model of so many blocks, and patches, can do what is scheduled."""
        check_amounts(self, blocks, patches)

    @classmethod
    def from_utility(
        cls, profile: LatencyProfile, accuracy: Mapping[int, float], alpha: float = 0.5, block: int | None = None
    ) -> "PruningSchedule":
        """The schedule of Prune One More Token (section 3.1): one block prunes down to the count of highest utility.

        Args:
            profile: of the model, on the device.
            accuracy: by tokens that are left, prefix tokens included, all tokens among them; see
                `vwt.tuning.calibration.Calibration.removal`.
            alpha: weight of latency against accuracy, in [0, 1].
            block: which one prunes; by default a quarter of the way, as in the paper.

        Returns:
            The empty schedule, where all tokens have the highest utility.

        Raises:
            ArgumentError: for an alpha out of range, or counts that pruning cannot reach.
        """
        block = profile.depth // 4 if block is None else block
        curve = utility(profile, accuracy, alpha, block)
        best = max(curve, key=lambda count: (curve[count], count))
        return cls(down_to(profile, block, best))

    @classmethod
    def for_budget(
        cls,
        profile: LatencyProfile,
        model: nn.Module,
        images: Tensor | str | os.PathLike[str],
        *,
        milliseconds: float | None = None,
        ratio: float | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> "PruningSchedule":
        """The schedule within a budget of latency that changes the model's answers least.

        Searches over blocks and amounts of `Absorb`. Candidates within the budget by predicted latency are compared by
        KL(full ‖ reduced) on unlabelled images. The latency of the best is then measured beside the model; where it
        misses the budget by more than the measurement may err, the search runs again with a corrected one, up to twice
        and not after a minute, as the machine may be slower or faster than when it was profiled. A warning says where
        the measurement errs so much that another search may choose otherwise.

        Args:
            profile: of the model, on the device, in the runtime in which latency is measured.
            model: in eval mode.
            images: (n, C, H, W) normalised for the model, n at least 16, or a folder (or another data set of timm) of
                which 256 are drawn.
            milliseconds: budget for a batch; or
            ratio: budget as a share of the full model's latency.
            seed: of the draw of images.
            progress: show progress bars.

        Returns:
            The empty schedule, where the budget is as large as the full model, or no schedule would be faster.

        Raises:
            ArgumentError: for no budget, two, one that is none, or one below the least that is possible.
            MismatchError: if the profile is of another model.
            DataError: if there are too few images.
            ExportError: if the runtime cannot hold what was found.
        """
        if (milliseconds is None) == (ratio is None):
            raise ArgumentError("for_budget needs a budget: either milliseconds=… or ratio=…")
        limit = milliseconds if ratio is None else ratio * profile.predict()
        if limit is None or not 0 < limit < math.inf:
            raise ArgumentError(f"the budget is {limit} ms; expected a positive number")
        shape = images.shape if isinstance(images, Tensor) else ImageSource(os.fspath(images), model).input_size
        height, width = shape[-2:]
        Backbone(model).check_size((height, width))
        profile.check(model, image_size=(height, width))
        check_runtime(profile.runtime, profile.precision, next(model.parameters()).device)
        if limit >= profile.predict():
            return cls({})
        if not isinstance(images, Tensor):
            images = load_images(images, model, max(ENOUGH, profile.batch_size), seed=seed, progress=progress)
        if len(images) < profile.batch_size:  # before the search
            raise ArgumentError(f"{len(images)} images do not fill a batch of {profile.batch_size}; give more")
        step = Steps(3, progress)
        step(f"asking the model itself for its answers to {len(images)} images")
        calibration = Calibration(model, images, keep=SCREENING_IMAGES, progress=progress)
        step("removing tokens in one block after the other, and comparing the answers")
        search = Search(profile, {"": Option(calibration)}, progress=progress)
        step(f"searching the schedule of {limit:.2f} ms, and timing it")
        share, begin = limit / profile.predict(), time.monotonic()
        least, most = (share * bound for bound in WITHIN_BUDGET)
        found: list[tuple[Latency, PruningSchedule]] = []
        inputs = images[: TIMED * profile.batch_size].float()
        opened = partial(run_in, profile.runtime, profile.precision, example=inputs[: profile.batch_size])
        full = opened(model)
        for tries in (TRIES, RETRY_TRIES, RETRY_TRIES):
            schedule = cls(search.best(limit, tries).candidate.blocks)
            fast = VWTokenizer(model, schedule=schedule, check=False)  # as it was by the calibration
            _, own = measure_latency(full, [opened(fast)], inputs, profile.batch_size, seed=seed, progress=progress)
            found.append((own, schedule))
            step.found(f"it takes {own.ratio:.2f} of the model's time: {schedule}")
            keeps_budget = own.bounds[0] <= most and own.bounds[1] >= least
            if keeps_budget or time.monotonic() - begin > RETRY_SECONDS:
                break
            limit = max(limit * share / own.ratio, search.least())
        own, schedule = min(found, key=lambda each: (each[0].bounds[0] > most, abs(each[0].ratio - share)))
        low, high = own.bounds
        if high - low > UNSURE * own.ratio:
            warnings.warn(
                f"the schedule takes {own.ratio:.2f} of the model's time, somewhere between {low:.2f} and {high:.2f} "
                "(95 % confidence), so that another search may choose another one; search again on an idle machine",
                stacklevel=2,
            )
        return schedule

    def table(self, profile: LatencyProfile) -> str:
        """Tokens that enter each block, what it removes, and predicted milliseconds, as a table of text."""
        happens = profile.effective(self)
        entering = patches_entering(happens, profile.depth, profile.patches)
        lines = [f"{'block':>5}  {'tokens':>6}  reduction"]
        for block, count in enumerate(entering[:-1]):
            what = repr(self[block]) if block in self else ""
            idle = "" if block in happens or not what else ", without effect"
            lines.append(f"{block:>5}  {profile.prefix + count:>6}  {what}{idle}".rstrip())
        full, own = profile.predict(), profile.predict(self)
        lines.append(f"predicted {own:.2f} ms of {full:.2f} ms ({own / full:.3f}) for a batch of {profile.batch_size}")
        return "\n".join(lines)

    def to_json(self) -> list[dict[str, Any]]:
        """As it is written into files."""
        return [{"block": b, "operation": what.kind, "amount": what.amount} for b, what in self.items()]

    @classmethod
    def from_json(cls, rows: Any, origin: str = "the schedule") -> "PruningSchedule":
        """What `to_json` gave.

        Raises:
            DocumentError: if that is something else; `origin` names where it was read.
        """
        reductions: dict[int, Reduction] = {}
        if not isinstance(rows, list):
            raise DocumentError(f"{origin} has reductions of type {type(rows).__name__}; expected a list of them")
        for row in rows:
            if not isinstance(row, dict) or set(row) != {"block", "operation", "amount"}:
                raise DocumentError(
                    f"{origin} has the reduction {brief(row)}; expected a block, an operation and an amount"
                )
            reduction = read_reduction(row, origin)
            try:
                block = _check_block(row["block"])
            except ArgumentError as error:
                raise DocumentError(f"{origin} has the reduction {brief(row)}: {error}") from error
            if block in reductions:
                raise DocumentError(f"{origin} names block {block} twice; expected one reduction a block")
            reductions[block] = reduction
        return cls(reductions)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON.

        Raises:
            DocumentError: if the file cannot be written.
        """
        save_document(path, "schedule", VERSION, {"reductions": self.to_json()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PruningSchedule":
        """Read what `save` wrote.

        Raises:
            DocumentError: if the file is missing, cut short, or no schedule.
        """
        fields = load_document(path, "schedule", VERSION, ("reductions",))
        return cls.from_json(fields["reductions"], str(path))


def read_reduction(row: Mapping[str, Any], origin: str) -> Reduction:
    """A reduction of a file, of its "operation" and "amount"; raises DocumentError if it is none."""
    kind = KINDS.get(str(row["operation"]))
    if kind is None:
        operation, known = brief(row["operation"]), " or ".join(KINDS)
        raise DocumentError(f"{origin} has the operation {operation}; expected {known}")
    try:
        return kind(row["amount"])
    except (ArgumentError, TypeError) as error:
        raise DocumentError(f"{origin} has the reduction {brief(row)}: {error}") from error


def _check_block(block: Any) -> int:
    if not isinstance(block, int) or isinstance(block, bool) or block < 0:
        raise ArgumentError(f"the schedule names block {brief(block)}; expected an index from 0")
    return block


def _check_reduction(what: Any) -> Reduction:
    if not isinstance(what, Reduction):
        return Prune(what)
    if type(what) not in KINDS.values():
        raise ArgumentError(
            f"the schedule has {what!r}; expected a number, {' or '.join(k.__name__ for k in KINDS.values())}"
        )
    return what


def utility(profile: LatencyProfile, accuracy: Mapping[int, float], alpha: float, block: int) -> dict[int, float]:
    """U(n) = α · (1 - L(n) / max L) + (1 - α) · A(n) / max A of Prune One More Token, section 3.1.

    L(n) is the latency of the whole model when n tokens are left after pruning in that block: what is measured is what
    is deployed.

    Args:
        profile: of the model.
        accuracy: A by tokens that are left, prefix tokens included.
        alpha: in [0, 1].
        block: which one prunes.

    Raises:
        ArgumentError: for an alpha out of range, or counts that pruning cannot reach.
    """
    if not 0 <= alpha <= 1:
        raise ArgumentError(f"alpha is {alpha}; expected a weight in [0, 1]")
    total = profile.prefix + profile.patches
    if total not in accuracy or max(accuracy.values()) <= 0:
        raise ArgumentError(
            f"accuracy is known for {sorted(accuracy)} tokens; expected {total}, all of them, among these"
        )
    latency = {count: profile.predict(down_to(profile, block, count)) for count in accuracy}
    slowest, best = max(latency.values()), max(accuracy.values())
    return {n: alpha * (1 - latency[n] / slowest) + (1 - alpha) * accuracy[n] / best for n in sorted(accuracy)}


def down_to(profile: LatencyProfile, block: int, count: int) -> dict[int, Reduction]:
    """Pruning in a block that leaves so many tokens."""
    removed = profile.prefix + profile.patches - count
    if removed:
        PruningSchedule({block: removed}).check(profile.depth, profile.patches)
    return {block: Prune(removed)} if removed else {}
