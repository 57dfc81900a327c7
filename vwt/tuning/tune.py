"""tune: a strategy and a schedule for a model on this device, within a budget, in one call."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vwt.codebook.codebook import pin
from vwt.errors import ArgumentError
from vwt.export.formats import Run
from vwt.export.runtimes import EXPORTED, run_in
from vwt.measure.timing import TIMED, Calls, interleave, measure_latency, on_batches
from vwt.models.backbone import Backbone
from vwt.progress import Steps
from vwt.strategies.neighbours import Neighbours
from vwt.strategies.strategy import Strategy
from vwt.tokenizer import VWTokenizer
from vwt.tuning.calibration import ENOUGH, Calibration, check_enough, load_images
from vwt.tuning.goal import check_goal, choose
from vwt.tuning.notes import Notes, hold
from vwt.tuning.plan import Plan, Point, describe, describe_goal, front_of, make_strategy
from vwt.tuning.profile import LatencyProfile
from vwt.tuning.prompts import tune_on_prompts
from vwt.tuning.schedule import PruningSchedule
from vwt.tuning.search import FINALISTS, SCREENING_IMAGES, TRIES, Candidate, Option, Outcome, Search
from vwt.tuning.where import place

DROPS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45)  # of Neighbours


THRESHOLDS = (0.05, 0.1, 0.2)  # of InterImage, if there is a codebook


RATIOS = (0.9, 0.8, 0.7, 0.6)  # of the front


FEW = 10  # candidates that are measured for each of them


COST_RUNS = 20  # of each strategy


def tune(
    model: nn.Module,
    images: Tensor | str | os.PathLike[str] | None = None,
    *,
    prompts: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ratio: float | None = None,
    milliseconds: float | None = None,
    agreement: float | None = None,
    batch_size: int = 1,
    runtime: str = "torch",
    precision: str | None = None,
    codebooks: Sequence[str | os.PathLike[str]] = (),
    seed: int = 0,
    notes: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Plan:
    """Find the plan of lowest KL(full ‖ reduced) within a latency budget, or the fastest of a given agreement.

    Profiles the model on this device in a runtime, compares strategies and schedules on unlabelled images by predicted
    latency and KL divergence, and measures the latency of the best. KL and agreement are those of torch, whose
    arithmetic other runtimes do. A model whose language model reads image tokens in its prompt
    (LLaVA, PaliGemma) is tuned on prompts instead, see `vwt.tuning.prompts.tune_on_prompts`.

    Args:
        model: in eval mode, where and as it will be used; without classes, see `vwt.tuning.calibration.Calibration`.
        images: (n, C, H, W) normalised for the model, n at least 16, or a folder (or another data set of timm) of which
            256 are drawn.
        prompts: of a model that reads image tokens in its prompt, and in the place of images: what its processor makes
            of each image and its text, on the model's device. Neither batch_size, runtime and precision nor codebooks
            or notes go with them.
        ratio: budget as a share of the full model's latency, in (0, 1]; or
        milliseconds: budget for a batch.
        agreement: least share of the images, in (0, 1], whose top-1 class must be the full model's, or share of the
            prompts whose first next token must be; alone, or with a budget.
        batch_size: images at a time.
        runtime: "torch", "compile", "onnxruntime" or "openvino", in which latency is measured; see
            `vwt.export.runtimes.run_in`.
        precision: "float32" or "bfloat16", of which the plan is; by default that of the model.
        codebooks: paths, URLs or `hf-hub:user/name`, to try inter-image words too.
        seed: of the draw and of the order of measurements.
        notes: a file that keeps what was measured, with which an interrupted call goes on; removed in the end.
        progress: show progress bars.

    Raises:
        ArgumentError: for no goal, one that is none, or goals that cannot be met together; says what can. For
            images where prompts are needed, and the other way round.
        DocumentError: if the notes cannot be written, or another process holds them.
        ExportError: if the runtime cannot hold a reduced model.
        ModelError, ImageError, DataError: see `LatencyProfile.measure`, `Calibration` and `load_images`.
    """
    goal = check_goal(ratio, milliseconds, agreement)
    if batch_size < 1:
        raise ArgumentError(f"batch_size is {batch_size}; expected at least 1")
    if notes is not None and not Path(notes).absolute().parent.is_dir():
        raise ArgumentError(f"cannot write {notes}: there is no such folder; make it, or choose another place")
    backbone = Backbone(model)
    _check_kind(backbone, images, prompts)
    if prompts is not None:
        others = {"images": images is not None, "codebooks": len(codebooks) > 0, "notes": notes is not None}
        others |= {"batch_size": batch_size != 1, "runtime": runtime != "torch", "precision": precision is not None}
        if clash := [name for name, given in others.items() if given]:
            raise ArgumentError(f"prompts are given with {' and '.join(clash)}, which are for images; leave them out")
        return tune_on_prompts(model, prompts, goal, seed=seed, progress=progress)
    assert images is not None
    with hold(notes):
        return _tune_on_images(
            model, images, goal, batch_size, runtime, precision, codebooks, seed=seed, notes=notes, progress=progress
        )


def _tune_on_images(
    model: nn.Module,
    images: Tensor | str | os.PathLike[str],
    goal: dict[str, float],
    batch_size: int,
    runtime: str,
    precision: str | None,
    codebooks: Sequence[str | os.PathLike[str]],
    *,
    seed: int,
    notes: str | os.PathLike[str] | None,
    progress: bool,
) -> Plan:
    """See `tune`."""
    model = place(model, None, runtime, precision)
    backbone = Backbone(model)
    if not isinstance(images, Tensor):
        images = load_images(images, model, ENOUGH, seed=seed, progress=progress)
    if precision is not None and images.is_floating_point():
        images = images.to(backbone.weight.dtype)
    check_enough(images)
    if len(images) < batch_size:
        raise ArgumentError(f"batch_size is {batch_size}, there are {len(images)} images; give more images")
    backbone.check(images)
    image_size = (images.shape[2], images.shape[3])
    step = Steps(6, progress)
    step("measuring what tokens cost on this machine")
    notes_ = Notes(notes, model, images, batch_size, seed, codebooks, runtime)
    profile = notes_.profile or LatencyProfile.measure(
        model, batch_size, runtime=runtime, image_size=image_size, seed=seed, progress=progress
    )
    notes_.keep_profile(profile)
    step.found(f"the model takes {profile.predict():.1f} ms a batch; predictions err by {100 * profile.error:.1f} %")
    step(f"asking the model itself for its answers to {len(images)} images")
    calibration = Calibration(model, images, keep=SCREENING_IMAGES, progress=progress)
    made = _strategies(codebooks, backbone.grid(image_size), runtime)
    bound = {name: calibration.with_strategy(_known(make_strategy(how))) for name, how in made.items()}
    step(f"timing {len(made)} ways to reduce tokens before the blocks")
    costs = _costs(profile, images[:batch_size], bound, seed, progress)
    options = {"": Option(calibration)} | {name: Option(bound[name], costs[name]) for name in made}
    step("removing tokens in one block after the other, and comparing the answers")
    search = Search(profile, options, notes_, progress=progress)
    bench = _Bench(profile, model, made, images, seed, progress)
    points = _search_front(search, goal, bench, step)
    chosen, front = choose(points, goal), front_of(points)
    notes_.remove()
    return Plan(profile.model, batch_size, profile.precision, profile.machine, goal, chosen, front, runtime)


def _check_kind(backbone: Backbone, images: object, prompts: object) -> None:
    """Raise ArgumentError unless there are prompts for a model that reads image tokens in them, images for others."""
    whole = backbone.family.parent
    kind, reads = type(backbone.model).__name__, whole is not None and whole.reads_layers
    if reads and prompts is None:
        raise ArgumentError(
            f"{kind} reads image tokens in its prompt, and is tuned on prompts; give prompts=[...], what its processor "
            "makes of images and texts"
        )
    if not reads and prompts is not None:
        raise ArgumentError(
            f"prompts are for models whose language model reads image tokens in its prompt, not for {kind}; give images"
        )
    if not reads and images is None:
        raise ArgumentError("tune needs images, on which it compares reduced models with the full one; give some")


def _strategies(
    codebooks: Sequence[str | os.PathLike[str]], grid: tuple[int, int], runtime: str = "torch"
) -> dict[str, dict[str, Any]]:
    """What may be tried before the blocks on a grid of patches in a runtime, as plans write it, by name."""
    made: list[dict[str, Any]] = [
        {"name": "Neighbours", "drop": drop} for drop in DROPS if Neighbours(drop).can_drop(grid)
    ]
    if codebooks and runtime in EXPORTED:
        warnings.warn(
            f"inter-image words give every image its own number of tokens, which cannot be exported to {runtime}; they "
            "are left out of the search",
            stacklevel=3,
        )
    for path in () if runtime in EXPORTED else codebooks:
        full = pin(path)
        made += [{"name": "InterImage", "codebook": full, "threshold": threshold} for threshold in THRESHOLDS]
    return {describe(how): how for how in made}


def _costs(
    profile: LatencyProfile, images: Tensor, bound: Mapping[str, Calibration], seed: int, progress: bool
) -> dict[str, float]:
    """Milliseconds a batch that strategies take themselves: what a forward takes beyond its prediction."""
    whole = {name: calibration.fast for name, calibration in bound.items()}
    fasts = whole if profile.runtime == "torch" else _ends(whole)
    full_model, inputs = next(iter(fasts.values())).model, images.float()
    runs = [run_in(profile.runtime, profile.precision, module, inputs) for module in (full_model, *fasts.values())]
    calls: list[Calls] = [{"run": on_batches(run, [inputs])} for run in runs]
    with torch.inference_mode():
        seconds = interleave(calls, 1, COST_RUNS, device=images.device, warmup=1, seed=seed, progress=progress)
        patches = [round(float(fast.tokenize(images).counts.float().mean())) for fast in fasts.values()]
    full, *others = (1e3 * float(np.median(timed["run"])) for timed in seconds)
    # The machine may have become slower or faster since it was profiled.
    scale = profile.predict() / full
    extra: dict[str, list[float]] = {}
    for fast, taken, count in zip(fasts.values(), others, patches, strict=True):
        extra.setdefault(_kind(fast), []).append(scale * taken - profile.predict({}, count))
    # One figure for all of a kind: each is a small difference of large ones.
    return {name: max(0.0, float(np.median(extra[_kind(fast)]))) for name, fast in whole.items()}


def _ends(fasts: Mapping[str, VWTokenizer]) -> dict[str, VWTokenizer]:
    """The first and the last of each kind, where each takes seconds to build."""
    kinds: dict[str, list[str]] = {}
    for name, fast in fasts.items():
        kinds.setdefault(_kind(fast), []).append(name)
    return {name: fasts[name] for names in kinds.values() for name in (names[0], names[-1])}


def _kind(fast: VWTokenizer) -> str:
    """Strategies that do the same work: a class, and a codebook if there is one."""
    return f"{type(fast.strategy).__name__} {id(getattr(fast.strategy, 'codebook', None))}"


def _search_front(search: Search, goal: Mapping[str, float], bench: "_Bench", step: Steps) -> list[Point]:
    """The best for the goal, and, with less effort, for some budgets around it, all with their measured latency."""
    full = search.profile.predict()
    ratios = [ratio for ratio in RATIOS if search.least() <= ratio * full]
    step(f"searching plans for {', '.join(f'{ratio:g}' for ratio in ratios) or 'no part'} of the model's latency")
    outcomes = [search.best(ratio * full, FEW, finalists=2) for ratio in ratios]
    points = bench.measure(outcomes)
    for point in points[1:]:
        step.found(point.figures)
    step(f"searching the plan for {describe_goal(goal)}, and timing it")
    target = goal.get("ratio", goal.get("milliseconds", 0.0) / points[0].milliseconds)
    aim = target or _between(points, goal["agreement"], search.least() / full)
    found: Outcome | None = None
    for tries, finalists in ((TRIES, FINALISTS), (FEW, 4), (FEW, 4)):
        if not search.least() <= aim * full < full:
            break
        # What was found before, put right too: predictions err by as much for all that are like it.
        also = search.refit(found.candidate, aim * full) if found else None
        found = search.best(aim * full, tries, finalists)
        outcomes += dict.fromkeys(outcome for outcome in (also, found) if outcome is not None)
        points = bench.measure(outcomes)
        reached = points[-1]
        step.found(reached.figures)
        if target:  # what is measured differs a little from what was predicted
            aim *= target / reached.ratio
        else:
            predicted = search.predict(found.candidate) / full
            aim = _between(points, goal["agreement"], search.least() / full) * predicted / reached.ratio
    return points


def _between(points: Sequence[Point], agreement: float, least: float) -> float:
    """The ratio half way from the fastest that agrees enough to the next faster one, or the least possible."""
    good = min(point.ratio for point in points if point.agreement >= agreement)
    return (good + max((point.ratio for point in points if point.ratio < good), default=least)) / 2


class _Bench:
    """Measures the latency of outcomes, always with the model itself in the same run."""

    def __init__(
        self,
        profile: LatencyProfile,
        model: nn.Module,
        made: Mapping[str, dict[str, Any]],
        images: Tensor,
        seed: int,
        progress: bool,
    ) -> None:
        self.model, self.made, self.seed, self.progress = model, made, seed, progress
        self.runtime, self.precision, self.batch_size = profile.runtime, profile.precision, profile.batch_size
        self.images = images[: TIMED * self.batch_size].float()
        self.runs: dict[Candidate | None, Run] = {}

    def open(self, candidate: Candidate | None) -> Run:
        """A candidate, or for None the model itself, as it is timed; built once."""
        if candidate not in self.runs:
            reduced = self.model
            if candidate is not None:
                strategy = make_strategy(self.made.get(candidate.option))
                reduced = VWTokenizer(self.model, strategy, candidate.blocks, check=False)
            example = self.images[: self.batch_size]
            self.runs[candidate] = run_in(self.runtime, self.precision, reduced, example)
        return self.runs[candidate]

    def measure(self, outcomes: Sequence[Outcome]) -> list[Point]:
        """The model itself, and each outcome."""
        strategies = [self.made.get(outcome.candidate.option) for outcome in outcomes]
        schedules = [PruningSchedule(outcome.candidate.blocks) for outcome in outcomes]
        full, *reduced = [self.open(candidate) for candidate in (None, *(outcome.candidate for outcome in outcomes))]
        timed = measure_latency(full, reduced, self.images, self.batch_size, seed=self.seed, progress=self.progress)
        points = [Point(None, PruningSchedule({}), timed[0].milliseconds, timed[0].ratio, 0.0, 1.0)]
        for outcome, strategy, schedule, own in zip(outcomes, strategies, schedules, timed[1:], strict=True):
            points.append(Point(strategy, schedule, own.milliseconds, own.ratio, outcome.kl, outcome.agreement))
        return points


def _known(strategy: Strategy | None) -> Strategy:
    assert strategy is not None
    return strategy
