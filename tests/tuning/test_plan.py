import json
import math
from dataclasses import replace

import pytest
import torch

from tests.reductions.cases import make_model
from tests.tuning.test_calibration import codebook_of, make_images
from tests.tuning.test_profile import make_profile
from vwt import Absorb, InterImage, Neighbours, Plan, Prune, PruningSchedule, VWTokenizer
from vwt.errors import CodebookError, DocumentError, MismatchError
from vwt.tuning.plan import Point, describe, make_strategy

POINT = Point({"name": "Neighbours", "drop": 0.2}, PruningSchedule({1: Absorb(3), 2: 0.25}), 7.5, 0.75, 0.0125, 0.9375)
WHOLE = Point(None, PruningSchedule({}), 10.0, 1.0, 0.0, 1.0)
SINGLE = Point(None, PruningSchedule({1: Prune(4)}), 9.0, 0.9, 0.003, 0.98)


def make_plan(**changes):
    """A plan for the model that `make_model` makes, as if tuned here."""
    profile = make_profile()
    known = {"model": profile.model, "batch_size": 1, "precision": "float32", "machine": profile.machine}
    known |= {"goal": {"ratio": 0.75}, "chosen": POINT, "front": [WHOLE, SINGLE, POINT]}
    return Plan(**{**known, **changes})


def test_there_and_back(tmp_path):
    plan = make_plan()
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(str(tmp_path / "plan.json"))
    assert loaded == plan
    assert str(loaded) == str(plan)
    assert json.loads((tmp_path / "plan.json").read_text())["format"] == "vwt plan"


@torch.inference_mode()
@pytest.mark.parametrize("chosen", [POINT, WHOLE, SINGLE], ids=["both", "whole", "single"])
def test_it_makes_the_model_as_planned(chosen):
    model, images = make_model(), make_images(3)
    fast = make_plan(chosen=chosen).apply(model)
    strategy = Neighbours(0.2) if chosen is POINT else None
    assert fast.schedule == chosen.schedule
    assert torch.equal(fast(images), VWTokenizer(model, strategy, chosen.schedule)(images))


def test_a_plan_of_other_threads_says_so():
    machine = make_profile().machine
    machine |= {"device": "cpu", "threads": machine["threads"] + 1}
    with pytest.warns(UserWarning, match=rf"the plan was tuned with {machine['threads']} threads, here torch has "):
        make_plan(machine=machine).apply(make_model())


def test_a_plan_with_a_codebook(tmp_path):
    model, codebook = make_model(), codebook_of(make_images())
    codebook.save(tmp_path / "words.zarr")
    made = {"name": "InterImage", "codebook": str(tmp_path / "words.zarr"), "threshold": 0.3}
    plan = make_plan(chosen=replace(POINT, strategy=made, schedule=PruningSchedule({})))
    with torch.inference_mode():
        expected = VWTokenizer(model, InterImage(codebook, 0.3))(make_images(3))
        assert torch.equal(plan.apply(model)(make_images(3)), expected)
    other = make_model(patch_size=8)
    with pytest.raises(MismatchError, match="patch"):
        plan.apply(other, force=True)
    absent = replace(plan.chosen, strategy={**made, "codebook": str(tmp_path / "absent.zarr")})
    with pytest.raises(CodebookError, match="absent"):
        make_plan(chosen=absent).apply(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "other"}, "model 'other', here 'vit_tiny_patch16_224"),
        ({"precision": "bfloat16"}, "precision 'bfloat16', here 'float32'"),
        ({"machine": {"cpu": "Abacus", "device": "cpu"}}, "cpu 'Abacus', here "),
        ({"machine": {**make_profile().machine, "device": "Some GPU"}}, "device 'Some GPU', here 'cpu'"),
        ({"model": "other", "precision": "float16"}, "model 'other', .*; precision 'float16'"),
    ],
    ids=["model", "precision", "cpu", "device", "both"],
)
def test_another_model_or_device_is_refused_unless_forced(changes, message):
    plan = make_plan(**changes)
    with pytest.raises(MismatchError, match=f"the plan was tuned for .*{message}.*force"):
        plan.apply(make_model())
    fast = plan.apply(make_model(), force=True)
    assert fast.schedule == POINT.schedule
    assert fast.strategy.drop == 0.2


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_plan_for_a_runtime_that_reads_files_is_not_applied(runtime):
    plan = make_plan(runtime=runtime)
    with pytest.raises(
        MismatchError, match=rf"tuned for runtime '{runtime}', here 'torch'; export it to NAME\."
    ) as error:
        plan.apply(make_model())
    assert "\n" not in str(error.value)
    assert plan.apply(make_model(), force=True).schedule == POINT.schedule


