import json
import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tuning.test_profile import make_profile
from vwt import Absorb, Merge, Prune, PruningSchedule
from vwt.errors import ArgumentError, DocumentError
from vwt.tuning.schedule import down_to, utility

amounts = st.integers(1, 10**9) | st.floats(0, 1, exclude_min=True, exclude_max=True)
reductions = amounts.map(Prune) | amounts.map(Merge) | amounts.map(Absorb)
schedules = st.dictionaries(st.integers(0, 50), reductions, max_size=5).map(PruningSchedule)
SCHEDULE = PruningSchedule({6: Merge(40), 3: 0.25})


# -- what it is --------------------------------------------------------------------------------------------------------


def test_a_bare_number_means_pruning():
    assert dict(PruningSchedule({3: 56, 6: Merge(40), 9: 0.3})) == {3: Prune(56), 6: Merge(40), 9: Prune(0.3)}


def test_a_mapping_in_the_order_of_the_blocks():
    schedule = PruningSchedule({6: Merge(40), 0: 1, 3: 56})
    assert isinstance(schedule, Mapping)
    assert list(schedule) == [0, 3, 6]
    assert list(schedule.values()) == [Prune(1), Prune(56), Merge(40)]
    assert schedule[6] == Merge(40)
    assert schedule.get(5) is None
    assert len(schedule) == 3
    assert 3 in schedule
    assert 4 not in schedule
    with pytest.raises(KeyError):
        schedule[4]


@given(schedules)
def test_its_repr_makes_it(schedule):
    names = {"Prune": Prune, "Merge": Merge, "Absorb": Absorb, "PruningSchedule": PruningSchedule}
    assert eval(repr(schedule), names) == schedule


def test_its_repr():
    assert repr(SCHEDULE) == "PruningSchedule({3: Prune(0.25), 6: Merge(40)})"
    assert repr(PruningSchedule({})) == "PruningSchedule({})"


def test_empty():
    assert not PruningSchedule({})
    assert PruningSchedule({3: 1})
    PruningSchedule({}).check(0, 0)


def test_equality():
    same = PruningSchedule({3: Prune(0.25), 6: Merge(40)})
    assert same == SCHEDULE
    assert hash(same) == hash(SCHEDULE)
    assert PruningSchedule(SCHEDULE) == SCHEDULE
    others = [{}, {3: 0.25}, {3: 0.25, 6: 40}, {3: 0.25, 6: Merge(41)}, {3: 0.25, 7: Merge(40)}, {3: 25, 6: Merge(40)}]
    assert all(PruningSchedule(other) != SCHEDULE for other in others)


def test_what_it_was_made_of_may_change():
    rows = {3: 56}
    schedule = PruningSchedule(rows)
    rows[4] = 1
    assert list(schedule) == [3]


@pytest.mark.parametrize("block", [-1, True, 1.0, "3", None, (3,)], ids=repr)
def test_a_block_that_is_no_index(block):
    with pytest.raises(ArgumentError) as error:
        PruningSchedule({block: 5})
    assert str(error.value) == f"the schedule names block {block!r}; expected an index from 0"


@pytest.mark.parametrize("amount", [0, -1, 1.0, math.nan, "56", None, True, [5]], ids=repr)
def test_an_amount_that_is_none(amount):
    with pytest.raises(ArgumentError, match="expected a number of tokens to remove, at least 1, or a share"):
        PruningSchedule({3: amount})


@pytest.mark.parametrize("schedule", [None, 56, [(3, 56)], "{3: 56}", {3}], ids=repr)
def test_no_mapping(schedule):
    with pytest.raises(ArgumentError, match=r"a schedule is .*; expected a mapping such as \{3: 56, 6: Merge\(40\)\}"):
        PruningSchedule(schedule)


# -- whether a model can do it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "blocks", "patches"),
    [
        ({0: 1}, 1, 3),
        ({3: 194}, 12, 196),
        ({3: Merge(98)}, 12, 196),
        ({11: 1}, 12, 196),
        ({0: Merge(98), 1: Merge(49), 2: 47}, 12, 196),
        ({0: 0.5, 1: 0.5}, 12, 196),
        ({5: 10**6}, 12, None),
        ({0: Merge(0.5)}, 1, 2),
    ],
)
def test_what_can_be_done(schedule, blocks, patches):
    PruningSchedule(schedule).check(blocks, patches)


