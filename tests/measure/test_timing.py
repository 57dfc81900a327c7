import numpy as np
import torch

import vwt.measure.timing as timing
from vwt.measure.timing import interleave, measure_latency


def test_interleave_pairs_and_warms_up():
    calls = []

    def group(name, roles):
        return {role: lambda item, role=role: calls.append((name, role, item)) for role in roles}

    groups = [group("a", ["actual", "ideal"]), group("b", ["actual"])]
    seconds = interleave(groups, items=3, runs=4, warmup=2, progress=False)
    assert [{role: times.shape for role, times in s.items()} for s in seconds] == [
        {"actual": (3, 4), "ideal": (3, 4)},
        {"actual": (3, 4)},
    ]
    assert all((times > 0).all() for s in seconds for times in s.values())
    assert [item for *_, item in calls[:12]] == [0] * 6 + [1] * 6
    timed = calls[12:]
    assert len(timed) == 3 * 4 * 3
    firsts = []
    for place, (name, role, item) in enumerate(timed):
        if name == "a" and (place == 0 or timed[place - 1][0] == "b" or timed[place - 1][2] != item):
            firsts.append(role)
            assert timed[place + 1][0] == "a"
            assert timed[place + 1][2] == item
    assert firsts.count("actual") == firsts.count("ideal") == 6


def test_latency_says_between_which_bounds_its_ratio_lies(monkeypatch):
    """The bounds hold the median ratio; they are wide where runs differ."""
    spread = np.random.default_rng(0).normal(0.5, [[0.01], [0.1]], (2, 96)).clip(0.1).reshape(2, 8, 12)
    rounds = [{"run": np.ones((8, 12))}, *({"run": own} for own in spread)]
    monkeypatch.setattr(timing, "interleave", lambda *arguments, **options: rounds)
    model, steady, noisy = measure_latency(None, [None, None], torch.zeros(8, 1), 1)
    assert (model.milliseconds, model.ratio, model.bounds) == (1000, 1, (1, 1))
    for own, width in ((steady, 0.01), (noisy, 0.1)):
        low, high = own.bounds
        assert low < 0.5 < high
        assert 0.2 * width < high - low < width