def test_a_plan_for_torch_compile_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(VWTokenizer, "compile", lambda self, **options: compiled.append(self))
    assert compiled == [make_plan(runtime="compile").apply(make_model())]
    make_plan().apply(make_model())
    assert len(compiled) == 1


def test_a_file_from_before_runtimes(tmp_path):
    make_plan(precision="bfloat16").save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content.pop("runtime") == "torch"
    content["dtype"] = content.pop("precision")
    (tmp_path / "plan.json").write_text(json.dumps(content))
    assert Plan.load(tmp_path / "plan.json") == make_plan(precision="bfloat16")
    (tmp_path / "plan.json").write_text(json.dumps(content | {"runtime": "torch"}))
    with pytest.raises(DocumentError, match="unknown dtype; without precision"):
        Plan.load(tmp_path / "plan.json")


def test_other_threads_and_versions_are_the_same_device():
    machine = {**make_profile().machine, "threads": 99, "torch": "0.1"}
    with pytest.warns(UserWarning, match="tuned with 99 threads"):
        assert make_plan(machine=machine).apply(make_model()).schedule == POINT.schedule


# -- what it says ------------------------------------------------------------------------------------------------------


def test_the_front_and_the_choice():
    lines = str(make_plan(front=[POINT, WHOLE, SINGLE])).splitlines()
    assert len(lines) == 5
    assert lines[0].split("  ") == ["latency ratio", "ms a batch", "agreement, %", "KL, nats", "plan"]
    assert lines[1].endswith("the model itself")
    assert lines[2].endswith("Prune(4) in block 1")
    assert lines[4] == f"chosen for ratio 0.75: {POINT}"
    assert str(POINT).endswith("0.75 of the model's latency (7.5 ms): agreement 93.8 %, KL 0.0125 nats")
    for part in ("0.750", "7.50", "93.8", "0.0125", "Neighbours(drop=0.2), Absorb(3) in block 1, Prune(0.25)"):
        assert part.replace(", Absorb", " + Absorb") in lines[3]


def test_no_plan_is_faster():
    plan = make_plan(chosen=WHOLE, goal={"ratio": 0.99, "agreement": 0.5})
    *_, chosen, advice = str(plan).splitlines()
    assert chosen.startswith("chosen for ratio 0.99, agreement 0.5: the model itself: ")
    assert "no plan is faster than the model itself for this goal" in advice
    assert "no plan is faster" not in str(make_plan(chosen=SINGLE))


def test_strategies_as_they_are_written():
    assert make_strategy(None) is None
    strategy = make_strategy({"name": "Neighbours", "threshold": 0.25, "always": [3, 1]})
    assert repr(strategy) == "Neighbours(threshold=0.25, always=(1, 3))"
    assert describe({"name": "Neighbours", "threshold": 0.25}) == "Neighbours(threshold=0.25)"
    assert describe(None) == ""


STRATEGIES = [
    {},
    {"drop": 0.2},
    {"name": "Telepathy"},
    {"name": ["Neighbours"], "drop": 0.1},
    {"name": "Neighbours"},
    {"name": "Neighbours", "drop": 0.7},
    {"name": "Neighbours", "drop": "much"},
    {"name": "Neighbours", "drop": 0.2, "speed": 3},
    {"name": "InterImage", "threshold": 0.2},
    "Neighbours",
    [],
    3,
]


