"""The soak's checks, on a few calls."""

import platform
import random
from functools import partial

import pytest
import soak
import torch

from tests.reductions.cases import make_model
from tests.test_datasets import write_images
from vwt import Absorb, Neighbours, PruningSchedule, VWTokenizer
from vwt.errors import VWTError

QUICK = ["--model", "test_vit", "--minutes", "0.02", "--callers", "2", "--quiet"]


def make_calls():
    model, pixels = make_model(), {64: torch.randn(6, 3, 64, 64)}
    wrappers = {"Neighbours": VWTokenizer(model, Neighbours(threshold=0.9), PruningSchedule({1: Absorb(0.2)}))}
    with torch.inference_mode():
        table = {("Neighbours", 64): torch.cat([wrappers["Neighbours"](one[None]) for one in pixels[64]])}
    return wrappers, pixels, table


def test_every_answer_is_checked():
    wrappers, pixels, table = make_calls()
    counts = soak.Counts()
    for number in range(20):
        soak.call(random.Random(number), counts, wrappers, pixels, table)
    assert counts.wrong == []
    assert sum(map(len, counts.seconds.values())) == 20
    table["Neighbours", 64] = table["Neighbours", 64] + 1
    soak.call(random.Random(0), counts, wrappers, pixels, table)
    assert [line.endswith("off by 1") for _, line in counts.wrong] == [True]


def test_an_error_in_a_thread_ends_the_run(tmp_path):
    def fail():
        raise ZeroDivisionError

    arguments = soak.argparse.Namespace(minutes=5.0, callers=2, seed=0, quiet=True)
    with pytest.raises(ZeroDivisionError):
        soak.soak(arguments, soak.Counts(), *make_calls(), partial(fail))


@pytest.fixture
def report(capsys):
    def report(counts):
        soak.report(soak.argparse.Namespace(minutes=10.0, callers=2), counts, [])
        return capsys.readouterr().out

    return report


def make_counts(*sizes):
    counts = soak.Counts(builds=3)
    counts.seconds["full", 224, 2] = [1.0] * 98 + [3.0, 4.0]
    counts.memory = [(float(minute), size) for minute, size in enumerate(sizes)]
    counts.faults = [(60 * minute, 0) for minute in range(len(sizes))]
    return counts


def test_the_report(report):
    out = report(make_counts(*[1 << 20] * 5, *[1 << 22] * 5))
    assert "| full |   100 |    200 |     0 | 1.000 | 3.010 |    4.00 |" in out
    assert "2 callers, 10 minutes, 3 builds beside" in out
    assert "resident 4.0 MiB after minute 5.0, 4.0 MiB at the end (+0.0 %), at most 4.0 MiB" in out
    assert "page faults a second: 1 minor, 0.00 major" in out


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are asked otherwise")
def test_memory_that_is_free_is_not_counted():
    before = soak.resident()
    kept = [bytearray(10_000) for _ in range(10_000)]
    last = bytearray(10_000)  # without which the heap would shrink by itself
    assert soak.resident() > before + (80 << 20)
    del kept
    assert soak.resident() < before + (20 << 20)
    assert last


def test_memory_that_grows_is_refused(report):
    with pytest.raises(VWTError, match=r"resident memory grew by 5.0 % after minute 5.0"):
        report(make_counts(*[100] * 9, 105))


def test_wrong_answers_are_refused(report, capsys):
    counts = make_counts(*[100] * 10)
    counts.wrong.append(("full", "full, 224 px, 2 images: off by 1"))
    with pytest.raises(VWTError, match="1 wrong answers"):
        report(counts)
    assert "full, 224 px, 2 images: off by 1" in capsys.readouterr().out


@pytest.mark.slow
def test_a_short_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(soak, "SIZES", (160, 96))
    monkeypatch.setattr(soak, "WORDS", 16)
    monkeypatch.setattr(soak, "GROWTH", 10.0)
    write_images(tmp_path / "images", 11)
    status = soak.main([*QUICK, "--data", str(tmp_path / "images"), "--results-file", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "builds beside" in printed.out
    assert (tmp_path / "out.json").is_file()