@pytest.mark.parametrize("patches", [None, 196])
@pytest.mark.parametrize(("schedule", "blocks", "block"), [({12: 5}, 12, 12), ({1: 5, 40: 5}, 12, 40), ({1: 1}, 1, 1)])
def test_more_blocks_than_there_are(schedule, blocks, block, patches):
    with pytest.raises(ArgumentError) as error:
        PruningSchedule(schedule).check(blocks, patches)
    expected = f"the schedule names block {block}; expected one of the model's {blocks}, from 0 to {blocks - 1}"
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("schedule", "fault", "block", "wanted", "patches", "most"),
    [
        ({3: 195}, "Prune(195)", 3, 195, 196, 194),
        ({3: 196}, "Prune(196)", 3, 196, 196, 194),
        ({3: Merge(99)}, "Merge(99)", 3, 99, 196, 98),
        ({3: 0.001}, "Prune(0.001)", 3, 0, 196, 194),
        ({3: 0.999}, "Prune(0.999)", 3, 195, 196, 194),
        ({3: Merge(0.6)}, "Merge(0.6)", 3, 117, 196, 98),
        ({3: 100, 5: 95}, "Prune(95)", 5, 95, 96, 94),
        ({3: 0.5, 5: Merge(50)}, "Merge(50)", 5, 50, 98, 49),
    ],
)
def test_more_tokens_than_there_are_or_none(schedule, fault, block, wanted, patches, most):
    """What removes nothing, or leaves no patch beside the mean of the others, is named."""
    with pytest.raises(ArgumentError) as error:
        PruningSchedule(schedule).check(12, 196)
    removes = f"{fault} in block {block} removes {wanted} of the {patches} patch tokens that enter it"
    assert str(error.value) == f"{removes}; expected 1 to {most}"


@pytest.mark.parametrize(("reduction", "patches"), [(Prune(1), 2), (Prune(1), 1), (Merge(1), 1)], ids=repr)
def test_too_few_tokens_for_any_reduction(reduction, patches):
    with pytest.raises(ArgumentError, match=rf"in block 0 removes 1 of the {patches} patch token") as error:
        PruningSchedule({0: reduction}).check(1, patches)
    assert "1 to 0" not in str(error.value)


# -- files -------------------------------------------------------------------------------------------------------------


@given(schedules)
def test_there_and_back(tmp_path_factory, schedule):
    path = tmp_path_factory.getbasetemp() / "schedule.json"
    schedule.save(path)
    loaded = PruningSchedule.load(path)
    assert loaded == schedule
    assert repr(loaded) == repr(schedule)  # numbers stay numbers, shares stay shares
    assert PruningSchedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


def test_what_is_in_a_file(tmp_path):
    SCHEDULE.save(tmp_path / "schedule.json")
    text = (tmp_path / "schedule.json").read_text()
    assert json.loads(text) == {
        "format": "vwt schedule",
        "version": 1,
        "reductions": [
            {"block": 3, "operation": "prune", "amount": 0.25},
            {"block": 6, "operation": "merge", "amount": 40},
        ],
    }
    assert text.splitlines()[1].strip() == '"format": "vwt schedule",'


def test_paths_may_be_strings(tmp_path):
    SCHEDULE.save(str(tmp_path / "schedule.json"))
    assert PruningSchedule.load(str(tmp_path / "schedule.json")) == SCHEDULE


def test_a_file_that_is_there_is_replaced(tmp_path):
    path = tmp_path / "schedule.json"
    SCHEDULE.save(path)
    PruningSchedule({1: 1}).save(path)
    assert PruningSchedule.load(path) == {1: Prune(1)}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_cut_short_anywhere(tmp_path):
    path = tmp_path / "schedule.json"
    SCHEDULE.save(path)
    text = path.read_text()
    for length in range(len(text.rstrip())):
        path.write_text(text[:length])
        with pytest.raises(DocumentError, match=r"schedule\.json is damaged or no schedule") as error:
            PruningSchedule.load(path)
        assert "\n" not in str(error.value)


