"""In a minute: a model's answers, the best plans for 0.8 and 0.7 of its latency, and what others give for the same.

Real photographs and weights come from the folder VWT_SHARED, or weights from the hub. Without them the demo runs on
crops of scikit-learn's two photographs, or on random weights, and says so.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import vwt
from vwt.datasets import ImageSource
from vwt.errors import ArgumentError, ModelError, VWTError
from vwt.measure.timing import Calls, interleave, on_batches
from vwt.models.backbone import Backbone
from vwt.models.create import create_model
from vwt.models.spec import prepare
from vwt.pictures.answers import class_names
from vwt.pictures.palette import MODEL as MODEL_ITSELF
from vwt.pictures.palette import PLAN
from vwt.pictures.report.front import Row
from vwt.pictures.report.report import write_report
from vwt.progress import Steps, progress_bar, say
from vwt.reductions.reduction import patches_entering
from vwt.tuning.calibration import Calibration, compare
from vwt.tuning.plan import Plan, Point, front_of
from vwt.tuning.profile import LatencyProfile
from vwt.tuning.search import Option, Search

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import peers  # noqa: E402, the comparators are no part of the library

MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
OUT = Path("demo")
BUDGETS = (0.8, 0.7)  # of the model's latency
TUNED, TRIED = 48, 128  # images to search on, and others to compare on
DROPS = (0.15, 0.25)  # of Neighbours
TRIES, FINALISTS = 12, 3  # of each search
TIMED, RUNS, FEW_RUNS = 4, 10, 4  # images, and how often each is timed
BATCH = 16


def main() -> int:
    """Run the demo; writes to `demo/`."""
    OUT.mkdir(exist_ok=True)
    model, trained = load_model()
    tuned_on, tried_on, folder = load_images(model)
    print(f"\n{MODEL}, {len(tried_on)} images of 224 x 224 pixels\n")
    if trained:
        show_answers(model, tried_on)
    step = Steps(4)
    step(f"searching the plans that change the answers least, on {len(tuned_on)} other images")
    points = search_plans(model, prepare(tuned_on, model))
    for budget, point in points.items():
        step.found(f"for {budget:g} of the latency: {point.name}")
    step("finding amounts of the other methods that take as long")
    others = find_others(model, prepare(tried_on[:TIMED], model))
    ours = [Entry(f"vwt: {point.name}", PLAN, budget, make(model, point)) for budget, point in points.items()]
    entries = [*ours, *others]
    step(f"comparing all on {len(tried_on)} images")
    rows = measure(model, entries, prepare(tried_on, model))
    step("writing a report on the first plan")
    path = OUT / "report.html"
    others_found = [row for row in rows[1:] if row.method != PLAN]
    plan = make_plan(model, rows, points)
    write_report(path, plan, model, folder, others=others_found, command="make demo", progress=False)
    print_table(entries, rows, trained)
    if not trained:
        print("The weights are RANDOM: neither VWT_SHARED nor the hub is in reach, so there is no agreement to show.\n")
    print("What the plan does to each image, and where the time goes:")
    print(path.resolve())
    say("next: open it in a browser")
    return 0


# -- model and images --------------------------------------------------------------------------------------------------


def shared() -> Path:
    """The folder of photographs and weights, which need not be there."""
    return Path(os.environ.get("VWT_SHARED") or ROOT / ".." / "shared" / "data")


def load_model() -> tuple[nn.Module, bool]:
    """The model, and whether its weights are trained: from VWT_SHARED, else the hub, else random."""
    checkpoint = shared() / "models" / f"{MODEL}.safetensors"
    if checkpoint.is_file():
        return create_model(MODEL, checkpoint), True
    try:
        return create_model(MODEL), True
    except ModelError as error:
        print(f"demo: {error}", file=sys.stderr)
        torch.manual_seed(0)
        return create_model(MODEL, weights=False), False


def load_images(model: nn.Module) -> tuple[Tensor, Tensor, str]:
    """Images (n, C, H, W) uint8 to search on and to compare on, and the folder of the latter."""
    words, photographs = shared() / "words", shared() / "eval"
    if words.is_dir() and photographs.is_dir():
        tuned_on = ImageSource(str(words), model).sample(TUNED)
        return tuned_on, ImageSource(str(photographs), model).sample(TRIED), str(photographs)
    print("demo: no photographs at VWT_SHARED; these are crops of scikit-learn's two photographs", file=sys.stderr)
    folder = make_crops(OUT / "crops")
    crops = ImageSource(str(folder), model).sample(TRIED)
    return crops, crops, str(folder)


def make_crops(folder: Path, size: int = 224, step: int = 100) -> Path:
    """Overlapping crops of scikit-learn's two photographs, as PNG files."""
    samples = load_sample_images()
    for array, filename in zip(samples.images, samples.filenames, strict=True):
        photograph, name = Image.fromarray(array), Path(filename).stem
        (folder / name).mkdir(parents=True, exist_ok=True)
        for top in range(0, photograph.height - size + 1, step):
            for left in range(0, photograph.width - size + 1, step):
                crop = photograph.crop((left, top, left + size, top + size))
                crop.save(folder / name / f"{top}-{left}.png")
    return folder


