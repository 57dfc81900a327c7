"""The registry of variants: names, choice, what cannot be had, and tokens."""

import argparse
import sys

import harness
import peers
import pytest
import timm
import torch
import variants
from harness import Bench

import vwt
from vwt.errors import ArgumentError


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def make_bench(model, *options):
    parser = argparse.ArgumentParser()
    harness.add_common(parser)
    return Bench(parser.parse_args(["--model", "test_vit", *options]), torch.device("cpu"), model)


def test_names_are_unique_and_refer_to_others(small_vit):
    every = variants.registry(make_bench(small_vit))
    names = [variant.name for variant in every]
    assert len(set(names)) == len(names)
    assert names[0] == variants.FULL
    assert {variant.baseline for variant in every} <= set(names)
    assert {v.name: v.same_as for v in every if v.same_as} == {
        f"POMT R {removed} in block 3": f"Prune({removed}) in block 3" for removed in (28, 56, 84)
    }
    own = {variants.FULL, variants.QUANTISED, *variants.OURS, *variants.PEERS}
    assert {variant.group for variant in every} <= own
    assert not set(variants.OURS) & set(variants.PEERS)


def test_choice_is_by_name_or_group_and_keeps_the_baseline(small_vit):
    every = variants.registry(make_bench(small_vit))
    assert variants.choose(every, None) == every
    assert [v.name for v in variants.choose(every, ["POMT R 5", "ToMe r"])] == [
        "full", "ToMe r 8", "ToMe r 13", "POMT R 56 in block 3",
    ]  # fmt: skip
    assert [v.group for v in variants.choose(every, ["schedule"])] == ["full"] + ["schedule"] * len(variants.SCHEDULES)
    other = variants.Variant("slow full", "full", every[0].build)
    fast = variants.Variant("fast", "schedule", every[0].build, baseline="slow full")
    assert [v.name for v in variants.choose([every[0], other, fast], ["fast"])] == ["full", "slow full", "fast"]
    with pytest.raises(ArgumentError, match="no variant has magic in its name; there are full, "):
        variants.choose(every, ["magic"])


def test_what_cannot_be_had_is_noted(monkeypatch):
    """Of a model that is too small for some schedules, and that the comparators do not know."""

    def no_kernel(images):
        raise RuntimeError("no kernel for int8\nbut a long explanation")

    monkeypatch.setattr(peers, "in_int8", lambda model: no_kernel)
    bench = make_bench(timm.create_model("test_vit", reg_tokens=4, num_classes=10).eval())
    every = variants.registry(bench)
    modules, notes = variants.build(bench, every, torch.randn(1, 3, 160, 160))
    assert modules.keys().isdisjoint(notes)
    assert [v.name for v in every if v.name in modules or v.name in notes] == [v.name for v in every]
    assert notes["int8 (torchao, dynamic)"] == "not measured: no kernel for int8"
    assert notes["Absorb(120) in block 3"].startswith("not measured: ")
    assert "one class token" in notes["ToMe r 8"]
    assert {v.group for v in every if v.name in modules} == {
        "full", "quantised", "random drop", "VWT paper", "Neighbours", "schedule", "strategy + schedule",
    }  # fmt: skip
    rows = variants.with_notes(every, [{"name": "full", "ms": 1.0}], notes)
    assert [row["name"] for row in rows] == [v.name for v in every]
    assert rows[0] == {"name": "full", "group": "full", "ms": 1.0}
    assert rows[2] == {"name": "int8 (torchao, dynamic)", "group": "quantised", "note": notes[rows[2]["name"]]}


def test_files_with_faults_are_errors(small_vit):
    vwt.PruningSchedule({9: 1}).save("late.json")
    with pytest.raises(ArgumentError, match="block 9"):
        variants.registry(make_bench(small_vit, "--schedule", "late.json"))


def test_tokens_are_those_that_enter_the_blocks(small_vit):
    bench, images = make_bench(small_vit), torch.randn(2, 3, 160, 160)
    fast = vwt.VWTokenizer(small_vit, vwt.IntraImage(0.5), vwt.PruningSchedule({1: 10, 3: 20}))
    assert variants.mean_tokens(bench, fast, images).tolist() == pytest.approx([1 + 220 / 6] * 2)
    assert variants.mean_tokens(bench, small_vit, images).tolist() == [101, 101]
    tome = peers.TokenMerging(small_vit, dict.fromkeys(range(6), 8))
    assert variants.mean_tokens(bench, tome, images).tolist() == [sum(101 - 8 * block for block in range(6)) / 6] * 2
    padded = peers.PadAndMask(vwt.VWTokenizer(small_vit, vwt.IntraImage(0.5)))
    assert variants.mean_tokens(bench, padded, images).tolist() == [51, 51]
    seen = []
    hooks = [b.norm1.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0])) for b in small_vit.blocks]
    fast(images)
    for hook in hooks:
        hook.remove()
    assert [tokens.numel() // tokens.shape[-1] // 2 for tokens in seen] == [51, 51, 41, 41, 21, 21]


def test_gmacs_are_those_of_the_layers(small_vit):
    """Of the projection, twelve products of the width and two of the tokens a block, and the head."""
    images, tokens = torch.randn(2, 3, 160, 160), 101
    width, classes = small_vit.embed_dim, small_vit.num_classes
    hidden = small_vit.blocks[0].mlp.fc1.out_features
    block = tokens * width * (4 * width + 2 * hidden) + 2 * tokens**2 * width
    expected = 100 * width * 3 * 16**2 + len(small_vit.blocks) * block + width * classes
    assert variants.mean_gmacs(small_vit, images) == pytest.approx(expected / 1e9)
    fewer = variants.mean_gmacs(vwt.VWTokenizer(small_vit, vwt.IntraImage(0.5)), images)
    assert 0.4 < fewer / variants.mean_gmacs(small_vit, images) < 0.6


def test_int8_by_torchao(small_vit):
    pytest.importorskip("torchao", exc_type=ImportError)  # which it also raises beside a torch that is too old for it
    low, images = peers.quantised.in_int8(small_vit), torch.randn(4, 3, 160, 160)
    full, answer = small_vit(images), low(images)
    assert type(low.blocks[0].mlp.fc1.weight) is not type(small_vit.blocks[0].mlp.fc1.weight)
    error = (answer - full).norm() / full.norm()
    assert 1e-4 < error < 0.1  # eight bits, and not 32


def test_without_torchao(small_vit, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ArgumentError, match=r"torchao is not installed; pip install 'vwt\[int8\]'"):
        peers.quantised.in_int8(small_vit)


def test_bfloat16(small_vit):
    images = torch.randn(2, 3, 160, 160)
    assert peers.in_bfloat16(small_vit)(images).dtype == torch.bfloat16
    assert next(small_vit.parameters()).dtype == torch.float32
    with pytest.raises(ArgumentError, match="in bfloat16 already"):
        peers.in_bfloat16(small_vit.bfloat16())
