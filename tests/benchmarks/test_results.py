"""Arithmetic on measured figures, and files that are written whole."""

import json

import numpy as np
import pytest
import results
from results import bootstrap_interval, mean_interval, pareto, ratio, ratio_interval, save_results, spread


def test_spread_and_ratio():
    seconds = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 60.0], [7.0, 8.0, 9.0]]) / 1e3
    assert spread(seconds) == pytest.approx((3, 5, 8))
    halves = np.array([[1.0, 1.0, 1.0], [5.0, 5.0, 5.0], [4.0, 4.0, 400.0]]) / 1e3
    assert ratio(halves, seconds) == pytest.approx(0.5)  # of 1/2, 5/5 and 4/8


def test_bootstrap_has_the_spread_of_a_mean():
    values = np.random.default_rng(0).normal(3, 2, (400, 1))
    low, high = bootstrap_interval(values, 0)
    assert (values.mean() - low[0], high[0] - values.mean()) == pytest.approx([1.96 * values.std() / 20] * 2, rel=0.1)


def test_bootstrap_is_paired_seeded_and_the_same_in_pieces(monkeypatch):
    values = np.random.default_rng(0).random((50, 1))
    ends = np.stack(bootstrap_interval(np.concatenate([values, values + 0.25], axis=1), 0))
    np.testing.assert_allclose(ends[:, 1] - ends[:, 0], 0.25)
    assert not np.array_equal(ends[:, :1], bootstrap_interval(values, 1))
    monkeypatch.setattr(results, "HELD", 350)
    np.testing.assert_allclose(bootstrap_interval(values, 0), ends[:, :1])


def test_bootstrap_of_one_row_and_of_equal_rows():
    assert [end.tolist() for end in bootstrap_interval(np.array([[3.0, 4.0]]), 0)] == [[3, 4], [3, 4]]
    assert [end.tolist() for end in bootstrap_interval(np.full((9, 1), 2.0), 0)] == [[2], [2]]


def test_ratio_interval():
    full = np.full((30, 3), 2.0)
    assert ratio_interval(full / 2, full, 0) == (0.5, 0.5)
    halves = np.where(np.arange(30)[:, None] % 2, 1.0, 3.0) * np.ones((1, 3))
    assert ratio_interval(halves, full, 0) == (0.5, 1.5)


def test_mean_interval():
    assert mean_interval([3.0]) == (3.0, None)
    assert mean_interval([2.0, 2.0]) == (2.0, 0.0)
    assert mean_interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.302653 / 3**0.5))  # t of two degrees of freedom
    assert mean_interval([5.1, 4.9, 5.6, 5.8]) == (pytest.approx(5.35), pytest.approx(3.182446 * 0.4203173 / 2))


def test_pareto():
    points = {"a": (1, 5.0), "b": (2, 6.0), "c": (3, 2.0), "d": (3, 4.0), "e": (9, 2.0), "f": (10, 1.0)}
    table = [{"name": name, "tokens": tokens, "kl": kl} for name, (tokens, kl) in points.items()]
    assert "".join(row["name"] for row in pareto([*table[::-1], {"name": "g", "kl": 0.0}], "tokens", "kl")) == "acf"


def test_results_are_written_whole(folder, monkeypatch):
    """A write that is interrupted leaves the old state."""
    paths = results.results_paths(folder / "new" / "out.json")
    assert [path.name for path in paths] == ["out.json", "out.csv"]
    save_results(paths, {"hardware": "h"}, {"one": [{"a": 1}], "two": [{"b": "x,y"}]})
    assert json.loads(paths[0].read_text()) == {"hardware": "h", "tables": {"one": [{"a": 1}], "two": [{"b": "x,y"}]}}
    assert paths[1].read_bytes() == b'table,a,b\r\none,1,\r\ntwo,,"x,y"\r\n'
    before = [path.read_bytes() for path in paths]

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(results.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_results(paths, {}, {})
    assert [path.read_bytes() for path in paths] == before
