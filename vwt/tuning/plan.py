"""Plan: a strategy and a schedule for a model on a device, with what they cost and change."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from vwt import hub
from vwt.codebook.codebook import Codebook
from vwt.documents import is_number, load_document, save_document
from vwt.errors import ArgumentError, DocumentError, MismatchError, brief, first_line
from vwt.export.exporting import Parity, check_target, export, least_images
from vwt.measure.environment import is_machine, other_threads
from vwt.models.spec import PatchSpec
from vwt.reductions.reduction import Reduction
from vwt.strategies.inter_image import InterImage
from vwt.strategies.neighbours import Neighbours
from vwt.strategies.strategy import Strategy
from vwt.tokenizer import VWTokenizer
from vwt.tuning.calibration import load_images
from vwt.tuning.profile import LatencyProfile
from vwt.tuning.schedule import PruningSchedule, read_reduction
from vwt.tuning.sharing import PATTERNS, make_card, pack_codebooks, unpack_codebook
from vwt.tuning.where import check_where, name_runtime

Item = TypeVar("Item")

VERSION = 1


SHARED = (".html", ".pdf", ".png", ".svg")  # what may go with a plan to the hub


CHECKED = 128  # images on which an exported model is checked


# What is done with a plan for a runtime.
_USES = {
    "torch": "call plan.apply(model)",
    "compile": "call plan.apply(model), or export it to NAME.pt2",
    "onnxruntime": "export it to NAME.onnx (plan.export, vwt export)",
    "openvino": "export it to NAME.xml (plan.export, vwt export)",
}


@dataclass(frozen=True)
class Point:
    """What a strategy and a schedule do together.

    Attributes:
        strategy: as `Plan.strategy`.
        schedule: reductions inside the blocks.
        milliseconds: measured, a batch.
        ratio: of that to the model itself, measured in the same run.
        kl: mean KL(model ‖ reduced) over the calibration images or prompts, in nats.
        agreement: share of them in which the first class, or the next token, is the model's.
        after: a reduction of the image tokens that a language model reads in its prompt, see `VWTokenizer`.
    """

    strategy: dict[str, Any] | None
    schedule: PruningSchedule
    milliseconds: float
    ratio: float
    kl: float
    agreement: float
    after: Reduction | None = None

    def to_json(self) -> dict[str, Any]:
        """As it is written into files."""
        row = {field.name: getattr(self, field.name) for field in fields(self)} | {"schedule": self.schedule.to_json()}
        after = row.pop("after")
        return row if after is None else row | {"after": {"operation": after.kind, "amount": after.amount}}

    @classmethod
    def from_json(cls, row: Any, origin: str) -> "Point":
        """What `to_json` gave; raises DocumentError for anything else."""
        names = {field.name for field in fields(cls)}
        if not isinstance(row, dict) or {*row, "after"} != names:
            raise DocumentError(f"{origin} has a point with other fields than {', '.join(sorted(names))}; tune again")
        numbers = [row[name] for name in ("milliseconds", "ratio", "kl", "agreement")]
        if not all(map(is_number, numbers)):
            raise DocumentError(f"{origin} has a point whose figures are no numbers; tune again")
        if not _is_strategy(row["strategy"]):
            raise DocumentError(f"{origin} has the strategy {brief(row['strategy'])}; tune again")
        after = row.get("after")
        if after is not None:
            if not isinstance(after, dict) or set(after) != {"operation", "amount"}:
                raise DocumentError(
                    f"{origin} has after {brief(after)}; expected an operation and an amount; tune again"
                )
            after = read_reduction(after, origin)
        return cls(**row | {"schedule": PruningSchedule.from_json(row["schedule"], origin), "after": after})

    @property
    def name(self) -> str:
        """The strategy and the schedule as they would be written in Python."""
        what = ", ".join(f"{what!r} in block {block}" for block, what in self.schedule.items())
        after = "" if self.after is None else f"after={self.after!r}"
        return " + ".join(part for part in (describe(self.strategy), what, after) if part) or "the model itself"

    @property
    def reduces(self) -> bool:
        """Whether it is anything but the model itself."""
        return self.strategy is not None or bool(self.schedule) or self.after is not None

    @property
    def figures(self) -> str:
        """What it costs and changes, as a sentence."""
        return (
            f"{self.ratio:.2f} of the model's latency ({self.milliseconds:.1f} ms): agreement "
            f"{100 * self.agreement:.1f} %, KL {self.kl:.4f} nats"
        )

    def __str__(self) -> str:
        return f"{self.name}: {self.figures}"


def pareto_front(points: Iterable[Item], costs: Callable[[Item], tuple[float, float]]) -> list[Item]:
    """What no other beats in both of its costs, by rising first cost."""
    front: list[Item] = []
    for point in sorted(points, key=costs):
        if not front or costs(point)[1] < costs(front[-1])[1]:
            front.append(point)
    return front


def front_of(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both latency and KL, the slowest first."""
    return pareto_front(points, lambda point: (point.milliseconds, point.kl))[::-1]


