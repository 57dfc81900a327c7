"""LatencyProfile: the latency of each part of a model over token counts, on one device.

Token counts include prefix tokens, here and wherever latency is predicted.
"""

import copy
import itertools
import os
import random
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import timm
import torch
from sklearn.linear_model import LinearRegression
from torch import nn

from vwt.documents import load_document, save_document
from vwt.errors import ArgumentError, DocumentError, MismatchError
from vwt.measure.environment import cpu_model
from vwt.measure.timing import Calls, interleave
from vwt.models.backbone import NOTHING, Backbone
from vwt.models.checking import check_parts
from vwt.models.spec import PatchSpec
from vwt.reductions.absorb import Absorb
from vwt.reductions.kinds import KINDS
from vwt.reductions.merge import Merge
from vwt.reductions.reduction import Reduction, patches_entering
from vwt.tokens.attention import run_blocks
from vwt.tokens.packing import Packed

VERSION = 2  # 1 knew other reductions


POINTS = 16  # token counts that are measured


RUNS = 15  # of each part


FORWARDS = 40  # forwards with schedules, from which what reductions cost is fitted


CHECKS = 8  # of them, on which predictions are checked, and from which nothing is fitted


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
        dtype: of the weights, "float32".
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
    """

    model: str
    depth: int
    prefix: int
    patches: int
    reads_prefix_only: bool
    batch_size: int
    dtype: str
    machine: dict[str, Any]
    counts: list[int]
    block: list[float]
    attention: list[float]
    counting: list[float]
    reductions: dict[str, list[float]]
    embed: float
    head: float
    checks: list[dict[str, Any]]

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        batch_size: int = 1,
        device: torch.device | str | None = None,
        *,
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
            points: token counts, from few to all.
            runs: of each part.
            image_size: (height, width) of the images, for a model that takes others than those that it was made for.
            seed: of the order, and of the schedules that predictions are checked on.
            progress: show a progress bar.

        Raises:
            ModelError: if the model is not supported.
            ImageError: for a size that the model does not take.
            ArgumentError: if a number is too small, there is no such device, or the model is one of images and text, of
                which its vision tower is measured.
        """
        for name, value, least in (("batch_size", batch_size, 1), ("points", points, 2), ("runs", runs, 1)):
            if value < least:
                raise ArgumentError(f"{name} is {value}; expected at least {least}")
        parts = _Parts(_on_device(model, device), batch_size, points, image_size, seed)
        calls = parts.calls()
        with torch.inference_mode():
            seconds = interleave(
                list(calls.values()), 1, runs, device=parts.device, warmup=1, seed=seed, progress=progress
            )
        ms = {name: 1e3 * float(np.median(timed["run"])) for name, timed in zip(calls, seconds, strict=True)}
        return parts.profile(cls, ms)

    @property
    def error(self) -> float:
        """Median relative error of the predictions that were checked."""
        return statistics.median(abs(c["predicted"] / c["measured"] - 1) for c in self.checks) if self.checks else 0.0

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
        """Raise MismatchError unless it was measured on a model like this one; warn where it had other threads.

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

    @staticmethod
    def identify(model: nn.Module) -> dict[str, Any]:
        """What a profile of this model, here and now, would say of both."""
        return _identity(Backbone(model)) | _machine(next(model.parameters()).device)

    def elsewhere(self) -> list[str]:
        """What differs between here and where it was measured; threads and versions too."""
        on_gpu = self.machine["device"] != "cpu" and torch.cuda.is_available()
        here = _machine(torch.device("cuda" if on_gpu else "cpu"))
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

        Raises:
            DocumentError: if the file is missing, cut short, or no profile.
        """
        own = load_document(path, "profile", VERSION, [field.name for field in fields(cls)])
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
        whole = ("depth", "prefix", "patches", "batch_size")
        numbers = {name: getattr(self, name) for name in (*whole, "embed", "head")}
        for name, value in numbers.items():
            if not isinstance(value, int if name in whole else int | float) or isinstance(value, bool) or value < 0:
                raise DocumentError(f"{origin} has {name} {value!r}; expected a number; measure again")
        checks = self.checks if isinstance(self.checks, list) else [None]
        if not all(isinstance(c, dict) and {"predicted", "measured"} <= set(c) for c in checks):
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
            if (
                not isinstance(values, list)
                or len(values) != length
                or not all(isinstance(v, int | float) for v in values)
            ):
                raise DocumentError(f"{origin} has not {length} numbers in {name!r}; measure again")
        if sorted(set(self.counts)) != self.counts:
            raise DocumentError(f"{origin} has counts that do not rise; measure again")
        if not isinstance(self.machine, dict) or not isinstance(self.machine.get("device"), str):
            raise DocumentError(f"{origin} does not say where it was measured; measure again")