@torch.inference_mode()
def show_answers(model: nn.Module, images: Tensor, count: int = 4) -> None:
    """Print the model's own first class of some images."""
    probabilities = model(prepare(images[:count], model)).softmax(-1)
    names = class_names(model, probabilities.shape[1])
    print("What the model says of the first of them:")
    for index, row in enumerate(probabilities):
        best = int(row.argmax())
        print(f"  image {index}: {names[best]} ({100 * float(row[best]):.0f} %)")
    print()


# -- plans -------------------------------------------------------------------------------------------------------------


def search_plans(model: nn.Module, images: Tensor) -> dict[float, Point]:
    """The best for each budget; what `vwt.tune` does, with fewer images and tries. Latency is not yet measured."""
    profile = LatencyProfile.measure(model, points=8, runs=4)
    calibration = Calibration(model, images, keep=len(images))
    options = {"": Option(calibration)}
    strategies: dict[str, Any] = {"": None}
    for drop in DROPS:
        strategies[f"Neighbours {drop}"] = {"name": "Neighbours", "drop": drop}
        options[f"Neighbours {drop}"] = Option(calibration.with_strategy(vwt.Neighbours(drop)), 0.3)
    search = Search(profile, options)
    found = {}
    for budget in BUDGETS:
        try:
            outcome = search.best(budget * profile.predict(), TRIES, FINALISTS)
        except ArgumentError as error:  # a small model, of which a reduction's own cost is much
            print(f"demo: no plan for {budget:g} of the latency: {error}", file=sys.stderr)
            continue
        schedule = vwt.PruningSchedule(outcome.candidate.blocks)
        found[budget] = Point(strategies[outcome.candidate.option], schedule, 0.0, 0.0, outcome.kl, outcome.agreement)
    if not found:
        raise ArgumentError("no plan is faster than the model by so much on this machine")
    return found


def make(model: nn.Module, point: Point) -> vwt.VWTokenizer:
    """The model with what was found."""
    strategy = None if point.strategy is None else vwt.Neighbours(point.strategy["drop"])
    return vwt.VWTokenizer(model, strategy, point.schedule, check=False)


def make_plan(model: nn.Module, rows: Sequence[Row], points: dict[float, Point]) -> Plan:
    """What was found as a plan, with its measured latency and what it changes on the images that it was compared on."""
    own = LatencyProfile.identify(model)
    measured = [row for row in rows if row.method == PLAN]
    found = [
        Point(point.strategy, point.schedule, row.milliseconds, row.ratio, row.kl, row.agreement)
        for point, row in zip(points.values(), measured, strict=True)
    ]
    front = front_of([Point(None, vwt.PruningSchedule({}), rows[0].milliseconds, 1.0, 0.0, 1.0), *found])
    machine = {name: own[name] for name in ("device", "cpu", "threads", "torch", "timm")}
    return Plan(own["model"], 1, own["precision"], machine, {"ratio": BUDGETS[0]}, found[0], front)


# -- others ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Entry:
    """A way to run the model, to be compared with others of the same latency.

    Attributes:
        name: for the table.
        method: one of `vwt.pictures.palette.LOOKS`.
        budget: of the model's latency, which it keeps to.
        module: what is called with images.
    """

    name: str
    method: str
    budget: float
    module: Any


