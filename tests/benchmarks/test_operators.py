"""Operators alone: they begin in their block, all remove as many, and the table by depth says which is best."""

import json
import re
from pathlib import Path

import fidelity
import numpy as np
import operators
import peers
import pytest
import torch
from operators import OPERATORS, BlockInputs, FromBlock, by_depth, operator_name, settings

from tests.benchmarks.test_variants import make_bench
from vwt.errors import ArgumentError

MODEL = ["--model", "test_vit", "--checkpoint", "weights.safetensors", "--data", "images"]
RUN = [*MODEL, "--operators", "--quiet", "--results-file", "out"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture
def images():
    return torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


def test_settings_are_those_of_the_model(small_vit):
    assert list(settings(small_vit)) == [(block, removed) for block in range(1, 5) for removed in (30, 50, 65)]


@pytest.mark.parametrize("make", OPERATORS.values())
def test_beginning_in_the_block_is_the_same(small_vit, images, make):
    alone, begun = make(small_vit, {3: 30}), FromBlock(make, BlockInputs(small_vit), 3, 30)
    torch.testing.assert_close(begun(images), alone(images), atol=1e-5, rtol=1e-5)
    assert begun.lengths(101) == alone.lengths(101) == [101] * 4 + [71] * 2


def test_block_inputs_are_computed_once_for_the_same_images(small_vit, images, monkeypatch):
    before, calls = BlockInputs(small_vit), []
    handle = small_vit.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    first = before(images)
    assert before(images) is first
    other = before(images.flip(0))
    assert len(calls) == 2
    handle.remove()
    torch.testing.assert_close(other[4], first[4].flip(0))
    tokens = small_vit.blocks[5](first[5])
    torch.testing.assert_close(small_vit.forward_head(small_vit.norm(tokens)), small_vit(images))


def test_too_many_patches_are_refused(small_vit):
    before = BlockInputs(small_vit)
    for make in (peers.TokenMerging, peers.EnergyMerging, peers.PruneOrPool):
        with pytest.raises(ArgumentError, match="at most 50 of 100 patches"):
            FromBlock(make, before, 3, 65)


def test_variants_have_a_row_each(small_vit):
    every = operators.operator_variants(make_bench(small_vit))
    names = [variant.name for variant in every]
    assert names == list(dict.fromkeys(names))
    assert names[:3] == ["full", "Absorb(30) in block 1", "ToMe(30) in block 1"]
    assert len(names) == 1 + 12 * (1 + len(OPERATORS))


def test_by_depth(small_vit):
    """Of block 1 with 30 patches ATC is the best, and Absorb has twice its loss; of block 2 nothing else is known."""
    loss = {"ToMe": [0.2, 0.4], "ATC": [0.1, 0.1], "Absorb": [0.1, 0.3]}
    names = [operator_name(name, 1, 30) for name in loss] + ["full", operator_name("Absorb", 2, 50)]
    values = np.array([*loss.values(), [0, 0], [1, 3]], dtype=float).T
    first, second = by_depth(names, values, small_vit, seed=0)
    assert (first["block"], first["removed"], first["best"]) == (1, 30, "ATC")
    assert (first["ToMe"], first["ATC"], first["Absorb"]) == pytest.approx((0.3, 0.1, 0.2))
    assert first["ratio"] == pytest.approx(2)
    assert (first["change_low"], first["change_high"]) == pytest.approx((0.0, 0.2))
    assert second == {"block": 2, "removed": 50, "Absorb": 2}


def test_tables(run):
    status, out, err = run(fidelity.main, RUN)
    assert (status, err) == (0, "")
    tables = json.loads(Path("out.json").read_text())["tables"]
    rows = {row["name"]: row for row in tables["fidelity"]}
    assert rows["ToMe(65) in block 3"]["note"] == "not measured: it removes at most 50 of 100 patches at once"
    assert len(tables["operators"]) == len(tables["operators_top1"]) == 12
    for row, top1 in zip(tables["operators"], tables["operators_top1"], strict=True):
        known = {name: row[name] for name in OPERATORS if name in row}
        assert len(known) == len(OPERATORS) - 3 * (row["removed"] == 65)
        assert row["best"] == min(known, key=known.get)
        assert row["change_low"] <= row["Absorb"] - row[row["best"]] <= row["change_high"]
        for name in ("Absorb", *known):
            own = rows[operator_name(name, row["block"], row["removed"])]
            assert row[name] == pytest.approx(own["kl"])
            assert top1[name] == pytest.approx(-own["top1_change"])
            assert own["tokens"] == pytest.approx(101 - row["removed"] * (5 - row["block"]) / 6)
    titles = ["KL by block and patches removed", "Top-1 lost, as a share of the images"]
    assert re.findall(r"\n\n(.*)\n\|", out) == titles
    assert not list(Path("results").glob("*"))


def test_only_some(run):
    status, out, _ = run(fidelity.main, [*RUN, "--only", "ATC(50)", "Absorb(50)"])
    assert status == 0
    header = next(line for line in out.splitlines() if line.startswith("| block"))
    assert re.findall(r"[\w-]+", header)[:4] == ["block", "removed", "Absorb", "ATC"]
    assert len(json.loads(Path("out.json").read_text())["tables"]["operators"]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "plot.png"], "--plot draws the table of variants; leave out --operators"),
        (["--only", "magic"], "no variant has magic in its name"),
        (["--model", "eva02_tiny_patch14_224", "--random-weights"], "which has rotary positions; they take"),
    ],
)
def test_errors_are_one_line(run, options, message):
    arguments = [*RUN, *options]
    if "--random-weights" in options:
        del arguments[2:4]
    status, _, err = run(fidelity.main, arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
