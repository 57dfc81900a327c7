import shutil

import pytest
import torch

from tests.pictures.report.conftest import ITSELF
from vwt import VWTokenizer
from vwt.models.spec import prepare
from vwt.pictures.report.front import front_rows, tokens_of
from vwt.reductions.reduction import patches_entering


@pytest.mark.parametrize("kind", ["neighbours", "words"])
def test_rows_of_a_plan(small_vit, make_plan, pixels, kind):
    plan = make_plan(kind)
    fast = plan.apply(small_vit)
    rows = front_rows(plan, fast, pixels)
    assert [row.method for row in rows] == ["full", "plan", "front"]
    assert [row.name for row in rows] == ["the model itself", plan.chosen.name, plan.front[1].name]
    assert [row.milliseconds for row in rows] == [10, 8, 7]
    counts = fast.tokenize(prepare(pixels, small_vit)).counts.tolist()
    blocks = [patches_entering(plan.chosen.schedule, fast.backbone.depth, count)[:-1] for count in counts]
    expected = 1 + torch.tensor(blocks).float().mean().item()
    assert rows[0].tokens == 101
    assert rows[1].tokens == pytest.approx(expected)


def test_a_plan_that_is_the_model(small_vit, make_plan, pixels):
    plan = make_plan("nothing")
    rows = front_rows(plan, plan.apply(small_vit), pixels)
    assert [(row.name, row.method) for row in rows] == [("the model itself", "plan"), (plan.front[1].name, "front")]


def test_a_codebook_that_is_gone_leaves_tokens_unknown(small_vit, make_plan, pixels):
    words = make_plan("words")
    plan = make_plan("neighbours", front=[ITSELF, words.chosen])
    shutil.rmtree(words.chosen.strategy["codebook"])
    with pytest.warns(UserWarning, match="the tokens of InterImage.* are not known: no codebook at"):
        rows = front_rows(plan, VWTokenizer(small_vit), pixels)
    assert [row.tokens is None for row in rows] == [False, False, True] or rows[-1].tokens is None


def test_tokens_of_the_model_itself(small_vit, pixels):
    assert tokens_of(ITSELF, VWTokenizer(small_vit), pixels) == 101