def all_others(model: nn.Module) -> dict[str, list[tuple[str, Any]]]:
    """Other methods, each with several amounts, by name."""
    wrap: Callable[..., Any] = partial(vwt.VWTokenizer, model, check=False)
    blocks = range(Backbone(model).depth)
    merged, shares = (7, 10, 13, 16, 19, 22), (0.1, 0.2, 0.3, 0.4, 0.5)
    return {
        "ToMe": [(f"ToMe, r = {r}", peers.TokenMerging(model, dict.fromkeys(blocks, r))) for r in merged],
        "POMT": [(f"POMT, R = {n} in block 3", peers.PruneOneMoreToken(model, {3: n})) for n in (42, 63, 84, 105, 126)],
        "VWT paper": [(f"VWT intra-image, drop {share:g}", wrap(vwt.IntraImage(share))) for share in shares],
        "random drop": [(f"random dropping, {share:g}", wrap(peers.RandomDrop(share))) for share in shares],
    }


def find_others(model: nn.Module, images: Tensor) -> list[Entry]:
    """Of each other method the amount whose latency is nearest to each budget."""
    methods = all_others(model)
    modules = [module for variants in methods.values() for _, module in variants]
    full, *milliseconds = time_in_turn([model, *modules], images, FEW_RUNS)
    ratios = iter([one / full for one in milliseconds])
    found = []
    for method, variants in methods.items():
        timed = [(next(ratios), name, module) for name, module in variants]
        for budget in BUDGETS:
            _, name, module = min(timed, key=lambda one: abs(one[0] - budget))
            found.append(Entry(name, method, budget, module))
    return found


def time_in_turn(modules: Sequence[Any], images: Tensor, runs: int) -> list[float]:
    """Milliseconds of each on one image at a time, measured in turn."""
    calls: list[Calls] = [{"run": on_batches(module, images.split(1))} for module in modules]
    with torch.inference_mode():
        seconds = interleave(calls, len(images), runs, warmup=1)
    return [1e3 * float(np.median(timed["run"])) for timed in seconds]


# -- the comparison ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure(model: nn.Module, entries: Sequence[Entry], images: Tensor) -> list[Row]:
    """The model itself and each entry: latency, KL, agreement and tokens."""
    milliseconds = time_in_turn([model, *(entry.module for entry in entries)], images[:TIMED], RUNS)
    batches = images.split(BATCH)
    full = torch.cat([model(batch) for batch in batches])
    rows = [Row("the model itself", MODEL_ITSELF, milliseconds[0], 1.0, 0.0, 1.0, mean_tokens(model, images))]
    for entry, own in zip(progress_bar(entries, desc="comparing", unit="method"), milliseconds[1:], strict=True):
        fidelity = compare(full, torch.cat([entry.module(batch) for batch in batches]))
        tokens = mean_tokens(entry.module, images)
        rows.append(
            Row(entry.name, entry.method, own, own / rows[0].milliseconds, fidelity.mean_kl, fidelity.agreement, tokens)
        )
    return rows


def mean_tokens(module: Any, images: Tensor) -> float:
    """Tokens of an image, mean over the blocks; all methods here leave as many of each image."""
    backbone = Backbone(getattr(module, "model", module))
    if isinstance(module, vwt.VWTokenizer):
        count = int(module.tokenize(images[:1]).counts[0])
        return backbone.prefix + float(np.mean(patches_entering(module.schedule, backbone.depth, count)[:-1]))
    full = backbone.prefix + backbone.patches
    return float(np.mean(module.lengths(full))) if hasattr(module, "lengths") else full


def print_table(entries: Sequence[Entry], rows: Sequence[Row], trained: bool) -> None:
    """Agreement and milliseconds, the methods of one budget below each other, the best of them marked."""
    head = f"{'same class':>18}{'KL, nats':>10}" if trained else f"{'':8}"
    print(f"\n{head}{'ms':>8}{'of the model':>14}")

    def line(row: Row, mark: str = "") -> None:
        figures = f"{100 * row.agreement:>8.1f} %{row.kl:>10.3f}" if trained else ""
        print(f"{mark:8}{figures}{row.milliseconds:>8.1f}{row.ratio:>14.2f}  {row.name}")

    line(rows[0])
    for budget in BUDGETS:
        own = [row for entry, row in zip(entries, rows[1:], strict=True) if entry.budget == budget]
        best = min(own, key=lambda row: row.kl)
        print(f"at about {budget:g} of its latency")
        for row in sorted(own, key=lambda row: row.kl):
            line(row, "best ->" if trained and row is best else "")
    print()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except VWTError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(2)