@dataclass(frozen=True)
class Plan:
    """What `tune` chose for a model on a device.

    Attributes:
        model: the model's name.
        batch_size: images at a time.
        precision: of the weights.
        machine: where latency was measured, see `LatencyProfile`.
        goal: what was asked for.
        chosen: the point that reaches it; one without strategy and schedule where none is better than the model.
        front: the points that were found.
        runtime: in which latency was measured, see `vwt.export.runtimes.run_in`.
    """

    model: str
    batch_size: int
    precision: str
    machine: dict[str, Any]
    goal: dict[str, float]
    chosen: Point
    front: list[Point]
    runtime: str = "torch"

    def apply(self, model: nn.Module, *, force: bool = False) -> VWTokenizer:
        """The model as planned, compiled when it is first called if the plan is for torch.compile.

        Args:
            model: the one that was tuned.
            force: also for another model, precision, device or runtime, where the figures do not hold. Of another
                number of threads it only warns.

        Raises:
            MismatchError: for another model, precision, device or codebook, or a plan for onnxruntime or OpenVINO.
        """
        compiled = self.runtime == "compile"
        self.check(model, "compile" if compiled else "torch", force=force)
        fast = self._wrap(model)
        if compiled:
            fast.compile()
        return fast

    def _wrap(self, model: nn.Module) -> VWTokenizer:
        chosen = self.chosen
        return VWTokenizer(model, make_strategy(chosen.strategy), chosen.schedule, after=chosen.after)

    def check(self, model: nn.Module, runtime: str, *, force: bool = False) -> None:
        """Raise MismatchError unless it was tuned for this model, where it is, in this runtime; see `apply`."""
        own = LatencyProfile.identify(model)
        here = {name: own[name] for name in ("model", "precision", "cpu", "device")} | {"runtime": runtime}
        if (whole := PatchSpec.of(model).model) == self.model:  # a plan may be of the vision tower, or of what holds it
            here["model"] = whole
        there = {name: getattr(self, name) for name in ("model", "precision", "runtime")}
        there |= {name: self.machine[name] for name in ("cpu", "device")}
        others = [f"{name} {there[name]!r}, here {here[name]!r}" for name in here if here[name] != there[name]]
        if others and not force:
            advice = "tune again, or apply it with force"
            if self.runtime != runtime:
                advice = f"{_USES[self.runtime]}, or tune for this runtime, or apply it with force"
            raise MismatchError(f"the plan was tuned for {'; '.join(others)}; {advice}")
        if threads := other_threads(self.machine):
            warnings.warn(f"the plan was tuned with {threads}; its latency holds for those", stacklevel=3)

    def report(
        self,
        path: str | os.PathLike[str],
        model: nn.Module,
        images: Tensor | str | os.PathLike[str],
        *,
        force: bool = False,
        progress: bool = True,
    ) -> None:
        """Write what is known of the plan as one HTML file; needs Altair, `pip install vwt[report]`.

        Args:
            path: of the file, .html.
            model: the one that was tuned.
            images: a data set of which 64 are drawn, or (n, C, H, W), uint8 or normalised for the model.
            force: as in `apply`.
            progress: show progress bars.

        Raises:
            ArgumentError, DocumentError, MismatchError, DataError: see `vwt.pictures.report.report.write_report`.
        """
        # What draws stands above what is drawn, and its packages are optional.
        from vwt.pictures.report.report import write_report

        skipped = write_report(path, self, model, images, force=force, progress=progress)
        if skipped:
            warnings.warn(f"left out {len(skipped)} images that cannot be read: {', '.join(skipped)}", stacklevel=2)

    def export(
        self,
        model: nn.Module,
        path: str | os.PathLike[str],
        images: Tensor | str | os.PathLike[str],
        *,
        batch_size: int | None = None,
        int8: bool = False,
        force: bool = False,
        progress: bool = True,
    ) -> Parity:
        """Write the model as planned to a file for another runtime, and check that on real images.

        Args:
            model: the one that was tuned.
            path: NAME.onnx, NAME.xml or NAME.pt2, for the runtime that the plan was tuned for.
            images: (n, C, H, W) normalised for the model, n at least 64, or a folder of which 128 are drawn.
            batch_size: at which latency is measured; by default that of the plan.
            int8: see `vwt.export.exporting.export`.
            force: see `apply`.
            progress: show a progress bar.

        Raises:
            MismatchError: see `apply`.
            ArgumentError, ExportError, ImageError: see `vwt.export.exporting.export`.
            DataError: see `load_images`.
        """
        batch_size = self.batch_size if batch_size is None else batch_size
        self.check(model, check_target(path, batch_size).runtime, force=force)
        fast = self._wrap(model)
        if not isinstance(images, Tensor):
            images = load_images(images, model, max(CHECKED, least_images(batch_size, int8)), progress=progress)
        made = {"goal": self.goal, "machine": self.machine, "chosen": self.chosen.to_json()}
        return export(fast, path, images, batch_size=batch_size, plan=made, int8=int8, progress=progress)

    def __str__(self) -> str:
        """The front as a table, the slowest first, and the choice."""
        lines = ["latency ratio  ms a batch  agreement, %  KL, nats  plan"]
        for point in sorted(self.front, key=lambda point: -point.ratio):
            figures = f"{point.ratio:>13.3f}  {point.milliseconds:>10.2f}  {100 * point.agreement:>12.1f}"
            lines.append(f"{figures}  {point.kl:>8.4f}  {point.name}")
        lines.append(f"chosen for {describe_goal(self.goal)}: {self.chosen}")
        if not self.chosen.reduces:
            lines.append("no plan is faster than the model itself for this goal: leave it as it is")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON.

        Raises:
            DocumentError: if the file cannot be written.
        """
        save_document(path, "plan", VERSION, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """As it is written into files."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return own | {"chosen": self.chosen.to_json(), "front": [point.to_json() for point in self.front]}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read what `save` wrote, or, of `hf-hub:user/name` or `local-dir:FOLDER`, what `push_to_hub` did.

        Raises:
            DocumentError: if the file is missing, cut short, or no plan.
            HubError: see `from_pretrained`.
        """
        if hub.has_prefix(os.fspath(path)):
            return cls.from_pretrained(path)
        own = load_document(path, "plan", VERSION, [field.name for field in fields(cls)], name_runtime)
        if not is_machine(own["machine"]):
            raise DocumentError(f"{path} does not say where it was tuned; tune again")
        for name, kind in (("model", str), ("batch_size", int)):
            if type(own[name]) is not kind:
                raise DocumentError(f"{path} has {name} {brief(own[name])}; tune again")
        check_where(own["runtime"], own["precision"], str(path), "tune again")
        goal = own["goal"]
        if not isinstance(goal, dict) or not all(map(is_number, goal.values())) or not isinstance(own["front"], list):
            raise DocumentError(f"{path} has no goal or no front; tune again")
        points = {
            "chosen": Point.from_json(own["chosen"], str(path)),
            "front": [Point.from_json(row, str(path)) for row in own["front"]],
        }
        return cls(**own | points)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> "Plan":
        """Download a plan and its codebooks from the Hugging Face hub, or take them from the cache.

        Args:
            source: `user/name` or `hf-hub:user/name`, either with `@revision` behind it; or the folder of such a
                repository, with or without `local-dir:`.
            revision: a branch, tag or commit.

        Raises:
            HubError: if there is none, it is private, or out of reach and not in the cache.
            DocumentError: if it is damaged.
        """
        folder = hub.fetch(os.fspath(source), "plan", PATTERNS, revision)
        plan = cls.load(folder / "plan.json")
        return plan._with_strategies([unpack_codebook(point.strategy, folder) for point in plan._points])

    def push_to_hub(
        self,
        repository: str,
        *,
        profile: LatencyProfile | None = None,
        files: Sequence[str | os.PathLike[str]] = (),
        private: bool | None = None,
    ) -> str:
        """Upload to the Hugging Face hub, with its codebooks and a model card of its figures.

        Args:
            repository: `user/name`; made if there is none.
            profile: of the same model and machine, to go with it.
            files: a report or pictures, to go with it; pictures are shown on the card.
            private: whether a new repository is; by default as the account has it.

        Returns:
            The address of the commit.

        Raises:
            HubError: if the hub refuses, or is out of reach.
            CodebookError: if a codebook of the plan cannot be read.
            ArgumentError: if a file is missing, or no report or picture.
        """
        name, paths = repository.removeprefix(hub.HUB), [Path(file) for file in files]
        if others := [str(path) for path in paths if not path.is_file() or path.suffix.lower() not in SHARED]:
            raise ArgumentError(f"no report or picture: {', '.join(others)}; expected files with {', '.join(SHARED)}")
        goal = {f"goal: {what}": value for what, value in self.goal.items()}
        facts = {"batch": self.batch_size, "precision": self.precision, "runtime": self.runtime, **goal}
        pictures = [path.name for path in paths if path.suffix.lower() in (".png", ".svg")]
        with tempfile.TemporaryDirectory(prefix="vwt-hub-") as scratch:
            folder = Path(scratch)
            packed = self._with_strategies(pack_codebooks([point.strategy for point in self._points], folder))
            packed.save(folder / "plan.json")
            if profile is not None:
                profile.save(folder / "profile.json")
            for path in paths:
                shutil.copyfile(path, folder / path.name)
            card = make_card(name, self.model, self.machine, facts, str(packed), pictures)
            return hub.push(folder, name, "plan", card, private)

    @property
    def _points(self) -> list[Point]:
        return [self.chosen, *self.front]

    def _with_strategies(self, strategies: Sequence[dict[str, Any] | None]) -> "Plan":
        """The same plan, with other strategies of the chosen point and of the front."""
        points = zip(self._points, strategies, strict=True)
        chosen, *front = (replace(point, strategy=made) for point, made in points)
        return replace(self, chosen=chosen, front=front)


def _is_strategy(made: Any) -> bool:
    """Whether a value of a file may be how a plan writes a strategy."""
    if made is None:
        return True
    kinds = {"name": str, "codebook": str, "drop": int | float, "threshold": int | float}
    return (
        isinstance(made, dict)
        and "name" in made
        and all(name in kinds and isinstance(value, kinds[name]) for name, value in made.items())
    )


def make_strategy(made: Mapping[str, Any] | None) -> Strategy | None:
    """A strategy from how a plan writes it: a name and its arguments; None for none.

    Raises:
        DocumentError: if it is no strategy.
        CodebookError: if its codebook cannot be read.
    """
    if made is None:
        return None
    if not isinstance(made, Mapping):
        raise DocumentError(f"the plan's strategy is {brief(made)}; expected a name and its arguments; tune again")
    arguments = {name: value for name, value in made.items() if name != "name"}
    try:
        if made["name"] == "InterImage":
            return InterImage(Codebook.load(arguments.pop("codebook")), **arguments)
        return {"Neighbours": Neighbours}[made["name"]](**arguments)
    except (KeyError, TypeError, ArgumentError) as error:
        raise DocumentError(
            f"the plan's strategy {brief(dict(made))} is none: {first_line(error)}; tune again"
        ) from error


def describe(made: Mapping[str, Any] | None) -> str:
    """A strategy as it would be written in Python; nothing for none."""
    if made is None:
        return ""
    arguments = ", ".join(f"{name}={value}" for name, value in made.items() if name != "name")
    return f"{made['name']}({arguments})"


def describe_goal(goal: Mapping[str, float]) -> str:
    """What was asked for."""
    return ", ".join(f"{name} {value:g}" for name, value in goal.items())
