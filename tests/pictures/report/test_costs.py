import pytest
import torch

from vwt import Absorb, Neighbours, PruningSchedule, VWTokenizer
from vwt.models.spec import prepare
from vwt.pictures.report import costs
from vwt.pictures.report.costs import COUNTS, measure_costs


@pytest.fixture
def fast(small_vit):
    return VWTokenizer(small_vit, Neighbours(0.2), PruningSchedule({1: Absorb(10), 3: 8}))


def test_parts_and_their_tokens(fast, pixels):
    found = measure_costs(fast, pixels, 2, progress=False)
    last = fast.backbone.depth - 1
    blocks = [f"block {index}" for index in range(last)]
    assert [part.name for part in found.parts] == ["patches", *blocks, f"block {last}, head"]
    assert [part.tokens for part in found.parts] == [81, 81, 71, 71, *[63] * (last - 2)]
    assert found.tokens == 101
    assert len(found.profile) == COUNTS
    assert (min(found.profile), max(found.profile)) == (2, 101)


def test_figures_are_milliseconds_of_a_batch(fast, pixels, monkeypatch):
    """Each call in its turn takes as many seconds as its place."""

    def measured(groups, items, runs, **options):
        assert (items, runs) == (1, costs.RUNS)
        return [{"run": torch.full((1, 1), float(place)).numpy()} for place in range(len(groups))]

    monkeypatch.setattr(costs, "interleave", measured)
    found = measure_costs(fast, pixels, 2, progress=False)
    count = len(found.parts)
    assert (found.full, found.reduced) == (0, 1000)
    assert [part.full for part in found.parts] == [1000 * place for place in range(2, count + 2)]
    assert [part.reduced for part in found.parts] == [1000 * place for place in range(count + 2, 2 * count + 2)]


def test_fewer_images_than_a_batch(fast, pixels, monkeypatch):
    seen = []
    monkeypatch.setattr(costs, "prepare", lambda images, model: seen.append(images) or prepare(images, model))
    measure_costs(fast, pixels[:3], 5, progress=False)
    assert torch.equal(seen[0], pixels[[0, 1, 2, 0, 1]])


@pytest.mark.parametrize("reduces", [True, False])
def test_the_parts_are_the_whole(small_vit, fast, pixels, reduces):
    """The last part gives what the model, or the reduced one, answers."""
    module = fast if reduces else VWTokenizer(small_vit)
    images = prepare(pixels[:2], small_vit)
    with torch.inference_mode():
        call, _ = list(costs._parts(module, images).values())[-1]
        torch.testing.assert_close(call(), module(images))
