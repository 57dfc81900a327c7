import math

import pytest
import torch

from tests.reductions.cases import make_model
from tests.tuning.test_calibration import make_images
from tests.tuning.test_profile import REDUCTIONS, make_profile
from vwt import Absorb, IntraImage, Neighbours, Prune, PruningSchedule
from vwt.errors import ArgumentError, MismatchError
from vwt.measure.timing import Latency
from vwt.reductions.reduction import patches_entering
from vwt.tuning.calibration import Calibration
from vwt.tuning.search import BLOCKS, SHARES, Candidate, Option, Search

FREE = {name: [0.0] * len(values) for name, values in REDUCTIONS.items()}


def make_search(measured=None, strategies=("drop", "near"), images=24, profile=None):
    calibration = Calibration(make_model(), make_images(images), keep=16, progress=False)
    made = {"drop": Neighbours(0.2), "near": Neighbours(threshold=0.4), "intra": IntraImage(0.5)}
    options = {"": Option(calibration)}
    options |= {name: Option(calibration.with_strategy(made[name]), cost=3.0) for name in strategies}
    return Search(make_profile(reductions=FREE) if profile is None else profile, options, measured, progress=False)


@pytest.fixture(scope="module")
def search():
    return make_search()


def is_possible(search, candidate):
    """Whether every image, of as many patches as the strategy leaves in the mean, can lose as many as is asked."""
    option = search.options[candidate.option]
    if not option.by_share:
        PruningSchedule(candidate.blocks).check(search.profile.depth, option.patches)
    entering = patches_entering(candidate.blocks, search.profile.depth, option.patches)
    return all(1 <= what.wanted(entering[b]) <= what.most(entering[b]) for b, what in candidate.reductions)


@pytest.mark.parametrize("ratio", [0.95, 0.8, 0.65, 0.5])
def test_the_best_is_possible_and_within_the_limit(search, ratio):
    limit = ratio * search.profile.predict()
    outcome = search.best(limit, tries=8, finalists=3)
    assert search.predict(outcome.candidate) <= limit
    assert is_possible(search, outcome.candidate)
    fidelity = search.options[outcome.candidate.option].calibration.evaluate(outcome.candidate.blocks)
    assert (outcome.kl, outcome.agreement) == (fidelity.mean_kl, fidelity.agreement)


@pytest.mark.parametrize("ratio", [0.9, 0.7, 0.5])
def test_every_candidate_is_possible_and_within_the_limit(search, ratio):
    limit = ratio * search.profile.predict()
    starts = search._starts(limit)
    assert len(starts) == len(set(starts))
    assert {start.option for start in starts} == set(search.options)
    near = [neighbour for start in starts[:3] for neighbour in search._neighbours(start, limit)]
    assert near
    for candidate in starts + near:
        assert search.predict(candidate) <= limit
        assert is_possible(search, candidate)
        assert list(candidate.blocks) == sorted(candidate.blocks)


def test_more_tries_are_no_worse(search):
    """Of the candidates that are compared on all images, more are compared."""
    limit = 0.7 * search.profile.predict()
    few, many = search.best(limit, 2, 1), search.best(limit, 20, 20)
    assert many.kl <= few.kl
    assert many.candidate != few.candidate or many == few


def test_what_an_option_costs_counts(search):
    profile, reductions = search.profile, ((1, Absorb(2)),)
    assert search.predict(Candidate("", reductions)) == profile.predict(dict(reductions))
    patches = search.options["drop"].patches
    assert patches == 13
    assert search.predict(Candidate("drop", reductions)) == 3.0 + profile.predict(dict(reductions), 13)
    assert search.predict(Candidate("", ())) == profile.predict()


def test_nothing_is_that_fast(search):
    least = search.least()
    with pytest.raises(ArgumentError) as error:
        search.best(0.99 * least, 4, 1)
    message = str(error.value)
    assert f"nothing takes {0.99 * least:.2f} ms; the least possible is {least:.2f} ms" in message
    assert f"the model itself: {search.profile.predict():.2f} ms" in message
    assert search.predict(search.best(least, 4, 1).candidate) <= least


def test_the_least_is_that_of_a_single_reduction(search):
    made = []
    for name, option in search.options.items():
        for block in range(3):  # the last one changes nothing
            most = Absorb.most(option.patches)
            what = Absorb(min(most / option.patches, 1 - 1e-9)) if option.by_share else Absorb(most)
            made.append(search.predict(Candidate(name, ((block, what),))))
    assert search.least() == pytest.approx(min(made))


def test_what_was_measured_is_not_measured_again(monkeypatch):
    measured = {}
    first = make_search(measured)
    outcome = first.best(0.7 * first.profile.predict(), 8, 3)
    assert len(measured) > 20
    assert measured[f"kl of {outcome.candidate!r}"] == outcome.kl
    again = make_search(measured)

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(Calibration, "evaluate", never)
    assert again.best(0.7 * first.profile.predict(), 8, 3) == outcome


