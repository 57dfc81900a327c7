"""Matrices of cases: `make test` runs a few of each, `make test-all` every one."""

import pytest


def matrix(cases, *quick):
    """The cases for `pytest.mark.parametrize`; those that are not among the quick ones are marked slow."""
    cases = list(cases)
    strangers = [case for case in quick if case not in cases]
    assert not strangers, f"{strangers} are not among the cases {cases}"
    return [pytest.param(*_values(case), marks=() if case in quick else pytest.mark.slow) for case in cases]


def _values(case):
    return case if isinstance(case, tuple) else (case,)