def write(path, **changes):
    SCHEDULE.save(path)
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


ROW = {"block": 3, "operation": "prune", "amount": 5}
ROWS = {
    "unknown field": ([{**ROW, "depth": 12}], "expected a block, an operation and an amount"),
    "missing field": ([{"block": 3, "amount": 5}], "expected a block, an operation and an amount"),
    "no row": ([[3, "prune", 5]], "expected a block, an operation and an amount"),
    "no list": ("prune", "expected a list of them"),
    "nothing": (None, "expected a list of them"),
    "twice": ([ROW, {**ROW, "operation": "merge"}], "names block 3 twice; expected one reduction a block"),
    "operation": ([{**ROW, "operation": "drop"}], "has the operation 'drop'; expected prune or merge"),
    "class name": ([{**ROW, "operation": "Prune"}], "has the operation 'Prune'; expected prune or merge"),
    "operation that is none": ([{**ROW, "operation": None}], "has the operation None; expected prune or merge"),
    "operation of another type": ([{**ROW, "operation": ["prune"]}], "has the operation"),
    "negative block": ([{**ROW, "block": -1}], "names block -1; expected an index from 0"),
    "block of another type": ([{**ROW, "block": "3"}], "names block '3'; expected an index from 0"),
    "block that is a share": ([{**ROW, "block": 3.0}], r"names block 3\.0; expected an index from 0"),
    "block that is a list": ([{**ROW, "block": [3]}], r"names block \[3\]; expected an index from 0"),
    "block that is true": ([{**ROW, "block": True}], "names block True; expected an index from 0"),
    "amount": ([{**ROW, "amount": 0}], r"Prune\(0\): expected a number of tokens to remove"),
    "amount of another type": ([{**ROW, "amount": "5"}], r"Prune\('5'\): expected a number of tokens to remove"),
    "amount that is none": ([{**ROW, "amount": None}], r"Prune\(None\): expected a number of tokens to remove"),
    "amount that is a list": ([{**ROW, "amount": [5]}], r"Prune\(\[5\]\): expected a number of tokens to remove"),
    "amount that is large": ([{**ROW, "amount": [[0.0] * 99] * 99}], r"expected a number of tokens to remove.{,40}$"),
    "block that is large": ([{**ROW, "block": [[0.0] * 99] * 99}], r"names block .{,110}; expected an index from 0$"),
    "row that is large": ([[0.0] * 9999], "has the reduction .{,110}; expected a block"),
    "share too large": ([{**ROW, "operation": "merge", "amount": 1.0}], r"Merge\(1\.0\): expected a number"),
    "no number": ([{**ROW, "amount": math.nan}], r"Prune\(nan\): expected a number"),
}


