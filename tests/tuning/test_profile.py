import json
import math
import warnings
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.matrix import matrix
from tests.reductions.cases import make_model
from vwt.errors import ArgumentError, DocumentError, ImageError, MismatchError, ModelError
from vwt.reductions.absorb import Absorb
from vwt.reductions.kinds import KINDS
from vwt.reductions.merge import Merge
from vwt.reductions.prune import Prune
from vwt.reductions.reduction import patches_entering
from vwt.tuning.parts import Parts
from vwt.tuning.profile import LatencyProfile

PATCHES, PREFIX, DEPTH = 16, 1, 4
COUNTS = [2, 5, 9, 17]
REDUCTIONS = {
    "first": [0.25],
    "prune": [1.0, 0.5],
    "merge": [2.0, 0.125],
    "absorb": [4.0, 0.0625],
}


def block_ms(count):
    return 3.0 * count


def attention_ms(count):
    return 1.0 * count


def counting_ms(count):
    return 3.0 * count + 7.0


def make_profile(**changes):
    """A profile of round numbers, of the model that `make_model` makes, as if measured here."""
    known = {
        **LatencyProfile.identify(make_model()),
        "batch_size": 1,
        "counts": COUNTS,
        "block": [block_ms(n) for n in COUNTS],
        "attention": [attention_ms(n) for n in COUNTS],
        "counting": [counting_ms(n) for n in COUNTS],
        "reductions": REDUCTIONS,
        "embed": 10.0,
        "head": 20.0,
        "checks": [],
    }
    machine = {name: known.pop(name) for name in ("device", "cpu", "threads", "torch", "timm")}
    return LatencyProfile(**{**known, "machine": machine, **changes})


TINY = {"img_size": 64, "patch_size": 16}


def test_what_is_known_of_the_model():
    """The tests below count on it."""
    assert {name: LatencyProfile.identify(make_model())[name] for name in ("depth", "prefix", "patches")} == {
        "depth": DEPTH,
        "prefix": PREFIX,
        "patches": PATCHES,
    }
    assert LatencyProfile.identify(make_model())["reads_prefix_only"]


# -- what it predicts --------------------------------------------------------------------------------------------------


def slow_predict(profile, reductions, patches=None):
    """A forward, part by part, in plain Python; only for the round numbers above."""
    total, count, merged = profile.embed + profile.head, profile.prefix + (patches or profile.patches), False
    reduced = bool(reductions) or patches is not None
    happens = {}
    for block in range(profile.depth):
        last = profile.reads_prefix_only and reduced and block == profile.depth - 1
        entering, reduction = count, None if last else reductions.get(block)
        total += attention_ms(entering)
        if reduction is not None:
            happens[block] = reduction
            count -= reduction.removed(count - profile.prefix)
            fixed, each = REDUCTIONS[reduction.kind]
            total += fixed + each * entering
        total += 2.0 * (
            COUNTS[0] if last else count
        )  # the MLP; of prefix tokens alone it is taken as the least measured
        total += 7.0 * merged
        merged = merged or isinstance(reduction, Merge | Absorb)
    return total + REDUCTIONS["first"][0] * bool(happens)


REDUCED = [
    {},
    {0: Prune(4)},
    {1: Prune(0.5)},
    {1: Merge(8)},
    {0: Absorb(3), 2: Prune(5)},
    {0: Merge(3), 1: Absorb(3), 2: Merge(2)},
    {1: Absorb(0.99)},
    {3: Prune(5)},
    {1: Prune(3), 3: Merge(5)},
    {0: Prune(100)},
]


@pytest.mark.parametrize("patches", matrix([None, 16, 9, 3], None, 9))
@pytest.mark.parametrize("pool", [True, False], ids=["token", "all"])
@pytest.mark.parametrize("reductions", REDUCED, ids=repr)
def test_predictions_are_the_sum_of_the_parts(reductions, pool, patches):
    profile = make_profile(reads_prefix_only=pool)
    assert profile.predict(reductions, patches) == pytest.approx(slow_predict(profile, reductions, patches))