def test_the_same_twice():
    outcomes = []
    for _ in range(2):
        search = make_search(strategies=("drop",))
        outcomes.append((search.best(0.75 * search.profile.predict(), 8, 3), dict(search.measured)))
    assert outcomes[0] == outcomes[1]


def test_nothing_is_asked_of_a_block_in_which_it_does_not_happen():
    """The head reads the class token: a reduction in the last block would change nothing."""
    search = make_search(strategies=())
    limit = search.profile.predict() - 1
    assert {block for start in search._starts(limit) for block in start.blocks} == {0, 1, 2}
    assert max(search.best(limit, 4, 2).candidate.blocks) < 3


def test_trials_are_counted_with_and_without_progress_bars(search, monkeypatch):
    """Each neighbour seems better than the last: only the number of trials ends the search."""
    tried = {}
    for progress in (True, False):
        own = tried.setdefault(progress, [])
        monkeypatch.setattr(search, "progress", progress)
        monkeypatch.setattr(Search, "kl", lambda self, candidate, own=own: own.append(candidate) or -len(set(own)))
        search.best(0.7 * search.profile.predict(), 8, 3)
    assert tried[True] == tried[False]
    assert len({candidate for candidate in tried[True] if candidate.reductions}) <= 8


def test_shares_where_images_differ(search):
    limit = 0.6 * search.profile.predict()
    own = [c for c in search._starts(limit) if c.option == "near"]
    amounts = [what.amount for candidate in own for _, what in candidate.reductions]
    assert amounts
    assert all(isinstance(amount, float) for amount in amounts)
    others = [c for c in search._starts(limit) if c.option != "near"]
    assert all(isinstance(what.amount, int) for candidate in others for _, what in candidate.reductions)


def test_a_guess_adds_what_each_changes_alone(search):
    one, other = ((0, Absorb(2)),), ((1, Absorb(4)),)
    alone = [search.guess(Candidate("", reductions)) for reductions in (one, other)]
    both = search.guess(Candidate("", one + other))
    assert alone[0] < both
    assert search.guess(Candidate("drop", ())) == search.kl(Candidate("drop", ()))


@pytest.mark.parametrize("block", range(3))
def test_what_each_block_harms_alone_is_what_was_measured(search, block):
    counts = [int(share * 16) for share in SHARES]
    measured = [search.kl(Candidate("", ((block, Absorb(count)),))) for count in counts]
    assert counts == [1, 4, 9]
    assert search.log_kl[block] == pytest.approx([math.log(kl) for kl in measured])
    # Of few patches, a count is hardly the share that it stands for: what is guessed is a little off.
    guesses = [search.guess(Candidate("", ((block, Absorb(count)),))) for count in counts[1:]]
    assert guesses == pytest.approx(measured[1:], rel=0.5)


def test_a_guess_at_a_share_is_what_was_measured():
    """Between shares and beyond them it follows the lines through their logarithms, and never falls."""
    search = make_search(profile=make_profile(reductions=FREE, depth=4), strategies=())
    search.log_kl[1] = [math.log(kl) for kl in (0.01, 0.09, 0.02)]
    at = [search.guess(Candidate("", ((1, Absorb(share)),))) for share in (0.125, 0.25, 0.3125, 0.625, 0.875)]
    slope = math.log(9) / math.log(0.3 / 0.12)
    expected = [0.01 * (share / 0.12) ** slope for share in (0.125, 0.25)] + [0.09] * 3
    assert at == pytest.approx(expected)


def test_blocks_that_harm_least_for_what_they_spare_are_combined(search):
    profile = search.profile
    assert list(search.blocks) == [0, 1, 2]  # in the last one nothing changes
    assert set(search.log_kl) == set(search.blocks)
    harm = [math.exp(search.log_kl[block][1]) / (profile.depth - block) ** 2 for block in search.candidate_blocks]
    assert harm == sorted(harm)
    assert len(search.candidate_blocks) == min(BLOCKS, 3)
    whole = make_search(strategies=(), profile=make_profile(reductions=FREE, reads_prefix_only=False))
    assert list(whole.blocks) == [0, 1, 2, 3]


def test_an_option_of_its_own_count():
    calibration = Calibration(make_model(), make_images(16), progress=False)
    assert Option(calibration).patches == 16
    assert not Option(calibration).by_share
    assert Option(calibration.with_strategy(IntraImage(0.5))).patches == 8
    assert not Option(calibration.with_strategy(IntraImage(0.5))).by_share
    assert Option(calibration.with_strategy(Neighbours(threshold=0.4))).by_share