@pytest.mark.parametrize("name", ROWS)
def test_reductions_that_are_none(tmp_path, name):
    rows, message = ROWS[name]
    write(tmp_path / "schedule.json", reductions=rows)
    with pytest.raises(DocumentError, match=message) as error:
        PruningSchedule.load(tmp_path / "schedule.json")
    assert str(tmp_path / "schedule.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_named_otherwise():
    with pytest.raises(DocumentError, match=r"^the plan has the operation"):
        PruningSchedule.from_json([{**ROW, "operation": "drop"}], "the plan")
    with pytest.raises(DocumentError, match=r"^the schedule has the operation"):
        PruningSchedule.from_json([{**ROW, "operation": "drop"}])


CHANGES = {
    "version": ({"version": 2}, r"is of version 2, this vwt reads version 1; write it again"),
    "no version": ({"version": ...}, r"is of version None, this vwt reads version 1"),
    "format": ({"format": "vwt profile"}, r"is no schedule of vwt \(its format is 'vwt profile'\)"),
    "no format": ({"format": ...}, r"is no schedule of vwt \(its format is None\); expected 'vwt schedule'"),
    "unknown fields": ({"speed": 1, "budget": 2}, r"has not the fields of one: unknown budget, speed; write it again"),
    "no reductions": ({"reductions": ...}, r"has not the fields of one: without reductions; write it again"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_files_of_another_kind(tmp_path, name):
    changes, message = CHANGES[name]
    write(tmp_path / "schedule.json", **changes)
    with pytest.raises(DocumentError, match=message) as error:
        PruningSchedule.load(tmp_path / "schedule.json")
    assert str(tmp_path / "schedule.json") in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(DocumentError, match=r"cannot read the schedule .*absent\.json: No such file or directory"):
        PruningSchedule.load(tmp_path / "absent.json")


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(DocumentError, match=r"cannot write the schedule .*: No such file .*; choose another file"):
        SCHEDULE.save(tmp_path / "absent" / "schedule.json")


# -- with a profile ----------------------------------------------------------------------------------------------------

ACCURACY = {17: 0.8, 13: 0.78, 9: 0.6, 3: 0.2}


def test_utility_equals_its_formula():
    profile = make_profile()
    for alpha in (0.0, 0.3, 1.0):
        ms = {n: profile.predict({1: Prune(17 - n)} if n < 17 else {}) for n in ACCURACY}
        expected = {n: alpha * (1 - ms[n] / max(ms.values())) + (1 - alpha) * ACCURACY[n] / 0.8 for n in ACCURACY}
        assert utility(profile, ACCURACY, alpha, 1) == pytest.approx(expected)
    assert list(utility(profile, ACCURACY, 0.5, 1)) == [3, 9, 13, 17]


def test_the_count_of_highest_utility():
    profile = make_profile()
    for block in (None, 0, 2):
        curve = utility(profile, ACCURACY, 0.5, 1 if block is None else block)
        best = max(curve, key=curve.get)
        removed = {} if best == 17 else {1 if block is None else block: Prune(17 - best)}
        assert PruningSchedule.from_utility(profile, ACCURACY, block=block) == removed
    assert PruningSchedule.from_utility(profile, ACCURACY, alpha=0.0) == {}
    assert PruningSchedule.from_utility(profile, ACCURACY, alpha=1.0) == {1: Prune(14)}


def test_of_equal_utilities_the_most_tokens_stay():
    assert PruningSchedule.from_utility(make_profile(), {17: 0.5, 9: 0.5, 13: 0.5}, alpha=0.0) == {}


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_an_alpha_that_is_no_weight(alpha):
    with pytest.raises(ArgumentError, match=rf"alpha is {alpha}; expected a weight in \[0, 1\]"):
        PruningSchedule.from_utility(make_profile(), ACCURACY, alpha)


@pytest.mark.parametrize("accuracy", [{}, {9: 0.5}, {17: 0.0, 9: 0.0}], ids=repr)
def test_all_tokens_must_be_known(accuracy):
    with pytest.raises(ArgumentError, match="expected 17, all of them, among these"):
        PruningSchedule.from_utility(make_profile(), accuracy)


@pytest.mark.parametrize(("count", "block"), [(2, 1), (0, 1), (9, 4), (9, -1), (18, 1)])
def test_counts_that_pruning_cannot_reach(count, block):
    with pytest.raises(ArgumentError):
        PruningSchedule.from_utility(make_profile(), {17: 0.8, count: 0.5}, block=block)


def test_pruning_down_to_a_count():
    assert down_to(make_profile(), 1, 17) == {}
    assert down_to(make_profile(), 2, 3) == {2: Prune(14)}


def test_a_table_says_what_does_not_happen():
    rows = PruningSchedule({3: Absorb(3)}).table(make_profile()).splitlines()
    assert rows[4].split() == ["3", "17", "Absorb(3),", "without", "effect"]


def test_a_table():
    profile = make_profile()
    schedule = PruningSchedule({0: Absorb(3), 2: 0.5})
    title, *rows, total = schedule.table(profile).splitlines()
    assert title.split() == ["block", "tokens", "reduction"]
    assert [row.split() for row in rows] == [
        ["0", "17", "Absorb(3)"],
        ["1", "14"],
        ["2", "14", "Prune(0.5)"],
        ["3", "8"],
    ]
    own, full = profile.predict(schedule), profile.predict()
    assert total == f"predicted {own:.2f} ms of {full:.2f} ms ({own / full:.3f}) for a batch of 1"