def test_known_answers():
    profile = make_profile()
    assert profile.predict() == 10 + 20 + 4 * 3 * 17
    # One MLP of the class token alone, and nothing else changes: the last reduction does not happen.
    assert profile.predict({3: Prune(5)}) == profile.predict({}, 16) == 10 + 20 + 4 * 17 + 3 * 2 * 17 + 2 * 2
    # Block 0: attention of 17, pruning of 17, MLP of 13; then three attentions of 13, two MLPs, and the least one.
    expected = 30 + 17 + 0.25 + (1 + 0.5 * 17) + 26 + 3 * 13 + 2 * 26 + 2 * 2
    assert profile.predict({0: Prune(4)}) == expected
    merged = 30 + 17 + 0.25 + (2 + 0.125 * 17) + 26 + 3 * 13 + 2 * 26 + 2 * 2 + 3 * 7
    assert profile.predict({0: Merge(4)}) == merged


def test_counts_between_the_measured_ones_are_interpolated():
    profile = make_profile(block=[2.0, 4.0, 16.0, 20.0], attention=[1.0] * 4, counting=[2.0, 4.0, 16.0, 20.0])
    assert profile.predict({}, 6) == pytest.approx(
        30 + 3 * 10.0 + 1.0 + 2.0 - 1.0
    )  # 7 tokens: halfway from 5 to 9; the least MLP


@given(st.integers(1, PATCHES), st.integers(1, PATCHES))
def test_more_tokens_take_no_less(one, other):
    profile = make_profile()
    less, more = sorted([one, other])
    assert profile.predict({}, less) <= profile.predict({}, more) <= profile.predict()


# -- knees and errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "knees"),
    [
        ([2, 5, 9, 17], []),  # a line
        ([2, 5, 9, 33], [9]),  # from 1 a token to 3
        ([2, 5, 17, 41], [5]),  # from 1 to 3, and stays
        ([2, 5, 13, 53], [9]),  # from 1 to 2, which is little beside what follows, to 5
        ([2, 8, 12, 16], []),  # flatter and flatter
        ([2, 5, 9, 20.9], []),  # a little steeper
    ],
)
def test_knees(block, knees):
    assert make_profile(block=[float(ms) for ms in block]).knees() == knees


def test_the_error_is_the_median_of_the_relative_errors():
    checks = [{"schedule": "", "predicted": p, "measured": 10.0} for p in (11.0, 8.0, 10.5)]
    assert make_profile(checks=checks).error == pytest.approx(0.1)
    assert make_profile().error == 0


# -- whom it serves ----------------------------------------------------------------------------------------------------


def test_it_serves_the_model_that_was_measured():
    make_profile().check(make_model())
    make_profile(batch_size=3).check(make_model(), 3)


@pytest.mark.parametrize(
    ("make", "batch_size", "message"),
    [
        (lambda: make_model(depth=5), 1, "depth 4, here it is 5"),
        (lambda: make_model(reg_tokens=2), 1, "prefix 1, here it is 3"),
        (lambda: make_model(img_size=96), 1, "patches 16, here it is 36"),
        (lambda: make_model().double(), 1, "precision 'float32', here it is 'float64'"),
        (lambda: make_model().to(torch.bfloat16), None, "precision 'float32', here it is 'bfloat16'"),
        (lambda: make_model(global_pool="avg"), 1, "reads_prefix_only True, here it is False"),
        (make_model, 2, "batch_size 1, here it is 2"),
    ],
)
def test_it_serves_no_other(make, batch_size, message):
    with pytest.raises(MismatchError, match=f"the profile was measured with {message}"):
        make_profile().check(make(), batch_size)


def test_another_name_is_another_model():
    with pytest.raises(MismatchError, match="with model 'other', here it is 'vit_tiny_patch16_224"):
        make_profile(model="other").check(make_model())


# -- files -------------------------------------------------------------------------------------------------------------