class _Parts:
    """What is timed for a profile, and how the times make it."""

    def __init__(
        self, model: nn.Module, batch_size: int, points: int, image_size: tuple[int, int] | None, seed: int
    ) -> None:
        self.backbone, self.batch_size = Backbone(model), batch_size
        check_parts(self.backbone)
        self.backbone.check_alone()
        weight = next(model.parameters())
        self.device = weight.device
        generator = torch.Generator().manual_seed(seed)
        channels, *size = self.backbone.input_shape
        self.image_size = (size[0], size[1]) if image_size is None else image_size
        self.images = torch.randn(batch_size, channels, *self.image_size, generator=generator).to(weight)
        self.backbone.check(self.images)
        with torch.inference_mode():
            self.everything, self.words = self.backbone.pack_all(self.images)
        prefix, total = self.backbone.prefix, self.everything.lengths[0]
        least = min(prefix + 1, total)
        self.counts = sorted({round(count) for count in np.linspace(least, total, points)})
        self.schedules = _random_schedules(self.backbone.depth, total - prefix, seed)

    def packed(self, count: int) -> Packed:
        """The first tokens of each image."""
        return self.everything.take(torch.arange(count, device=self.device).expand(self.batch_size, -1))

    def calls(self) -> dict[Any, Calls]:
        """What is timed, by its place in the profile."""
        backbone, everything = self.backbone, self.everything
        calls: dict[Any, Callable[[], Any]] = {
            "embed": lambda: backbone.pre_norm(backbone.pack_all(self.images)[0]),
            "head": lambda: backbone.head(backbone.final_norm(everything), self.words),
        }
        for count in self.counts:
            packed = self.packed(count)
            key_size = replace(packed, key_size=torch.ones_like(packed.values[:, 0].float()))
            calls["block", count] = partial(backbone.run, packed)
            calls["attention", count] = partial(self._attention, packed)
            calls["counting", count] = partial(backbone.run, key_size)
        for index, reductions in enumerate(self.schedules):
            calls["forward", index] = partial(self._forward, reductions)
        return {name: {"run": _ignoring_item(call)} for name, call in calls.items()}

    def _attention(self, packed: Packed) -> None:
        for block in self.backbone.blocks:
            packed = run_blocks(self.backbone.halves(block)[0], packed)

    def _forward(self, reductions: Mapping[int, Reduction]) -> None:
        if not reductions:
            self.backbone.model(self.images)
            return
        packed, words = self.backbone.pack_all(self.images)
        self.backbone.classify(self.backbone.pre_norm(packed), words, reductions)

    def profile(self, cls: type[LatencyProfile], ms: dict[Any, float]) -> LatencyProfile:
        """Milliseconds by place to the profile."""
        depth, counts = self.backbone.depth, self.counts
        block, attention, counting = (
            [ms[name, count] / depth for count in counts] for name in ("block", "attention", "counting")
        )
        profile = cls(
            **_identity(self.backbone, self.image_size),
            batch_size=self.batch_size,
            machine=_machine(self.device),
            counts=counts,
            block=block,
            attention=attention,
            counting=counting,
            reductions={"first": [0.0], **{kind: [0.0, 0.0] for kind in KINDS}},
            embed=ms["embed"],
            head=ms["head"],
            checks=[],
        )
        forwards = [ms["forward", index] for index in range(len(self.schedules))]
        profile.reductions.update(self._fit(profile, forwards[CHECKS:]))
        profile.checks.extend(
            {"schedule": str(schedule), "predicted": profile.predict(schedule), "measured": measured}
            for schedule, measured in zip(self.schedules[:CHECKS], forwards, strict=False)
        )
        return profile

    def _fit(self, profile: LatencyProfile, forwards: Sequence[float]) -> dict[str, list[float]]:
        """What reductions cost, from milliseconds of forwards with all schedules but those of the checks."""
        depth = self.backbone.depth
        work, unexplained = [], []
        for schedule, measured in zip(self.schedules[CHECKS:], forwards, strict=True):
            entering = patches_entering(schedule, depth, profile.patches)
            work.append(_work(schedule, [profile.prefix + n for n in entering]))
            unexplained.append(measured - profile.predict(schedule))
        weights = LinearRegression(positive=True, fit_intercept=False).fit(work, unexplained).coef_
        first, *rest = weights.tolist()
        return {"first": [first], **{kind: rest[2 * i : 2 * i + 2] for i, kind in enumerate(KINDS)}}


