import json
import shutil

import pytest
import torch

from tests.pictures.report.conftest import ITSELF
from vwt import VWTokenizer
from vwt.errors import DocumentError, MismatchError
from vwt.models.spec import prepare
from vwt.pictures.report.front import front_rows, read_peers, tokens_of
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


ONE = {"name": "ToMe r 8", "group": "ToMe", "ratio": 0.9, "kl": 0.03, "agreement": 0.95, "tokens": 90}


def results(model="test_vit", rows=(ONE,)):
    return {"arguments": {"model": model}, "tables": {"fidelity": list(rows)}}


def test_peers_are_those_of_a_benchmark(make_plan, tmp_path):
    others = [{"name": "full", "group": "full", "ratio": 1, "kl": 0, "agreement": 1}, {"name": "b", "note": "not had"}]
    (tmp_path / "results.json").write_text(json.dumps(results(rows=[*others, ONE])))
    (row,) = read_peers(tmp_path / "results.json", make_plan(batch_size=1))
    assert (row.name, row.method, row.ratio, row.kl, row.agreement, row.tokens) == tuple(ONE[name] for name in (
        "name", "group", "ratio", "kl", "agreement", "tokens",
    ))  # fmt: skip
    assert row.milliseconds == pytest.approx(9)  # the model itself takes 10


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, DocumentError, "cannot read .*results.json: No such file"),
        ("[", DocumentError, "has no table of fidelity; give what benchmarks/fidelity.py wrote"),
        (json.dumps({"arguments": {"model": "m"}, "tables": {"latency": []}}), DocumentError, "no table of fidelity"),
        (json.dumps(results(rows=[1])), DocumentError, "no table of fidelity"),
        (json.dumps(results("vit_tiny")), MismatchError, "is of vit_tiny, an image at a time; the plan is of test_vit"),
    ],
)
def test_peers_that_cannot_be_had(make_plan, tmp_path, content, error, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(error, match=message):
        read_peers(tmp_path / "results.json", make_plan(batch_size=1))