def test_there_and_back(tmp_path):
    profile = make_profile(checks=[{"schedule": "{}", "predicted": 1.5, "measured": 2.5}])
    profile.save(tmp_path / "profile.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LatencyProfile.load(tmp_path / "profile.json") == profile
    assert profile.elsewhere() == []


def test_a_file_cut_short_anywhere(tmp_path):
    path = tmp_path / "profile.json"
    make_profile().save(path)
    text = path.read_text()
    for length in range(0, len(text.rstrip()), 7):
        path.write_text(text[:length])
        with pytest.raises(DocumentError, match=r"profile\.json is damaged or no profile"):
            LatencyProfile.load(path)


def write(path, **changes):
    make_profile().save(path)
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


CHANGES = {
    "unknown": ({"speed": 3}, "has not the fields of one: unknown speed"),
    "missing": ({"head": ...}, "without head"),
    "format": ({"format": "vwt plan"}, "is no profile of vwt"),
    "newer": ({"version": 3}, "is of version 3, this vwt reads version 2; write it again"),
    "of other reductions": ({"version": 1}, "is of version 1, this vwt reads version 2; write it again"),
    "too few": ({"block": [1.0, 2.0]}, "has not 4 numbers in 'block'"),
    "no numbers": ({"attention": [1.0, 2.0, "3", 4.0]}, "has not 4 numbers in 'attention'"),
    "nothing": ({"counting": None}, "has not 4 numbers in 'counting'"),
    "one count": ({"counts": [17], "block": [1.0], "attention": [1.0], "counting": [1.0]}, "at least two counts"),
    "no counts": ({"counts": "many"}, "at least two counts"),
    "fewer kinds": (
        {"reductions": {"first": [1.0], "prune": [1.0, 1.0]}},
        "the reductions first, prune, merge, absorb",
    ),
    "no reductions": ({"reductions": []}, "the reductions first, prune, merge, absorb"),
    "a part of one": ({"reductions": {**REDUCTIONS, "absorb": [1.0]}}, "has not 2 numbers in 'absorb'"),
    "no machine": ({"machine": None}, "does not say where it was measured"),
    "no device": ({"machine": {"cpu": "a"}}, "does not say where it was measured"),
    "embed": ({"embed": "fast"}, "embed"),
    "head": ({"head": None}, "head"),
    "depth": ({"depth": "12"}, "depth"),
    "patches": ({"patches": None}, "patches"),
    "checks": ({"checks": [{"schedule": "{}"}]}, "checks"),
    "too many blocks": ({"depth": 4_000_000_000}, "has depth 4000000000"),
    "too many tokens": ({"patches": 10**12 - 1, "counts": [2, 5, 9, 10**12]}, "has patches 999999999999"),
    "other tokens": ({"patches": 32}, "counts other than whole numbers up to all 33 tokens"),
    "counts that are shares": ({"counts": [2.5, 5, 9, 17]}, "counts other than whole numbers"),
    "not a number": ({"block": [1.0, 2.0, math.nan, 4.0]}, "has not 4 numbers in 'block'"),
    "true": ({"attention": [True, 2.0, 3.0, 4.0]}, "has not 4 numbers in 'attention'"),
    "endless": ({"embed": math.inf}, "has embed inf"),
    "runtime": ({"runtime": 1}, "has runtime 1; expected one of torch, compile, onnxruntime, openvino; measure again"),
    "precision": ({"precision": "int4"}, "has precision 'int4'; expected one of float32, bfloat16"),
    "model": ({"model": 3}, "has model 3; expected a str"),
    "prefix only": ({"reads_prefix_only": "no"}, "has reads_prefix_only 'no'; expected a bool"),
    "nested": ({"head": [[[0.0] * 9] * 9] * 9}, r"has head \[\[\[0\.0, .{,100}\.\.\.; expected"),
    "cpu": ({"machine": {"cpu": 3, "device": "cpu"}}, "does not say where it was measured"),
    "checks of nothing": ({"checks": [{"predicted": 1.0, "measured": 0.0}]}, "checks"),
    "counts that fall": ({"counts": COUNTS[::-1]}, "counts"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_damaged_files(tmp_path, name):
    changes, message = CHANGES[name]
    write(tmp_path / "profile.json", **changes)
    with pytest.raises(DocumentError, match=message) as error:
        LatencyProfile.load(tmp_path / "profile.json")
    assert "profile.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_unwritable(tmp_path):
    with pytest.raises(DocumentError, match="cannot read the profile"):
        LatencyProfile.load(tmp_path / "absent.json")
    with pytest.raises(DocumentError, match=r"cannot write the profile .*; choose another file"):
        make_profile().save(tmp_path / "absent" / "profile.json")


@pytest.mark.parametrize(("name", "value"), [("cpu", "Abacus 3"), ("torch", "0.1"), ("device", "Some GPU")])
def test_what_was_measured_elsewhere_says_so(tmp_path, name, value):
    profile = make_profile()
    profile = replace(profile, machine={**profile.machine, name: value})
    profile.save(tmp_path / "profile.json")
    with pytest.warns(UserWarning, match=f"measured elsewhere: {name} {value!r}, here "):
        assert LatencyProfile.load(tmp_path / "profile.json") == profile
    assert len(profile.elsewhere()) == 1


# -- measuring ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    return LatencyProfile.measure(make_model(reg_tokens=2), 2, points=4, runs=1, progress=False)


def test_what_is_measured(measured, tmp_path):
    assert {name: getattr(measured, name) for name in ("depth", "prefix", "patches", "batch_size", "precision")} == {
        "depth": 4,
        "prefix": 3,
        "patches": 16,
        "batch_size": 2,
        "precision": "float32",
    }
    assert measured.reads_prefix_only
    assert measured.model.startswith("vit_tiny_patch16_224")
    assert measured.counts == [4, 9, 14, 19]
    for series in (measured.block, measured.attention, measured.counting):
        assert len(series) == 4
        assert all(ms > 0 for ms in series)
    assert min(measured.embed, measured.head) > 0
    assert set(measured.reductions) == {"first", *KINDS}
    assert all(ms >= 0 for values in measured.reductions.values() for ms in values)
    assert measured.machine["device"] == "cpu"
    assert measured.machine["threads"] == torch.get_num_threads()
    assert measured.elsewhere() == []
    measured.check(make_model(reg_tokens=2), 2)
    measured.save(tmp_path / "profile.json")
    assert LatencyProfile.load(tmp_path / "profile.json") == measured
    json.dumps(asdict(measured), allow_nan=False)


def test_predictions_are_checked(measured):
    assert len(measured.checks) == 8
    assert measured.checks[0]["schedule"] == "{}"
    assert measured.checks[0]["predicted"] == pytest.approx(measured.predict())
    assert len({check["schedule"] for check in measured.checks}) == 8
    for check in measured.checks:
        reductions = eval(check["schedule"], {kind.__name__: kind for kind in KINDS.values()})
        assert check["predicted"] == pytest.approx(measured.predict(reductions))
        assert check["measured"] > 0
        assert not reductions or patches_entering(reductions, 4, 16)[-1] < 16
    errors = sorted(abs(check["predicted"] / check["measured"] - 1) for check in measured.checks)
    assert measured.error == pytest.approx((errors[3] + errors[4]) / 2)


def test_the_model_is_not_changed():
    model = make_model(depth=1, global_pool="avg")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    profile = LatencyProfile.measure(model, points=2, runs=1, progress=False)
    assert profile.counts == [2, 17]
    assert not profile.reads_prefix_only
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("points", 1), ("runs", 0), ("runs", -3)])
def test_numbers_too_small(name, value):
    with pytest.raises(ArgumentError, match=f"{name} is {value}; expected at least"):
        LatencyProfile.measure(make_model(), **{name: value}, progress=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_there_is_not():
    with pytest.raises(ArgumentError, match="no device 'cuda'"):
        LatencyProfile.measure(make_model(), device="cuda", progress=False)


def test_a_model_that_is_not_supported():
    with pytest.raises(ModelError, match="not supported"):
        LatencyProfile.measure(torch.nn.Linear(3, 3), progress=False)


def test_figures_are_finite(measured):
    assert all(math.isfinite(measured.predict(reductions)) for reductions in REDUCED)


# -- checks ------------------------------------------------------------------------------------------------------------


def checks_off_by(*errors):
    return [{"schedule": "{}", "predicted": 10.0 * (1 + error), "measured": 10.0} for error in errors]


def test_predictions_that_are_off_are_said(recwarn):
    make_profile(checks=checks_off_by(0.04, -0.049, 0.3)).check(make_model())
    assert not recwarn
    with pytest.warns(
        UserWarning, match="predictions of 3 forwards are off by 6 % in the median, .*; measure again on"
    ):
        make_profile(checks=checks_off_by(0.04, -0.06, 0.3)).check(make_model())


@pytest.mark.parametrize("factor", [1.0, 1.2])
def test_a_profile_is_checked_as_it_is_measured(factor, monkeypatch, recwarn):
    """Parts of known latency, and forwards that take what these predict, or more."""

    def measure(self, runs, progress):
        ms = {"embed": 10.0, "head": 20.0}
        for name, latency in (("block", block_ms), ("attention", attention_ms), ("counting", counting_ms)):
            ms |= {(name, count): DEPTH * latency(count) for count in self.counts}
        known = make_profile(reductions=REDUCTIONS)
        forwards = [known.predict(schedule) for schedule in self.checks + self.fitted]
        checked = len(self.checks)
        return ms | {("forward", i): (factor if 0 < i < checked else 1) * each for i, each in enumerate(forwards)}

    monkeypatch.setattr(Parts, "measure", measure)
    profile = LatencyProfile.measure(make_model(), points=4, progress=False)
    assert profile.error == pytest.approx(1 - 1 / factor, abs=0.01)
    assert [check["measured"] < check["predicted"] * 1.01 for check in profile.checks] == [True] + [factor == 1] * 7
    assert bool(recwarn) == (factor > 1)


# -- runtimes ----------------------------------------------------------------------------------------------------------


def test_a_profile_says_its_runtime_and_precision(monkeypatch):
    asked = []

    def measure(self, runs, progress):
        asked.append((self.runtime, self.precision, self.images.dtype))
        names = [(name, count) for name in ("block", "attention", "counting") for count in self.counts]
        names += [("forward", index) for index in range(len(self.checks + self.fitted))]
        return dict.fromkeys([*names, "embed", "head"], 1.0)

    monkeypatch.setattr(Parts, "measure", measure)
    monkeypatch.setattr("vwt.tuning.where.check_runtime", lambda *_: None)
    model, options = make_model(), {"points": 2, "progress": False}
    with pytest.warns(UserWarning, match="off by"):  # as nothing of this is so
        profile = LatencyProfile.measure(model, runtime="openvino", precision="bfloat16", **options)
    assert asked == [("openvino", "bfloat16", torch.float32)]  # which computes in bfloat16 what is written in float32
    assert (profile.runtime, profile.precision) == ("openvino", "bfloat16")
    assert next(model.parameters()).dtype == torch.float32
    replace(profile, checks=[]).check(make_model().bfloat16())
    with pytest.raises(MismatchError, match="with precision 'bfloat16', here it is 'float32'"):
        profile.check(model)


def test_a_runtime_that_is_none_is_said_first():
    with pytest.raises(ArgumentError, match="runtime is 'tvm'; expected one of torch, compile, onnxruntime, openvino"):
        LatencyProfile.measure(make_model(), runtime="tvm", progress=False)
    with pytest.raises(ArgumentError, match="precision is 'float16'; expected one of float32, bfloat16"):
        LatencyProfile.measure(make_model(), runtime="onnxruntime", precision="float16", progress=False)


def test_a_file_from_before_runtimes(tmp_path):
    write(tmp_path / "profile.json", dtype="float32", precision=..., runtime=...)
    assert LatencyProfile.load(tmp_path / "profile.json") == make_profile()


def test_another_version_of_the_runtime_is_another_machine(monkeypatch):
    monkeypatch.setattr("vwt.tuning.profile.runtime_version", lambda runtime: {"onnxruntime": "2.0"})
    profile = make_profile(runtime="onnxruntime")
    assert profile.elsewhere() == ["onnxruntime None, here '2.0'"]


# -- images of another size, and threads -------------------------------------------------------------------------------


def test_a_profile_of_images_of_another_size():
    model = make_model(dynamic_img_size=True)
    profile = LatencyProfile.measure(model, points=2, runs=1, image_size=(80, 48), progress=False)
    assert (profile.patches, profile.counts) == (15, [2, 16])
    profile.check(model, image_size=(80, 48))
    with pytest.raises(MismatchError, match="measured with patches 15, here it is 16"):
        profile.check(model)


def test_a_size_that_the_model_does_not_take():
    with pytest.raises(ImageError, match="images are 80x48, the model takes 64x64"):
        LatencyProfile.measure(make_model(), points=2, runs=1, image_size=(80, 48), progress=False)


def test_other_threads_than_were_measured():
    profile = make_profile()
    machine = profile.machine | {"threads": profile.machine["threads"] + 1, "device": "cpu"}
    with pytest.warns(UserWarning, match=rf"measured with {machine['threads']} threads, here torch has "):
        replace(profile, machine=machine).check(make_model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        profile.check(make_model())


def test_what_does_not_happen_is_not_effective():
    reductions = {1: Absorb(2), 3: Absorb(2)}
    assert make_profile().effective(reductions) == {1: Absorb(2)}
    assert make_profile(reads_prefix_only=False).effective(reductions) == reductions
