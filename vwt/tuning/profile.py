"""LatencyProfile: the latency of each part of a model over token counts, on one device, in one runtime.

Token counts include prefix tokens, here and wherever latency is predicted.
"""

import itertools
import os
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LinearRegression
from torch import nn

from vwt import hub
from vwt.documents import is_number, load_document, save_document
from vwt.errors import ArgumentError, DocumentError, MismatchError, brief
from vwt.export.runtimes import precision_of, runtime_version
from vwt.measure.environment import describe_machine, is_machine, other_threads
from vwt.models.backbone import NOTHING, Backbone
from vwt.models.spec import PatchSpec
from vwt.reductions.absorb import Absorb
from vwt.reductions.kinds import KINDS
from vwt.reductions.merge import Merge
from vwt.reductions.reduction import Reduction, patches_entering
from vwt.tuning.parts import Parts
from vwt.tuning.where import check_where, name_runtime, place

VERSION = 2  # 1 knew other reductions


POINTS = 16  # token counts that are measured


RUNS = 15  # of each part


MOST_TOKENS, MOST_BLOCKS = 1 << 20, 1 << 12  # that a file may claim: more is damage, and no model's


MOST_ERROR = 0.05  # of the predictions that are checked, in the median, without a warning


@dataclass(frozen=True)
class LatencyProfile:
    """Milliseconds a batch of a model's parts, over token counts.

    Attributes:
        model: the model's name.
        depth: its blocks.
        prefix: its prefix tokens.
        patches: of an image of the size that was measured.
        reads_prefix_only: whether the head does; then only prefix tokens go through the last MLP of a reduced model.
        batch_size: images.
        precision: of the weights, "float32".
        machine: where it was measured: "device", "cpu", "threads", "torch", "timm".
        counts: tokens an image, ascending; the last one is all.
        block: one block (the mean of all, run one after another) on so many tokens.
        attention: of that, up to what follows the attention.
        counting: one block whose attention counts merged tokens as often as there are.
        reductions: what reductions add to their blocks: "first" once a forward, and for each, by kind, a fixed part and
            one for each token that enters: fitted to whole forwards.
        embed: patches and positions.
        head: the last norm, pooling and the head.
        checks: whole forwards that the profile was not made from: "schedule", "predicted" and "measured" ms.
        runtime: in which all this was measured, see `vwt.export.runtimes.run_in`.
    """

    model: str
    depth: int
    prefix: int
    patches: int
    reads_prefix_only: bool
    batch_size: int
    precision: str
    machine: dict[str, Any]
    counts: list[int]
    block: list[float]
    attention: list[float]
    counting: list[float]
    reductions: dict[str, list[float]]
    embed: float
    head: float
    checks: list[dict[str, Any]]
    runtime: str = "torch"

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        batch_size: int = 1,
        device: torch.device | str | None = None,
        *,
        runtime: str = "torch",
        precision: str | None = None,
        points: int = POINTS,
        runs: int = RUNS,
        image_size: tuple[int, int] | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> "LatencyProfile":
        """Measure a model, all parts in turn after a warm-up, each figure the median of its runs.

        Args:
            model: see `VWTokenizer`; it is not changed.
            batch_size: images at a time.
            device: where; by default where the model is.
            runtime: "torch", "compile", "onnxruntime" or "openvino", in which everything is measured.
            precision: "float32" or "bfloat16"; by default that of the model.
            points: token counts, from few to all.
            runs: of each part.
            image_size: (height, width) of the images, for a model that takes others than those that it was made for.
            seed: of the order, and of the schedules that predictions are checked on.
            progress: show a progress bar.

        Warns if the predictions that it checks are off by more than 5 % in the median.

        Raises:
            ModelError: if the model is not supported.
            ImageError: for a size that the model does not take.
            ArgumentError: if a number is too small, there is no such device or runtime, or the model is one of images
                and text, of which its vision tower is measured.
            ExportError: if the runtime cannot hold the model.
        """
        for name, value, least in (("batch_size", batch_size, 1), ("points", points, 2), ("runs", runs, 1)):
            if value < least:
                raise ArgumentError(f"{name} is {value}; expected at least {least}")
        model = place(model, device, runtime, precision)
        parts = Parts(model, batch_size, points, image_size, seed, runtime)
        profile = cls._of(parts, parts.measure(runs, progress))
        profile._warn_if_off()
        return profile

    @classmethod
    def _of(cls, parts: Parts, ms: Mapping[Any, float]) -> "LatencyProfile":
        """The profile that milliseconds of parts make."""
        depth, counts = parts.backbone.depth, parts.counts
        block, attention, counting = (
            [ms[name, count] / depth for count in counts] for name in ("block", "attention", "counting")
        )
        profile = cls(
            **_identity(parts.backbone, parts.image_size) | {"precision": parts.precision},
            runtime=parts.runtime,
            batch_size=parts.batch_size,
            machine=describe_machine(parts.device) | runtime_version(parts.runtime),
            counts=counts,
            block=block,
            attention=attention,
            counting=counting,
            reductions={"first": [0.0], **{kind: [0.0, 0.0] for kind in KINDS}},
            embed=ms["embed"],
            head=ms["head"],
            checks=[],
        )
        forwards = [ms["forward", index] for index in range(len(parts.checks + parts.fitted))]
        if parts.fitted:
            profile.reductions.update(_fit(profile, parts.fitted, forwards[len(parts.checks) :]))
        profile.checks.extend(
            {"schedule": str(schedule), "predicted": profile.predict(schedule), "measured": measured}
            for schedule, measured in zip(parts.checks, forwards, strict=False)
        )
        return profile

    @property
    def error(self) -> float:
        """Median relative error of the predictions that were checked."""
        return statistics.median(abs(c["predicted"] / c["measured"] - 1) for c in self.checks) if self.checks else 0.0

    def _warn_if_off(self) -> None:
        if self.error > MOST_ERROR:
            warnings.warn(
                f"the profile's predictions of {len(self.checks)} forwards are off by {100 * self.error:.0f} % in the "
                "median, so that a schedule or plan made from it may miss its budget; measure again on an idle machine",
                stacklevel=3,
            )

    def predict(self, reductions: Mapping[int, Reduction] = NOTHING, patches: int | None = None) -> float:
        """Milliseconds of a whole forward.

        Args:
            reductions: in the blocks.
            patches: patch tokens that enter the first block, where a strategy reduced them; the time of the strategy
                itself is not included. Without reductions and patches, the prediction is for the full model.
        """
        last = self.depth - 1 if self.reads_prefix_only and (reductions or patches is not None) else None
        reductions = self.effective(reductions)
        entering = patches_entering(reductions, self.depth, self.patches if patches is None else patches)
        total, merged = self.embed + self.head + self._reducing(reductions, entering), False
        whole, attention, counting = (self._tables[name] for name in ("block", "attention", "counting"))
        for block in range(self.depth):
            count, left = (self.prefix + n for n in entering[block : block + 2])
            left = self.prefix if block == last else left
            total += attention[count] + whole[left] - attention[left]
            if merged:
                total += counting[count] - whole[count]
            merged = merged or isinstance(reductions.get(block), Merge | Absorb)
        return total

    def effective(self, reductions: Mapping[int, Reduction]) -> dict[int, Reduction]:
        """The reductions that happen: none in the last block where the head reads prefix tokens only."""
        blocks = self.depth - 1 if self.reads_prefix_only else self.depth
        return {block: what for block, what in reductions.items() if block < blocks}

    def _reducing(self, reductions: Mapping[int, Reduction], entering: Sequence[int]) -> float:
        weights = (self.reductions[name] for name in ("first", *KINDS))
        work = _work(reductions, [self.prefix + n for n in entering])
        return sum(weight * amount for weight, amount in zip(itertools.chain(*weights), work, strict=True))

    @cached_property
    def _tables(self) -> dict[str, list[float]]:
        """Milliseconds of one block, its attention, and one after a merge, at every count from 0 on."""
        every = np.arange(self.counts[-1] + 1)
        series = {"block": self.block, "attention": self.attention, "counting": self.counting}
        return {name: np.interp(every, self.counts, values).tolist() for name, values in series.items()}

    def knees(self) -> list[int]:
        """Token counts above which a block's latency rises at least half as steeply again as below them."""
        slopes = np.diff(self.block) / np.diff(self.counts)
        typical = (self.block[-1] - self.block[0]) / (self.counts[-1] - self.counts[0])
        steps = zip(slopes[:-1], slopes[1:], self.counts[1:-1], strict=True)
        return [count for below, above, count in steps if above - below > 0.5 * max(abs(below), typical)]

    def check(self, model: nn.Module, batch_size: int | None = None, image_size: tuple[int, int] | None = None) -> None:
        """Raise MismatchError unless it was measured on a model like this one; warn where it may not hold.

        Args:
            model: as it will be used.
            batch_size: images at a time; by default as many as were measured.
            image_size: (height, width); by default what the model was made for.
        """
        backbone = Backbone(model)
        here = _identity(backbone, image_size)
        here["batch_size"] = self.batch_size if batch_size is None else batch_size
        for name, value in here.items():
            if getattr(self, name) != value:
                raise MismatchError(
                    f"the profile was measured with {name} {getattr(self, name)!r}, here it is {value!r}; "
                    "measure this model as it is used (LatencyProfile.measure, vwt profile)"
                )
        if others := other_threads(self.machine):
            warnings.warn(f"the profile was measured with {others}; measure again with these", stacklevel=2)
        self._warn_if_off()

    @staticmethod
    def identify(model: nn.Module) -> dict[str, Any]:
        """What a profile of this model, here and now, would say of both."""
        return _identity(Backbone(model)) | describe_machine(next(model.parameters()).device)

    def elsewhere(self) -> list[str]:
        """What differs between here and where it was measured; threads and versions too."""
        on_gpu = self.machine["device"] != "cpu" and torch.cuda.is_available()
        here = describe_machine(torch.device("cuda" if on_gpu else "cpu")) | runtime_version(self.runtime)
        return [
            f"{name} {self.machine.get(name)!r}, here {value!r}"
            for name, value in here.items()
            if self.machine.get(name) != value
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON.

        Raises:
            DocumentError: if the file cannot be written.
        """
        save_document(path, "profile", VERSION, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LatencyProfile":
        """Read what `save` wrote; warns where it was measured on another machine, or with other versions.

        Args:
            path: the file; or `hf-hub:user/name` or `local-dir:FOLDER`, for the profile of a plan that was pushed.

        Raises:
            DocumentError: if the file is missing, cut short, or no profile.
            HubError: see `vwt.Plan.from_pretrained`.
        """
        if hub.has_prefix(os.fspath(path)):
            path = hub.fetch(os.fspath(path), "plan", ["profile.json"]) / "profile.json"
        own = load_document(path, "profile", VERSION, [field.name for field in fields(cls)], name_runtime)
        profile = cls.from_fields(own, str(path))
        if others := [what for what in profile.elsewhere() if not what.startswith("threads ")]:
            warnings.warn(f"the profile {path} was measured elsewhere: {'; '.join(others)}", stacklevel=2)
        return profile

    @classmethod
    def from_fields(cls, own: dict[str, Any], origin: str) -> "LatencyProfile":
        """A profile that was read.

        Raises:
            DocumentError: if it is none; `origin` names where it was read.
        """
        try:
            profile = cls(**own)
        except TypeError as error:
            raise DocumentError(f"{origin} has not the fields of a profile; measure again") from error
        profile._check_shape(origin)
        return profile

    def _check_shape(self, origin: str) -> None:
        most = {"depth": MOST_BLOCKS, "prefix": MOST_TOKENS, "patches": MOST_TOKENS, "batch_size": MOST_TOKENS}
        for name in (*most, "embed", "head"):
            value = getattr(self, name)
            whole = name not in most or (isinstance(value, int) and value <= most[name])
            if not is_number(value) or not whole or value < 0:
                raise DocumentError(f"{origin} has {name} {brief(value)}; expected a number; measure again")
        for name, kind in (("model", str), ("reads_prefix_only", bool)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise DocumentError(f"{origin} has {name} {brief(value)}; expected a {kind.__name__}; measure again")
        check_where(self.runtime, self.precision, origin, "measure again")
        checks = self.checks if isinstance(self.checks, list) else [None]
        if not all(
            isinstance(c, dict) and is_number(c.get("predicted")) and _is_positive(c.get("measured")) for c in checks
        ):
            raise DocumentError(f"{origin} has checks without figures; measure again")
        series = {name: getattr(self, name) for name in ("counts", "block", "attention", "counting")}
        lengths = dict.fromkeys(series, len(self.counts) if isinstance(self.counts, list) else 0)
        wanted = {"first": 1, **dict.fromkeys(KINDS, 2)}
        if not isinstance(self.reductions, dict) or set(self.reductions) != set(wanted) or lengths["counts"] < 2:
            raise DocumentError(
                f"{origin} has not at least two counts and the reductions {', '.join(wanted)}; measure again"
            )
        for name, values in (series | self.reductions).items():
            length = (lengths | wanted)[name]
            if not isinstance(values, list) or len(values) != length or not all(map(is_number, values)):
                raise DocumentError(f"{origin} has not {length} numbers in {name!r}; measure again")
        if sorted(set(self.counts)) != self.counts:
            raise DocumentError(f"{origin} has counts that do not rise; measure again")
        total = self.prefix + self.patches
        if not all(isinstance(count, int) for count in self.counts) or self.counts[0] < 0 or self.counts[-1] != total:
            raise DocumentError(f"{origin} has counts other than whole numbers up to all {total} tokens; measure again")
        if not is_machine(self.machine):
            raise DocumentError(f"{origin} does not say where it was measured; measure again")


def _fit(
    profile: LatencyProfile, schedules: Sequence[Mapping[int, Reduction]], forwards: Sequence[float]
) -> dict[str, list[float]]:
    """What reductions cost, from milliseconds of forwards with schedules."""
    work, unexplained = [], []
    for schedule, measured in zip(schedules, forwards, strict=True):
        entering = patches_entering(schedule, profile.depth, profile.patches)
        work.append(_work(schedule, [profile.prefix + n for n in entering]))
        unexplained.append(measured - profile.predict(schedule))
    weights = LinearRegression(positive=True, fit_intercept=False).fit(work, unexplained).coef_
    first, *rest = weights.tolist()
    return {"first": [first], **{kind: rest[2 * i : 2 * i + 2] for i, kind in enumerate(KINDS)}}


def _work(reductions: Mapping[int, Reduction], entering: Sequence[int]) -> list[float]:
    """What the cost of reductions is linear in: whether there are any, and for each kind how many and their tokens."""
    own = {kind: [entering[b] for b, what in reductions.items() if what.kind == kind] for kind in KINDS}
    amounts = [float(amount) for counts in own.values() for amount in (len(counts), sum(counts))]
    return [float(bool(reductions)), *amounts]


def _identity(backbone: Backbone, image_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """What a profile has in common with the models that it serves, on images of a size."""
    rows, columns = backbone.grid(image_size)
    return {
        "model": PatchSpec.of(backbone.tower).model,
        "depth": backbone.depth,
        "prefix": backbone.prefix,
        "patches": rows * columns,
        "reads_prefix_only": backbone.reads_prefix_only,
        "precision": precision_of(backbone.tower),
    }


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0
