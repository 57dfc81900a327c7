import json
import math
import os
from dataclasses import asdict

import numpy as np
import pytest
import torch

from tests.holding import held_elsewhere
from tests.matrix import matrix
from tests.reductions.cases import make_model
from tests.test_datasets import write_images
from tests.tuning.test_calibration import codebook_of, make_images
from tests.tuning.test_profile import make_profile
from vwt import Absorb, Neighbours, Plan, PruningSchedule, tune
from vwt.errors import ArgumentError, DocumentError, ImageError
from vwt.measure.timing import Latency
from vwt.tuning import tune as tuning
from vwt.tuning.calibration import Calibration, compare
from vwt.tuning.goal import SLACK, choose
from vwt.tuning.notes import read_notes
from vwt.tuning.plan import Point, front_of
from vwt.tuning.profile import LatencyProfile
from vwt.tuning.search import Candidate, Outcome

IMAGES = make_images(20)
MEASURE, COSTS = tuning._Bench.measure, tuning._costs  # which most tests replace


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few candidates and few runs, and a profile that is known."""
    constants = {"DROPS": (0.2, 0.4), "RATIOS": (0.8, 0.6), "FEW": 2, "TRIES": 4, "FINALISTS": 2}
    constants |= {"COST_RUNS": 1, "THRESHOLDS": (0.2,)}
    for name, value in constants.items():
        monkeypatch.setattr(tuning, name, value)
    asked = []

    def measure(model, batch_size=1, **options):
        asked.append((batch_size, options))
        where = {"runtime": options["runtime"], "precision": LatencyProfile.identify(model)["precision"]}
        return make_profile(batch_size=batch_size, **where)

    monkeypatch.setattr(LatencyProfile, "measure", measure)
    monkeypatch.setattr(tuning, "_costs", lambda profile, images, bound, *rest: dict.fromkeys(bound, 0.0))
    clock = make_profile()
    # Latency as predicted, so that nothing depends on the machine.
    monkeypatch.setattr(tuning._Bench, "measure", lambda self, outcomes: predicted(self, outcomes, clock))
    return asked


def predicted(bench, outcomes, profile):
    points, full = [Point(None, PruningSchedule({}), profile.predict(), 1.0, 0.0, 1.0)], profile.predict()
    for outcome in outcomes:
        made = bench.made.get(outcome.candidate.option)
        patches = None if made is None else 16 - int(16 * made.get("drop", 0.5))
        ms = profile.predict(outcome.candidate.blocks, patches)
        schedule = PruningSchedule(outcome.candidate.blocks)
        points.append(Point(made, schedule, ms, ms / full, outcome.kl, outcome.agreement))
    return points


def run(images=IMAGES, model=None, **options):
    return tune(make_model() if model is None else model, images, progress=False, **options)


def check_plan(plan, model=None):
    """Figures of the choice are those of the model as planned."""
    model = make_model() if model is None else model
    with torch.inference_mode():
        fidelity = compare(model(IMAGES), plan.apply(model)(IMAGES))
    assert plan.chosen.kl == pytest.approx(fidelity.mean_kl, abs=1e-5)
    assert plan.chosen.agreement == pytest.approx(fidelity.agreement)
    assert plan.chosen in plan.front or plan.chosen.kl >= min(point.kl for point in plan.front)
    for point in plan.front:
        assert not any(
            other.milliseconds <= point.milliseconds and other.kl < point.kl for other in plan.front if other != point
        )


def test_a_plan_for_a_ratio(tmp_path):
    plan = run(ratio=0.7)
    check_plan(plan)
    assert plan.goal == {"ratio": 0.7}
    assert plan.chosen.ratio <= 0.7 * SLACK
    assert any(point.strategy is None and not point.schedule for point in plan.front)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_a_plan_for_milliseconds():
    full = make_profile().predict()
    plan = run(milliseconds=0.75 * full)
    check_plan(plan)
    assert plan.chosen.milliseconds <= 0.75 * full * SLACK


def test_the_fastest_that_agrees_enough():
    plan = run(agreement=0.6)
    check_plan(plan)
    assert plan.chosen.agreement >= 0.6
    enough = [point.milliseconds for point in plan.front if point.agreement >= 0.6]
    assert plan.chosen.milliseconds <= min(enough)
    everything = run(agreement=1.0)
    assert everything.chosen.agreement == 1
    assert everything.chosen.milliseconds >= plan.chosen.milliseconds


def test_the_same_twice():
    assert run(ratio=0.7, seed=3) == run(ratio=0.7, seed=3)


def test_a_budget_of_the_model_itself():
    plan = run(ratio=1.0)
    assert plan.chosen.kl == 0
    assert "leave it as it is" in str(plan)


def test_what_is_measured_and_for_which_batch(small):
    plan = run(ratio=0.7, batch_size=4, seed=5)
    assert small == [(4, {"runtime": "torch", "image_size": (64, 64), "seed": 5, "progress": False})]
    assert plan.batch_size == 4
    check_plan(plan)


# -- runtimes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch):
    """What is built for runtimes; nothing is timed."""
    asked = []

    def run_in(runtime, precision, model, example):
        asked.append((runtime, precision, example.dtype, model))
        return model

    def measure(full, reduced, *_, **__):
        return [Latency(10.0, 1.0, (1.0, 1.0)), *[Latency(7.0, 0.7, (0.7, 0.7))] * len(reduced)]

    monkeypatch.setattr(tuning, "run_in", run_in)
    monkeypatch.setattr(tuning, "interleave", lambda calls, *_, **__: [{"run": np.ones((1, 1))} for _ in calls])
    monkeypatch.setattr(tuning, "measure_latency", measure)
    return asked


def test_a_plan_says_its_runtime_and_precision(small, monkeypatch):
    monkeypatch.setattr("vwt.tuning.where.check_runtime", lambda *_: None)
    plan = run(ratio=0.7, runtime="onnxruntime", precision="bfloat16")
    assert (plan.runtime, plan.precision) == ("onnxruntime", "bfloat16")
    assert small[0][1]["runtime"] == "onnxruntime"
    assert plan.apply(make_model().bfloat16(), force=True).schedule == plan.chosen.schedule


def test_candidates_are_built_for_the_runtime_once(opened):
    model = make_model()
    bench = tuning._Bench(make_profile(runtime="openvino"), model, {}, IMAGES, 0, False)
    outcomes = [Outcome(Candidate("", ((1, Absorb(n)),)), 0.1, 0.9) for n in (3, 4)]
    MEASURE(bench, outcomes[:1])
    points = MEASURE(bench, outcomes)
    assert [point.ratio for point in points] == [1.0, 0.7, 0.7]
    assert {each[:3] for each in opened} == {("openvino", "float32", torch.float32)}
    assert [getattr(each[3], "schedule", None) for each in opened] == [None, {1: Absorb(3)}, {1: Absorb(4)}]


@pytest.mark.parametrize(("runtime", "built"), [("torch", 5), ("compile", 3)])
def test_few_strategies_are_built_where_each_takes_seconds(opened, runtime, built):
    calibration = Calibration(make_model(), IMAGES, progress=False)
    bound = {f"{drop}": calibration.with_strategy(Neighbours(drop)) for drop in (0.1, 0.2, 0.3, 0.4)}
    costs = COSTS(make_profile(runtime=runtime), IMAGES[:1], bound, 0, False)
    assert set(costs) == set(bound)
    assert len(opened) == built


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_words_of_unequal_counts_are_left_out_where_they_cannot_be_exported(runtime, tmp_path):
    codebook_of(IMAGES).save(tmp_path / "words.zarr")
    with pytest.warns(UserWarning, match=f"which cannot be exported to {runtime}; they are left out of the search"):
        made = tuning._strategies([tmp_path / "words.zarr"], (4, 4), runtime)
    assert {how["name"] for how in made.values()} == {"Neighbours"}
    assert "InterImage" in {how["name"] for how in tuning._strategies([tmp_path / "words.zarr"], (4, 4)).values()}


def test_what_a_runtime_cannot_do_is_said_before_the_work(small):
    with pytest.raises(ArgumentError, match="runtime is 'tvm'; expected one of torch, compile, onnxruntime, openvino"):
        run(ratio=0.7, runtime="tvm")
    with pytest.raises(ArgumentError, match="precision is 'float16'; expected one of float32, bfloat16"):
        run(ratio=0.7, runtime="openvino", precision="float16")
    assert not small


def test_words_are_tried_where_there_is_a_codebook(tmp_path, monkeypatch):
    codebook_of(IMAGES).save(tmp_path / "words.zarr")
    tried = []
    original = Calibration.with_strategy
    monkeypatch.setattr(Calibration, "with_strategy", lambda self, s: tried.append(repr(s)) or original(self, s))
    monkeypatch.chdir(tmp_path)
    check_plan(run(ratio=0.8, codebooks=["words.zarr"]))
    assert [name.split("(")[0] for name in tried] == ["Neighbours", "Neighbours", "InterImage"]
    made = tuning._strategies(["words.zarr"], (4, 4))
    assert [how["codebook"] for how in made.values() if "codebook" in how] == [str(tmp_path.resolve() / "words.zarr")]


def test_images_of_a_folder(tmp_path):
    plan = run(write_images(tmp_path / "images", 16), ratio=0.8)
    assert plan.chosen.ratio <= 0.8 * SLACK


@pytest.mark.parametrize("grid", [(4, 4), (5, 5), (7, 7), (14, 14)])
def test_every_strategy_that_is_tried_fits_the_grid(grid, monkeypatch):
    drops = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45)
    monkeypatch.setattr(tuning, "DROPS", drops)
    made = tuning._strategies([], grid).values()
    features = torch.randn(1, grid[0] * grid[1], 8)
    for how in made:
        assert Neighbours(how["drop"])(features, grid).counts[0] < features.shape[1]
    for drop in set(drops) - {how["drop"] for how in made}:
        with pytest.raises(ArgumentError, match="drop fewer"):
            Neighbours(drop)(features, grid)


@pytest.mark.parametrize("side", [48, 80])
def test_images_of_another_size_are_profiled_and_searched(side, monkeypatch):
    measured = []

    def measure(model, batch_size=1, *, image_size, **options):
        measured.append(image_size)
        patches = (side // 16) ** 2
        counts = [2, 5, patches + 1]
        linear = {name: [float(n) for n in counts] for name in ("block", "attention", "counting")}
        return make_profile(patches=patches, counts=counts, **linear)

    monkeypatch.setattr(LatencyProfile, "measure", measure)
    model = make_model(dynamic_img_size=True)
    images = torch.nn.functional.interpolate(IMAGES, (side, side))
    assert run(images, model, ratio=0.9).chosen is not None
    assert measured == [(side, side)]


# -- goals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", [{}, {"ratio": 0.5, "milliseconds": 3.0}])
def test_a_goal_is_needed(goal, small):
    with pytest.raises(ArgumentError, match="tune needs a goal: ratio=… or milliseconds=…, or agreement=…"):
        run(**goal)
    assert not small


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5, float("nan")])
@pytest.mark.parametrize("name", ["ratio", "agreement"])
def test_a_goal_that_is_none(name, value, small):
    with pytest.raises(ArgumentError, match=f"{name} is {value:g}; expected a number above 0 and at most 1"):
        run(**{name: value})
    assert not small


def test_milliseconds_that_are_none():
    with pytest.raises(ArgumentError, match="milliseconds is -2; expected a number above 0"):
        run(milliseconds=-2)


def test_goals_that_cannot_be_met_together():
    with pytest.raises(ArgumentError) as error:
        run(ratio=0.5, agreement=1.0)
    message = str(error.value)
    assert message.startswith("no plan reaches {'ratio': 0.5, 'agreement': 1.0}; what can be reached is ratio 1.00 (")
    assert "agreement 1.000" in message
    assert message.endswith("; ask for one of these")


def test_a_budget_below_the_least():
    with pytest.raises(ArgumentError, match=r"no plan reaches \{'ratio': 0.05\}; what can be reached is ratio"):
        run(ratio=0.05)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_too_few_images(small):
    with pytest.raises(ArgumentError, match="15 calibration images; expected at least 16"):
        run(IMAGES[:15], ratio=0.7)
    assert not small, "said only after minutes of measuring"


def test_images_of_another_size():
    with pytest.raises(ImageError, match="images are 80x80, the model takes 64x64"):
        run(torch.zeros(16, 3, 80, 80), ratio=0.7)


def test_a_model_in_train_mode():
    with pytest.raises(ArgumentError, match="train mode"):
        run(model=make_model().train(), ratio=0.7)


def test_a_batch_size_that_is_none():
    with pytest.raises(ArgumentError, match="batch_size is 0; expected at least 1"):
        run(ratio=0.7, batch_size=0)


def test_a_batch_of_more_images_than_there_are():
    with pytest.raises(ArgumentError, match=r"batch_size is 21.*20"):
        run(ratio=0.7, batch_size=21)


# -- interrupted -------------------------------------------------------------------------------------------------------


def interrupt(monkeypatch, after):
    """Calibration that stops after so many candidates; what it was asked is in the list."""
    asked, original = [], Calibration.evaluate

    def evaluate(self, reductions, images=None):
        if len(asked) == after:
            raise KeyboardInterrupt
        asked.append((repr(self.fast.strategy), repr(dict(reductions)), images))
        return original(self, reductions, images)

    monkeypatch.setattr(Calibration, "evaluate", evaluate)
    return asked


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch, small):
    notes = tmp_path / "plan.json.tuning"
    with monkeypatch.context() as patch:
        before = interrupt(patch, 12)
        with pytest.raises(KeyboardInterrupt):
            run(ratio=0.7, notes=notes)
    assert len(read_notes(notes)[1]) >= 12
    assert len(small) == 1
    with monkeypatch.context() as patch:
        after = interrupt(patch, -1)
        resumed = run(ratio=0.7, notes=notes)
    assert len(small) == 1, "profiled again"
    assert not set(before) & set(after)
    assert len(set(before)) == 12
    assert after
    assert not notes.exists()
    assert os.listdir(tmp_path) == []
    assert resumed == run(ratio=0.7)


@pytest.mark.parametrize(
    "damage", [{"other": 1}, {"measured": [["a", 1.0]]}, {"measured": {"a": math.nan}}, {"measured": {"a": "1"}}]
)
def test_damaged_notes_are_measured_again(tmp_path, damage):
    path = tmp_path / "plan.tuning"
    kept = {"of": "abc", "profile": asdict(make_profile()), "measured": {"a": 0.5}}
    path.write_text(json.dumps(kept))
    assert read_notes(path) == ("abc", {"a": 0.5}, make_profile())
    path.write_text(json.dumps(kept | damage))
    assert read_notes(path) is None


OTHERS = {
    "images": lambda: {"images": make_images(20, seed=1)},
    "fewer images": lambda: {"images": IMAGES[:17]},
    "batch_size": lambda: {"batch_size": 2},
    "seed": lambda: {"seed": 1},
    "model": lambda: {"model": make_model(num_classes=9)},
    "weights": lambda: {"model": reweighted()},
}


def reweighted():
    model = make_model()
    model.head.weight.data.neg_()
    model.blocks[0].mlp.fc1.weight.data.neg_()
    return model


@pytest.mark.parametrize("name", matrix(OTHERS, "seed", "weights"))
def test_notes_of_something_else_are_not_used(tmp_path, monkeypatch, small, name):
    notes, options = tmp_path / "notes", OTHERS[name]()
    with monkeypatch.context() as patch:
        interrupt(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            run(ratio=0.7, notes=notes)
    plan = run(ratio=0.7, notes=notes, **options)
    assert len(small) == 2
    assert plan == run(ratio=0.7, **options)


def test_notes_of_other_code_are_not_used(tmp_path, monkeypatch, small):
    notes = tmp_path / "notes"
    with monkeypatch.context() as patch:
        interrupt(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            run(ratio=0.7, notes=notes)
    monkeypatch.setattr("vwt.tuning.notes._source_checksum", lambda: "another version of vwt")
    run(ratio=0.7, notes=notes)
    assert len(small) == 2


DAMAGED = ["", "{", "[]", "null", '{"of": 3}', '{"of": "x", "profile": {}, "measured": {}}']


@pytest.mark.parametrize("text", matrix(DAMAGED, "{", DAMAGED[-1]))
def test_damaged_notes_are_not_used(tmp_path, small, text):
    (tmp_path / "notes").write_text(text)
    assert run(ratio=0.8, notes=tmp_path / "notes").goal == {"ratio": 0.8}
    assert len(small) == 1
    assert not (tmp_path / "notes").exists()


PARTS = [{"measured": None}, {"measured": ...}, {"profile": {"depth": 4}}]


@pytest.mark.parametrize("changes", matrix(PARTS, PARTS[-1]), ids=repr)
def test_notes_that_are_damaged_in_part(tmp_path, monkeypatch, small, changes):
    notes = tmp_path / "notes"
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(ratio=0.7, notes=notes)
    content = {**json.loads(notes.read_text()), **changes}
    notes.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
    run(ratio=0.7, notes=notes)
    assert len(small) == 2


def test_notes_that_another_process_holds(tmp_path, small):
    notes = tmp_path / "notes"
    notes.write_text("of the other")
    with (
        held_elsewhere(tmp_path / "notes.lock") as other,
        pytest.raises(DocumentError, match=rf"/notes is held by process {other.pid} on .*; wait for it, or choose"),
    ):
        run(ratio=0.7, notes=notes)
    assert notes.read_text() == "of the other"
    assert small == []


def test_notes_that_cannot_be_written(tmp_path, small):
    from vwt.errors import VWTError

    with pytest.raises(VWTError, match="absent"):
        run(ratio=0.7, notes=tmp_path / "absent" / "notes")


# -- what is chosen ----------------------------------------------------------------------------------------------------


def point(ms, kl, agreement=1.0):
    return Point(None, PruningSchedule({}), ms, ms / 100, kl, agreement)


FRONT = [point(100, 0.0), point(80, 0.02, 0.97), point(82, 0.01, 0.98), point(70, 0.05, 0.95), point(60, 0.2, 0.8)]


@pytest.mark.parametrize(
    ("goal", "chosen"),
    [
        ({"ratio": 0.8}, 80),
        ({"ratio": 0.815}, 82),  # a hundredth over
        ({"milliseconds": 75}, 70),
        ({"ratio": 1.0}, 100),
        ({"agreement": 0.96}, 80),
        ({"agreement": 1.0}, 100),
        ({"agreement": 0.1}, 60),
        ({"ratio": 0.85, "agreement": 0.96}, 82),
    ],
)
def test_the_least_change_within_a_budget_or_the_fastest_that_agrees(goal, chosen):
    assert choose(FRONT, goal).milliseconds == chosen


def test_points_that_no_other_beats():
    worse = [point(90, 0.02), point(71, 0.05), point(101, 0.0)]
    assert [p.milliseconds for p in front_of(FRONT + worse)] == [100, 82, 80, 70, 60]
