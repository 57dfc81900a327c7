"""The table over runtimes: what is in a row, what a limit computes, and what cannot be had."""

import argparse
import json
from pathlib import Path

import latency
import pytest
import runtimes
import torch
from harness import Bench
from runtimes import Apart, Limit, as_row, limited, open_here, registered, runtime_and_precisions, time_here
from variants import FULL

from tests.export.cases import needs_tracing
from vwt.errors import ModelError

TINY = ["--model", "test_vit", "--random-weights", "--data", "images", "--images", "2", "--runs", "1", "--quiet"]


def parse(*options):
    parser = argparse.ArgumentParser()
    latency.add_options(parser)
    return parser.parse_args([*TINY, *options])


def test_runtimes_are_asked_for_by_name():
    assert runtime_and_precisions("compile:bfloat16") == [("compile", "bfloat16")]
    assert runtime_and_precisions("openvino") == [("openvino", "float32"), ("openvino", "bfloat16")]
    assert len(runtime_and_precisions("all")) == 8
    for text in ("tensorrt", "torch:int8", "", ":"):
        with pytest.raises(argparse.ArgumentTypeError, match="RUNTIME one of all, torch, compile"):
            runtime_and_precisions(text)


@torch.inference_mode()
def test_limit_is_the_model_on_fewer_tokens(small_vit):
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    nothing = Limit(small_vit, 0.0, {}, torch.float32)
    torch.testing.assert_close(nothing(images), small_vit(images), atol=1e-5, rtol=1e-5)
    tokens = small_vit._pos_embed(small_vit.patch_embed(images))[:, :51]
    for index, block in enumerate(small_vit.blocks):
        tokens = tokens + block.attn(block.norm1(tokens))
        tokens = tokens[:, :31] if index == 3 else tokens
        tokens = tokens + block.mlp(block.norm2(tokens))
    expected = small_vit.forward_head(small_vit.norm(tokens))
    limit = Limit(small_vit, 0.5, {3: 20}, torch.float32)
    torch.testing.assert_close(limit(images), expected, atol=1e-5, rtol=1e-5)
    assert limit.cut.lengths(51) == [51, 51, 51, 51, 31, 31]
    low = Limit(small_vit, 0.5, {3: 20}, torch.bfloat16)(images)
    assert low.dtype == torch.float32
    assert 0 < (low - expected).abs().max() < 0.1
    assert next(small_vit.parameters()).dtype == torch.float32


@torch.inference_mode()
def test_limit_refuses_models(small_vit):
    small_vit.global_pool = "avg"
    with pytest.raises(ModelError, match="pools by 'avg'"):
        Limit(small_vit, 0.5, {}, torch.float32)


def test_a_row(folder):
    assert open_here(parse(), "torch", "float32", limited) == {}
    row = as_row(runtimes.Timed(time_here()))
    assert list(row) == ["full_ms", *(name for variant in runtimes.VARIANTS for name in variant.columns)]
    assert all(value > 0 for value in row.values())
    assert set(row) < set(runtimes.COLUMNS)


def test_all_variants_and_limits_answer(folder):
    bench = Bench.open(parse(), [])
    [example, _] = bench.batches()
    with torch.inference_mode():
        answers = {name: opener()(example) for name, opener in limited(bench, "torch", "bfloat16", example)}
    assert {answer.shape for answer in answers.values()} == {(1, 1000)}
    assert all(not torch.equal(answer, answers[FULL]) for name, answer in answers.items() if name != FULL)


def test_variants_of_the_registry_in_a_runtime(folder):
    """All but the quantised ones; of what cannot be had there is a note, and it is not timed."""
    options = parse("--only", "Neighbours 0.4", "ToMe r 8", "bfloat16", "PPT, 30")
    notes = open_here(options, "torch", "float32", registered)
    assert list(notes) == ["PPT, 30 in blocks 3, 6 and 9"]
    assert notes["PPT, 30 in blocks 3, 6 and 9"].startswith("not measured: block 6 removes 30 patches")
    seconds = time_here()
    assert list(seconds) == [FULL, "Neighbours 0.4", "Neighbours 0.4 + Absorb(0.5) in block 3", "ToMe r 8"]
    assert {own.shape for own in seconds.values()} == {(2, 1)}


@pytest.mark.parametrize(
    ("runtime", "precision", "reason"),
    [
        pytest.param("onnxruntime", "bfloat16", "onnxruntime has no bfloat16 on a CPU", marks=needs_tracing),
        ("torch", "bfloat16", "this CPU has no instructions for bfloat16"),
    ],
)
def test_what_cannot_be_had_is_a_note(folder, monkeypatch, runtime, precision, reason):
    monkeypatch.setattr(runtimes, "has_bfloat16", lambda: False)
    measured = Apart(runtime, precision)
    measured.open(Bench.open(parse(), []), limited)
    row = as_row(measured.time())
    assert list(row) == ["note"]
    assert row["note"].startswith(f"not measured: {reason}")


@pytest.mark.slow
def test_each_row_in_a_process_of_its_own(run):
    options = ["--runtime", "torch:float32", "onnxruntime", "--results-file", "out"]
    status, out, _ = run(latency.main, [*TINY, *options])
    assert status == 0
    assert "\nRuntimes, ratios to the full model in the same one\n" in out
    rows = json.loads(Path("out.json").read_text())["tables"]["runtimes"]
    assert [(row["runtime"], row["precision"], "note" in row) for row in rows] == [
        ("torch", "float32", False), ("onnxruntime", "float32", False), ("onnxruntime", "bfloat16", True),
    ]  # fmt: skip
    assert all(row["full_ms"] > 0 and row["Absorb(98)"] > 0 for row in rows[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runtime", "tensorrt"], "'tensorrt' is not RUNTIME[:PRECISION]"),
        (["--runtime", "all", "--plot", "plot.png"], "leave out --matching, --scaling and --runtime"),
        (["--runtime", "all", "--torchcompile"], "leave out --precision and --torchcompile"),
        (["--runtime", "all", "--precision", "bfloat16"], "leave out --precision and --torchcompile"),
    ],
)
def test_errors_are_one_line(run, options, message):
    status, _, err = run(latency.main, [*TINY, *options])
    assert status == 2
    assert message in err.splitlines()[-1]