@pytest.mark.parametrize("made", STRATEGIES, ids=repr)
def test_a_strategy_that_is_none(tmp_path, made):
    make_plan().save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    content["chosen"]["strategy"] = made
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(DocumentError, match="tune again") as error:
        Plan.load(tmp_path / "plan.json").apply(make_model())
    assert "\n" not in str(error.value)


# -- damaged files -----------------------------------------------------------------------------------------------------


def test_a_file_cut_short_anywhere(tmp_path):
    path = tmp_path / "plan.json"
    make_plan().save(path)
    text = path.read_text()
    for length in range(0, len(text.rstrip()), 7):
        path.write_text(text[:length])
        with pytest.raises(DocumentError, match=r"plan\.json is damaged or no plan"):
            Plan.load(path)


ROW = POINT.to_json()
CHANGES = {
    "unknown": ({"speed": 3}, "unknown speed"),
    "missing": ({"goal": ...}, "without goal"),
    "format": ({"format": "vwt profile"}, "is no plan of vwt"),
    "version": ({"version": 2}, "is of version 2"),
    "machine": ({"machine": {"threads": 1}}, "does not say where it was tuned"),
    "no machine": ({"machine": None}, "does not say where it was tuned"),
    "no point": ({"chosen": None}, "a point with other fields than"),
    "a field more": ({"chosen": {**ROW, "joules": 1}}, "a point with other fields than"),
    "a field less": ({"front": [{"kl": 1}]}, "a point with other fields than"),
    "no front": ({"front": None}, "no goal or no front"),
    "no number": ({"chosen": {**ROW, "kl": "small"}}, "figures are no numbers"),
    "true": ({"chosen": {**ROW, "agreement": True}}, "figures are no numbers"),
    "operation": (
        {"chosen": {**ROW, "schedule": [{"block": 1, "operation": "drop", "amount": 3}]}},
        "has the operation 'drop'",
    ),
    "no schedule": ({"chosen": {**ROW, "schedule": None}}, "expected a list"),
    "goal": ({"goal": "fast"}, "goal"),
    "goal that is a list": ({"goal": {"ratio": [[0.75]]}}, "no goal or no front"),
    "not a number": ({"chosen": {**ROW, "kl": math.nan}}, "figures are no numbers"),
    "runtime": ({"runtime": "tvm"}, "has runtime 'tvm'; expected one of torch, compile, onnxruntime, openvino; tune"),
    "runtimes": ({"runtime": ["torch"]}, r"has runtime \['torch'\]; expected one of"),
    "precision": ({"precision": None}, "has precision None; expected one of float32, bfloat16, float16, float64; tune"),
    "model": ({"model": ["vit"]}, r"has model \['vit'\]"),
    "batch": ({"batch_size": True}, "has batch_size True"),
    "cpu": ({"machine": {"cpu": None, "device": "cpu"}}, "does not say where it was tuned"),
    "a strategy in the front": ({"front": [{**ROW, "strategy": {}}]}, r"has the strategy \{\}; tune again"),
    "a large strategy": ({"chosen": {**ROW, "strategy": ["x" * 5000]}}, "has the strategy .{,110}; tune again"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_damaged_files(tmp_path, name):
    changes, message = CHANGES[name]
    make_plan().save(tmp_path / "plan.json")
    content = {**json.loads((tmp_path / "plan.json").read_text()), **changes}
    content = {name: value for name, value in content.items() if value is not ...}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(DocumentError, match=message) as error:
        Plan.load(tmp_path / "plan.json")
    assert "plan.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_unwritable(tmp_path):
    with pytest.raises(DocumentError, match="cannot read the plan"):
        Plan.load(tmp_path / "absent.json")
    with pytest.raises(DocumentError, match=r"cannot write the plan .*; choose another file"):
        make_plan().save(tmp_path / "absent" / "plan.json")
