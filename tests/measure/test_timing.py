from vwt.measure.timing import interleave


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
