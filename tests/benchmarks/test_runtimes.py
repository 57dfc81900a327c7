"""The table over runtimes: what is in a row, what a limit computes, and what cannot be had."""

import argparse
import json
import os
import signal
from functools import partial
from pathlib import Path

import fidelity
import latency
import numpy as np
import pytest
import runtimes
import torch
from harness import WORDS, Bench
from runtimes import (
    Limit,
    Timed,
    as_row,
    of_registry,
    open_here,
    open_in,
    runtime_and_precisions,
    time_here,
    time_in_processes,
    with_limits,
)
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


def opened(options, models, words=()):
    """What a process would have timed, and its notes."""
    notes = open_here(options, "torch", "float32", models, words)
    return time_here(), notes


def test_a_row(folder):
    row = as_row(Timed(*opened(parse(), with_limits)))
    assert list(row) == ["full_ms", *(name for variant in runtimes.VARIANTS for name in variant.columns)]
    assert all(value > 0 for value in row.values())
    assert set(row) < set(runtimes.COLUMNS)


def test_a_row_says_which_columns_it_lacks():
    seconds = {name: np.full((2, 3), value) for name, value in ((FULL, 2.0), ("one", 1.0))}
    assert as_row(Timed(seconds, {"two": "not measured: no", "three": "not measured: neither"})) == {
        "full_ms": 2000.0, "one": 0.5, "note": "two not measured: no; three not measured: neither",
    }  # fmt: skip
    assert as_row(Timed({}, {FULL: "not measured: no"})) == {"note": "not measured: no"}


def test_all_variants_and_limits_answer(folder):
    bench = Bench.open(parse(), [])
    [example, _] = bench.batches()
    models = with_limits(bench, torch.bfloat16)
    with torch.inference_mode():
        answers = {name: open_in("torch", "bfloat16", build(), example)(example) for name, build in models.items()}
    assert {answer.shape for answer in answers.values()} == {(1, 1000)}
    assert all(not torch.equal(answer, answers[FULL]) for name, answer in answers.items() if name != FULL)


def test_a_model_without_limits_is_measured_all_the_same(folder):
    options = parse()
    options.model = "vit_small_patch16_dinov3"  # rotary positions
    options.img_size = 160
    seconds, notes = opened(options, with_limits)
    assert list(seconds) == [FULL, "Absorb(98)", "Neighbours(0.33)", "IntraImage(0.5)"]
    assert list(notes) == ["limit of Absorb(98)", "limit of IntraImage(0.5)"]
    assert all("rotary positions" in note for note in notes.values())


NAMES = [FULL, "bfloat16", "InterImage embedding 20, 0.1", "Neighbours 0.4", "ToMe r 8", "PPT, 30 in blocks 3, 6 and 9"]


def test_variants_of_the_registry_in_a_runtime(folder):
    """All but the quantised ones, in the order of the registry; of what cannot be had there is a note."""
    options = parse("--words-data", "images", "--threshold", "0.1")
    seconds, notes = opened(options, partial(of_registry, NAMES), [("embedding", 20)])
    assert list(notes) == ["PPT, 30 in blocks 3, 6 and 9"]
    assert notes["PPT, 30 in blocks 3, 6 and 9"].startswith("not measured: block 6 removes 30 patches")
    assert list(seconds) == [FULL, "InterImage embedding 20, 0.1", "Neighbours 0.4", "ToMe r 8"]
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
    [timed] = time_in_processes(parse(), torch.device("cpu"), [(runtime, precision)], with_limits)
    assert timed.notes[FULL].startswith(f"not measured: {reason}")
    assert list(as_row(timed)) == ["note"]


def die(bench, dtype):
    """As the system kills what takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail(bench, dtype):
    """With an error as runtimes have them."""
    raise Exception("graph is broken\nfar below")


@pytest.mark.slow
@pytest.mark.parametrize(("models", "note"), [(die, "its process died, of a crash or"), (fail, "graph is broken")])
def test_a_process_that_fails_is_a_note(folder, models, note):
    [timed] = time_in_processes(parse(), torch.device("cpu"), [("torch", "float32")], models)
    assert timed.seconds == {}
    assert list(timed.notes) == [FULL]
    assert note in timed.notes[FULL]
    assert "\n" not in timed.notes[FULL]


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


# -- of fidelity -------------------------------------------------------------------------------------------------------

FIDELITY = [*TINY, "--words-data", "images", "--words", "20"]


@pytest.mark.parametrize("options", [["--precision", "bfloat16"], ["--torchcompile"]])
def test_fidelity_in_runtimes_refuses_a_precision(run, options):
    status, _, err = run(fidelity.main, [*FIDELITY, "--runtime", "all", *options])
    assert (status, err.count("\n")) == (2, 1)
    assert "leave out --precision and --torchcompile" in err


@needs_tracing
def test_fidelity_over_latency_in_runtimes(run, monkeypatch):
    """A column each, a front each, and a line for what a runtime cannot hold."""

    def time_in_processes(options, device, pairs, models, words):
        assert (options.batch_size, models.func, words) == (1, of_registry, WORDS)
        assert pairs == [("compile", "float32"), ("onnxruntime", "float32")]
        kinds = {"full": 2.0, "Neighbours 0.4": 1.0, "ToMe r 8": 3.0}
        seconds = {name: np.full((2, 1), value) for name, value in kinds.items()}
        return [Timed(seconds), Timed({}, {"full": "not measured: no"})]

    monkeypatch.setattr(runtimes, "time_in_processes", time_in_processes)
    asked = ["--only", "Neighbours 0.4", "ToMe r 8", "--runtime", "onnxruntime", "compile", "--plot", "plot.png"]
    status, out, err = run(fidelity.main, [*FIDELITY, *asked, "--results-file", "out"])
    assert (status, err) == (0, "fidelity: full in onnxruntime: not measured: no\n")
    written = json.loads(Path("out.json").read_text())
    assert written["not_in_runtimes"] == {"compile": {}, "onnxruntime": {"full": "not measured: no"}}
    found = {row["name"]: row for row in written["tables"]["fidelity"]}
    assert {name: row["compile"] for name, row in found.items() if "compile" in row} == {
        "full": 1.0, "Neighbours 0.4": 0.5, "ToMe r 8": 1.5,
    }  # fmt: skip
    assert [name for name, row in found.items() if "compile" in row["front"]] == ["full", "Neighbours 0.4"]
    assert not any("onnxruntime" in row for row in found.values())
    assert "onnxruntime" not in out.split("\nFidelity\n")[1].splitlines()[0]
    assert Path("plot.png").stat().st_size > 1000


@pytest.mark.slow
@needs_tracing
def test_fidelity_over_latency_in_onnxruntime(run):
    asked = ["--only", "Neighbours 0.4", "ToMe r 8", "top-k, 84", "--runtime", "onnxruntime", "--results-file", "out"]
    status, _, err = run(fidelity.main, [*FIDELITY, *asked])
    assert (status, err) == (0, "")
    found = json.loads(Path("out.json").read_text())["tables"]["fidelity"]
    assert all(row["onnxruntime"] > 0 for row in found)