# -- for_budget --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_schedule_for_a_budget(pool, monkeypatch):
    model = make_model(global_pool=pool)
    profile = make_profile(reductions=FREE, reads_prefix_only=pool == "token")

    def as_predicted(model, reduced, *options, **others):
        schedules = [getattr(run.model, "schedule", {}) for run in (model, *reduced)]
        ratios = [profile.predict(schedule) / profile.predict() for schedule in schedules]
        return [Latency(0.0, ratio, (ratio, ratio)) for ratio in ratios]

    monkeypatch.setattr("vwt.tuning.schedule.measure_latency", as_predicted)
    schedule = PruningSchedule.for_budget(profile, model, make_images(16), ratio=0.7, progress=False)
    assert schedule
    assert profile.predict(schedule) <= 0.7 * profile.predict()
    schedule.check(4, 16)
    milliseconds = 0.7 * profile.predict()
    same = PruningSchedule.for_budget(profile, model, make_images(16), milliseconds=milliseconds, progress=False)
    assert same == schedule
    single = Calibration(model, make_images(16), progress=False)
    paper = next(r for r in ({1: Prune(n)} for n in range(1, 15)) if profile.predict(r) <= milliseconds)
    assert single.evaluate(schedule).mean_kl <= single.evaluate(paper).mean_kl


def search_with(monkeypatch, factors, seconds=0.0):
    """The schedule for a ratio of 0.7 and how often it is measured: the first time at 0.7 times these, later at 0.7."""
    measured = []

    def measure(model, reduced, *options, **others):
        own = factors if not measured else (1, 1, 1)
        measured.append(reduced)
        return [Latency(0, 1, (1, 1)), Latency(0, 0.7 * own[1], (0.7 * own[0], 0.7 * own[2]))]

    clock = iter([0.0, *[seconds] * 9])
    monkeypatch.setattr("vwt.tuning.schedule.measure_latency", measure)
    monkeypatch.setattr("vwt.tuning.schedule.time.monotonic", lambda: next(clock))
    profile = make_profile(reductions=FREE)
    schedule = PruningSchedule.for_budget(profile, make_model(), make_images(16), ratio=0.7, progress=False)
    return schedule, len(measured)


def test_a_measurement_that_may_err_is_not_put_right_but_said(monkeypatch):
    exact, times = search_with(monkeypatch, (1, 1, 1))
    assert times == 1
    with pytest.warns(UserWarning, match=r"0\.84 of the model's time, somewhere between 0\.66 and 0\.98"):
        unsure, times = search_with(monkeypatch, (0.95, 1.2, 1.4))
    assert times == 1
    assert unsure == exact


def test_a_missed_budget_is_put_right_within_a_minute(monkeypatch):
    first, _ = search_with(monkeypatch, (1, 1, 1))
    faster, times = search_with(monkeypatch, (1.19, 1.2, 1.21))
    assert times == 2
    assert make_profile(reductions=FREE).predict(faster) < make_profile(reductions=FREE).predict(first)
    late, times = search_with(monkeypatch, (1.19, 1.2, 1.21), seconds=61)
    assert times == 1
    assert late == first


def test_too_few_images_for_a_batch_are_noticed_before_the_search(monkeypatch):
    monkeypatch.setattr(Calibration, "evaluate", None)
    with pytest.raises(ArgumentError, match="16 images do not fill a batch of 17; give more"):
        PruningSchedule.for_budget(
            make_profile(batch_size=17), make_model(), make_images(16), ratio=0.7, progress=False
        )


def test_images_of_another_size_than_the_profile_s():
    model = make_model(dynamic_img_size=True)
    with pytest.raises(MismatchError, match="measured with patches 16, here it is 25"):
        PruningSchedule.for_budget(make_profile(), model, torch.zeros(16, 3, 80, 80), ratio=0.7)


@pytest.mark.parametrize("budget", [{"ratio": 1.0}, {"ratio": 3.0}, {"milliseconds": 10.0**6}])
def test_a_budget_of_the_whole_model_prunes_nothing(budget):
    schedule = PruningSchedule.for_budget(make_profile(), make_model(), make_images(16), **budget, progress=False)
    assert schedule == {}


@pytest.mark.parametrize("budget", [{}, {"ratio": 0.5, "milliseconds": 3.0}])
def test_one_budget_is_needed(budget):
    with pytest.raises(ArgumentError, match="for_budget needs a budget: either milliseconds=… or ratio=…"):
        PruningSchedule.for_budget(make_profile(), make_model(), make_images(16), **budget)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["ratio", "milliseconds"])
def test_a_budget_that_is_none(name, value):
    with pytest.raises(ArgumentError, match=r"the budget is .* ms; expected a positive number"):
        PruningSchedule.for_budget(make_profile(), make_model(), make_images(16), **{name: value})