def _ignoring_item(call: Callable[[], Any]) -> Callable[[int], Any]:
    return lambda item: call()


def _work(reductions: Mapping[int, Reduction], entering: Sequence[int]) -> list[float]:
    """What the cost of reductions is linear in: whether there are any, and for each kind how many and their tokens."""
    own = {kind: [entering[b] for b, what in reductions.items() if what.kind == kind] for kind in KINDS}
    amounts = [float(amount) for counts in own.values() for amount in (len(counts), sum(counts))]
    return [float(bool(reductions)), *amounts]


def _random_schedules(depth: int, patches: int, seed: int) -> list[dict[int, Reduction]]:
    """The empty schedule, and schedules of one to three reductions."""
    rng = random.Random(seed)
    schedules: list[dict[int, Reduction]] = [{}]
    while len(schedules) < FORWARDS:
        blocks = rng.sample(range(depth), min(depth, rng.randint(1, 3)))
        shares = [rng.uniform(0.05, 0.45) for _ in blocks]
        made = {b: KINDS[rng.choice(list(KINDS))](share) for b, share in zip(blocks, shares, strict=True)}
        if patches_entering(made, depth, patches)[-1] < patches:
            schedules.append(made)
    return schedules


def _identity(backbone: Backbone, image_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """What a profile has in common with the models that it serves, on images of a size."""
    rows, columns = backbone.family.grid(backbone.input_shape[1:] if image_size is None else image_size)
    return {
        "model": PatchSpec.of(backbone.tower).model,
        "depth": backbone.depth,
        "prefix": backbone.prefix,
        "patches": rows * columns,
        "reads_prefix_only": backbone.reads_prefix_only,
        "dtype": str(next(backbone.tower.parameters()).dtype).removeprefix("torch."),
    }


def other_threads(machine: Mapping[str, Any]) -> str:
    """What differs in threads between here and a machine of a profile or plan, on a CPU; nothing if nothing does."""
    there, here = machine.get("threads"), torch.get_num_threads()
    differ = machine.get("device") == "cpu" and there is not None and there != here
    return f"{there} threads, here torch has {here} (torch.set_num_threads, --threads)" if differ else ""


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "timm": timm.__version__,
    }


def _on_device(model: nn.Module, device: torch.device | str | None) -> nn.Module:
    if device is None or torch.device(device) == next(model.parameters()).device:
        return model
    try:
        return copy.deepcopy(model).to(device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"no device {str(device)!r}: {error}") from error
