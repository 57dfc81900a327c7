import math

import pytest

from tests.reductions.cases import KINDS
from vwt import Merge, Prune
from vwt.errors import ArgumentError
from vwt.reductions.absorb import Absorb
from vwt.reductions.reduction import patches_entering


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("amount", [1, 56, 10**6, 1e-9, 0.3, 0.999])
def test_amounts(kind, amount):
    reduction = KINDS[kind](amount)
    assert reduction.amount == amount
    assert reduction.kind == kind
    assert repr(reduction) == f"{kind.capitalize()}({amount!r})"
    assert eval(repr(reduction), {"Prune": Prune, "Merge": Merge, "Absorb": Absorb}) == reduction
    assert hash(reduction) == hash(KINDS[kind](amount))
    assert reduction != KINDS["merge" if kind == "prune" else "prune"](amount)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "amount", [0, -1, 0.0, -0.5, 1.0, 1.5, 56.0, True, False, math.nan, math.inf, "56", "a", None, [1], 1j], ids=repr
)
def test_other_amounts_are_refused(kind, amount):
    with pytest.raises(ArgumentError) as error:
        KINDS[kind](amount)
    start = f"{kind.capitalize()}({amount!r}): "
    assert str(error.value) == start + "expected a number of tokens to remove, at least 1, or a share in (0, 1)"


def test_an_amount_cannot_be_changed():
    with pytest.raises(AttributeError):
        Prune(3).amount = 4


@pytest.mark.parametrize(
    ("reduction", "patches", "wanted", "removed"),
    [
        (Prune(3), 10, 3, 3),
        (Prune(8), 10, 8, 8),
        (Prune(9), 10, 9, 8),
        (Prune(100), 10, 100, 8),
        (Prune(1), 3, 1, 1),
        (Prune(1), 2, 1, 0),
        (Prune(1), 1, 1, 0),
        (Prune(0.29), 100, 29, 29),  # 0.29 * 100 is less than 29
        (Prune(0.3), 9, 2, 2),
        (Prune(0.99), 10, 9, 8),
        (Prune(0.01), 10, 0, 0),
        (Merge(3), 10, 3, 3),
        (Merge(5), 10, 5, 5),
        (Merge(6), 10, 6, 5),
        (Merge(6), 11, 6, 5),
        (Merge(1), 2, 1, 1),
        (Merge(1), 1, 1, 0),
        (Merge(0.5), 11, 5, 5),
        (Merge(0.9), 10, 9, 5),
        (Absorb(3), 10, 3, 3),
        (Absorb(9), 10, 9, 9),
        (Absorb(10), 10, 10, 9),
        (Absorb(1), 2, 1, 1),
        (Absorb(1), 1, 1, 0),
        (Absorb(0.95), 20, 19, 19),
        (Absorb(0.99), 10, 9, 9),
        (Absorb(0.01), 10, 0, 0),
    ],
    ids=repr,
)
def test_how_many_of_so_many(reduction, patches, wanted, removed):
    assert reduction.wanted(patches) == wanted
    assert reduction.removed(patches) == removed
    assert removed == max(0, min(wanted, reduction.most(patches)))


@pytest.mark.parametrize(
    ("reductions", "entering"),
    [
        ({}, [20, 20, 20, 20, 20]),
        ({1: Prune(5)}, [20, 20, 15, 15, 15]),
        ({0: Merge(15), 3: Prune(0.5)}, [20, 10, 10, 10, 5]),
        ({0: Prune(30), 2: Prune(1), 3: Merge(1)}, [20, 2, 2, 2, 1]),
        ({0: Absorb(0.6), 1: Absorb(30), 2: Absorb(1)}, [20, 8, 1, 1, 1]),
        ({9: Prune(5)}, [20, 20, 20, 20, 20]),
    ],
    ids=repr,
)
def test_how_many_enter_each_block(reductions, entering):
    assert patches_entering(reductions, 4, 20) == entering
