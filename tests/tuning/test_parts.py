"""The parts of a model: together they are the model, in every runtime; drifts of the machine do not count."""

from collections import Counter

import pytest
import torch

from tests.export.cases import needs_tracing
from tests.reductions.cases import make_model
from vwt import VWTokenizer
from vwt.errors import ArgumentError
from vwt.export.runtimes import check_runtime
from vwt.reductions.kinds import KINDS, check_amounts
from vwt.tuning import parts
from vwt.tuning.parts import CHECKS, FITTED, FITTED_ELSEWHERE, FREE, Parts


def make_parts(runtime="torch", *, points=3, batch_size=2, **options):
    return Parts(make_model(**options), batch_size, points, None, 0, runtime)


# -- schedules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_schedules_leave_from_all_to_half_of_the_tokens(pool):
    own = make_parts(depth=12, img_size=224, global_pool=pool)
    draw = parts._Draw(own.backbone, 196, 0)
    for schedules, number in ((own.checks[1:], CHECKS - 1), (own.fitted, FITTED)):
        left = [draw._left(made) for made in schedules]
        assert len(left) == number
        assert left == pytest.approx([1 - 0.5 * (i + 1) / number for i in range(number)], abs=0.05)
        for made in schedules:
            check_amounts(made, 12, 196)
            assert pool == "avg" or 11 not in made  # where nothing would happen
    assert own.checks[0] == {}
    assert all(len({what.kind for what in made.values()}) == 1 for made in own.fitted)
    assert {what.kind for made in own.fitted[:3] for what in made.values()} == set(KINDS)


def test_a_model_in_which_nothing_can_be_reduced():
    own = make_parts(depth=1)  # whose only block reads no patches any more
    assert (own.checks, own.fitted) == ([{}], [])


# -- in torch ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2, "global_pool": "avg"}], ids=["token", "registers"])
def test_the_parts_are_the_model(options):
    own = make_parts(**options)
    tokens = own._embed(own.images)
    torch.testing.assert_close(own._head(own._block(tokens)), own.backbone.model(own.images))
    half = own._tokens(own.counts[1])
    torch.testing.assert_close(half, tokens[:, : own.counts[1]])
    torch.testing.assert_close(own._counting(half), own._block(half))  # each counts once
    reduced = own.checks[-1]
    call = own._forward(reduced)
    torch.testing.assert_close(call(), VWTokenizer(own.backbone.model, schedule=reduced)(own.images))


def test_the_model_is_left_as_it_is():
    model = make_model()
    Parts(model, 1, 2, None, 0)._open(lambda tokens: tokens, torch.zeros(1))
    assert not model.training
    Parts(model.train(), 1, 2, None, 0)._open(lambda tokens: tokens, torch.zeros(1))
    assert model.training


# -- elsewhere ---------------------------------------------------------------------------------------------------------


def fake_runtime(monkeypatch, milliseconds):
    """What is built, and how often; each call takes what `milliseconds` says of how many are timed."""
    built = Counter()
    monkeypatch.setattr(parts, "run_in", lambda *_: built.update(["model"]) or (lambda images: None))
    monkeypatch.setattr(parts, "run_module", lambda *_: built.update(["part"]) or (lambda tokens: None))
    monkeypatch.setattr(Parts, "_time", lambda self, calls, runs, progress: milliseconds(len(calls)))
    return built


def test_a_drift_of_the_machine_does_not_count(monkeypatch):
    """The machine becomes slower with each group; relative to the full model nothing changes."""
    factors = iter(range(1, 100))

    def milliseconds(calls):
        factor = next(factors)
        return [10.0 * factor, *[5.0 * factor] * (calls - 1)]

    fake_runtime(monkeypatch, milliseconds)
    ms = make_parts("onnxruntime").measure(3, False)
    whole = ms.pop(("forward", 0))
    assert set(ms.values()) == {0.5 * whole}


def test_few_files_are_built(monkeypatch):
    built = fake_runtime(monkeypatch, lambda calls: [10.0] * calls)
    own = make_parts("openvino", points=16)
    ms = own.measure(3, False)
    assert built == {"part": 5, "model": CHECKS + FITTED_ELSEWHERE}
    assert len(ms) == 2 + 3 * len(own.counts) + len(own.checks) + len(own.fitted)


@needs_tracing
@torch.inference_mode()
def test_a_part_takes_any_number_of_tokens():
    try:
        check_runtime("onnxruntime")
    except ArgumentError as error:
        pytest.skip(str(error))
    own = make_parts("onnxruntime", depth=1, global_pool="avg")
    with torch.inference_mode(False):
        run = own._open(own._counting, own._tokens(own.counts[-1]), FREE)
    for count in own.counts:
        tokens = own._tokens(count)
        torch.testing.assert_close(run(tokens), own._counting(tokens), atol=1e-4, rtol=1e-4)
