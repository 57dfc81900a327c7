import json
import re
from dataclasses import replace

import pytest
import torch

from tests.matrix import matrix
from tests.models.test_vision_language import MODELS, make_images, make_inputs, make_model
from tests.reductions.cases import make_model as make_classifier
from vwt import Absorb, Merge, Plan, Prune, VWTokenizer, tune
from vwt.errors import ArgumentError, DocumentError, MismatchError
from vwt.measure.timing import Latency
from vwt.tuning import prompts as tuning
from vwt.tuning.calibration import compare
from vwt.tuning.prompts import next_logits

QUIET = {"progress": False}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few candidates."""
    monkeypatch.setattr(tuning, "SHARES", (0.5,))


def fake_latency(monkeypatch, *milliseconds):
    """Latencies of the full model, and of what is tried, in order; and what was timed."""
    calls = []

    def measure(modules, batches, **options):
        calls.append((len(modules), len(batches)))
        times = (*milliseconds, *[milliseconds[-1]] * len(modules))[: len(modules)]
        return [Latency(own, own / times[0], (0.0, 1.0)) for own in times]

    monkeypatch.setattr(tuning, "measure_batches", measure)
    return calls


def test_what_is_tried():
    whole = VWTokenizer(make_model("llava"))  # of whose three blocks two are read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "SHARES", (0.01, 0.25, 0.75))
        groups = tuning._candidates(whole)
    named = [[(dict(one.schedule), one.after) for one in group] for group in groups]
    assert named == [
        [({}, Prune(0.25)), ({}, Merge(0.25)), ({}, Absorb(0.25))],
        [({0: Absorb(0.25)}, None)],
        [({1: Absorb(0.25)}, None)],
        [({}, Prune(0.75)), ({}, Absorb(0.75))],  # no merge removes more than a half
        [({0: Absorb(0.75)}, None)],
        [({1: Absorb(0.75)}, None)],
    ]


def test_a_tower_of_which_no_block_is_read():
    model = make_model("llava")
    model.config.vision_feature_layer = -4  # what enters the first of three blocks
    plan = tune(model, prompts=make_inputs(model, (1,)), ratio=1, **QUIET)
    assert not plan.chosen.reduces
    assert "leave it as it is" in str(plan)


@pytest.mark.parametrize("name", matrix(MODELS, "llava", "paligemma"))
def test_a_plan_for_each_class(name):
    model = make_model(name)
    plan = tune(model, prompts=[make_inputs(model, (1,)), make_inputs(model, (1, 2))], agreement=0.01, **QUIET)
    assert plan.goal == {"agreement": 0.01}
    assert plan.chosen in plan.front
    assert plan.front[0].kl >= 0
    plan.apply(model)


@torch.inference_mode()
def test_figures_are_those_of_the_next_token(monkeypatch):
    model = make_model("llava")
    timed = fake_latency(monkeypatch, 10.0, 6.0)
    prompts = [make_inputs(model, counts) for counts in ((1,), (2,), (1, 1), (2, 1), (1,))]
    plan = tune(model, prompts=prompts, ratio=0.7, **QUIET)
    assert timed == [(1 + 1 + 2, 4)]  # the model, one kind after the tower, two blocks; the first four prompts
    fast = plan.apply(model)
    full = torch.cat([next_logits(VWTokenizer(model), prompt) for prompt in prompts])
    own = compare(full, torch.cat([fast(**prompt).logits[:, -1] for prompt in prompts]))
    assert (plan.chosen.ratio, plan.chosen.milliseconds) == (0.6, 6.0)
    assert plan.chosen.kl == pytest.approx(own.mean_kl, rel=1e-4)
    assert plan.chosen.agreement == own.agreement
    assert own.mean_kl > 0


@torch.inference_mode()
def test_of_the_kinds_the_closest_is_timed(monkeypatch):
    model = make_model("paligemma")
    fake_latency(monkeypatch, 10.0, 5.0, 9.0)  # of these only what is after the tower is fast
    prompt = make_inputs(model, (1, 1, 1))
    chosen = tune(model, prompts=prompt, ratio=0.5, **QUIET).chosen
    full = next_logits(VWTokenizer(model), prompt)
    kls = {
        kind(0.5): compare(full, next_logits(VWTokenizer(model, after=kind(0.5)), prompt)).mean_kl
        for kind in (Absorb, Merge, Prune)
    }
    assert chosen.after == min(kls, key=kls.get)
    assert not chosen.schedule
    assert chosen.kl == pytest.approx(min(kls.values()), rel=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llava", "llava-next", "paligemma"])
@pytest.mark.parametrize("after", [None, Absorb(0.5)])
def test_next_logits_are_at_the_last_token_that_is_no_padding(name, after):
    model = make_model(name)
    fast = VWTokenizer(model, after=after)
    inputs = make_inputs(model, (2, 1), "right")
    cut = fast.processor_inputs(**inputs)
    logits = model(**cut).logits
    last = cut["attention_mask"].sum(dim=1) - 1
    assert last[0] > last[1]
    torch.testing.assert_close(next_logits(fast, inputs), logits[torch.arange(2), last], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_without_a_mask_it_is_the_last_token():
    model = make_model("llava")
    inputs = make_inputs(model, (1,))
    expected = next_logits(VWTokenizer(model), inputs)
    del inputs["attention_mask"]
    torch.testing.assert_close(next_logits(VWTokenizer(model), inputs), expected, atol=1e-5, rtol=1e-5)


def test_the_plan_there_and_back(tmp_path, monkeypatch):
    model = make_model("llava")
    fake_latency(monkeypatch, 10.0, 5.0, 9.0)
    plan = tune(model, prompts=make_inputs(model, (1,)), ratio=0.5, **QUIET)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert f"after={plan.chosen.after!r}" in str(loaded)
    assert "leave it as it is" not in str(loaded)
    fast = loaded.apply(model)
    assert (fast.after, dict(fast.schedule), fast.strategy) == (plan.chosen.after, {}, None)
    assert "after" not in replace(plan.chosen, after=None).to_json()
    assert loaded.model == "LlavaForConditionalGeneration"
    for other in (make_classifier(), make_model("paligemma"), model.model.vision_tower):
        with pytest.raises(MismatchError, match="the plan was tuned for model 'LlavaForConditionalGeneration', here "):
            loaded.apply(other)


def test_a_plan_of_the_vision_tower_alone_still_fits(monkeypatch):
    model = make_model("llava")
    fake_latency(monkeypatch, 10.0, 5.0, 9.0)
    plan = tune(model, prompts=make_inputs(model, (1,)), ratio=1, **QUIET)
    assert replace(plan, model="CLIPVisionModel").apply(model).model is model


def test_a_report_is_refused_in_one_line(tmp_path, monkeypatch):
    pytest.importorskip("altair", reason="altair is not installed; pip install vwt[report]")
    model = make_model("llava")
    fake_latency(monkeypatch, 10.0, 5.0, 9.0)
    plan = tune(model, prompts=make_inputs(model, (1,)), ratio=0.5, **QUIET)
    with pytest.raises(ArgumentError, match="LlavaForConditionalGeneration is a model of images and text") as raised:
        plan.report(tmp_path / "report.html", model, torch.zeros(16, 3, 64, 64), **QUIET)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ("half", "has after 'half'; expected an operation and an amount"),
        ({"operation": "absorb"}, "expected an operation and an amount"),
        ({"operation": "melt", "amount": 0.5}, "has the operation 'melt'; expected prune or merge or absorb"),
        ({"operation": "absorb", "amount": -1}, "has the reduction "),
        ({"operation": "absorb", "amount": "1"}, "has the reduction "),
    ],
)
def test_damaged_plans(tmp_path, monkeypatch, after, message):
    model, path = make_model("llava"), tmp_path / "plan.json"
    fake_latency(monkeypatch, 10.0, 5.0, 9.0)
    tune(model, prompts=make_inputs(model, (1,)), ratio=0.5, **QUIET).save(path)
    content = json.loads(path.read_text())
    content["chosen"]["after"] = after
    path.write_text(json.dumps(content))
    with pytest.raises(DocumentError, match=re.escape(message)) as raised:
        Plan.load(path)
    assert "\n" not in str(raised.value)


def test_labels_are_left_out():
    model = make_model("llava")
    inputs = make_inputs(model, (1, 1))
    plan = tune(model, prompts=inputs | {"labels": inputs["input_ids"]}, ratio=1, **QUIET)
    assert plan.batch_size == 2


IDS = torch.ones(1, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "LlavaForConditionalGeneration reads image tokens in its prompt, and is tuned on prompts; give prompts="),
        ({"prompts": []}, "prompts are list, and empty; expected a list of what the model's processor makes"),
        ({"prompts": 3}, "prompts are int; expected a list"),
        ({"prompts": "USER: <image>"}, "prompts are str; expected a list"),
        ({"prompts": ["USER: <image>"]}, "prompt 0 is str; expected what the model's processor makes"),
        ({"prompts": {"input_ids": IDS}}, "prompt 0 has no pixel_values; give tensors"),
        ({"prompts": {"input_ids": [[1]], "pixel_values": None}}, "prompt 0 has no input_ids and no pixel_values"),
        ({"prompts": [], "images": IDS}, "prompts are given with images, which are for images; leave them out"),
        ({"prompts": [], "codebooks": ["a"], "notes": "b", "batch_size": 2}, "with codebooks and notes and batch_size"),
    ],
)
def test_wrong_prompts(options, message):
    with pytest.raises(ArgumentError, match=re.escape(message)) as raised:
        tune(make_model("llava"), ratio=0.5, **options, **QUIET)
    assert "\n" not in str(raised.value)


def test_wrong_models_and_goals(monkeypatch):
    model = make_model("llava")
    with pytest.raises(ArgumentError, match="tune needs a goal"):
        tune(model, prompts=make_inputs(model), **QUIET)
    with pytest.raises(ArgumentError, match=r"prompts are for models .* not for VisionTransformer; give images"):
        tune(make_classifier(), prompts=make_inputs(model), ratio=0.5, **QUIET)
    with pytest.raises(ArgumentError, match="tune needs images"):
        tune(make_classifier(), ratio=0.5, **QUIET)
    with pytest.raises(ArgumentError, match="is tuned on prompts"):
        tune(model, make_images(model)["pixel_values"], ratio=0.5, **QUIET)
    fake_latency(monkeypatch, 10.0, 6.0)
    with pytest.raises(ArgumentError, match=r"no plan reaches .*'ratio': 0.1.* what can be reached is ratio 1.00"):
        tune(model, prompts=make_inputs(model), ratio=0.1, **QUIET)
    with pytest.raises(ArgumentError, match="train mode"):
        tune(model.train(), prompts=make_inputs(model), ratio=0.5, **QUIET)
