import io
import sys

from vwt import progress
from vwt.progress import Steps, progress_bar


def terminal(monkeypatch):
    """Stderr as a terminal; called in a test, as pytest sets its own after each fixture."""
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_steps_are_numbered_and_say_what_they_found(capsys):
    step = Steps(2)
    step("reading")
    step.found("3 images")
    step("timing")
    assert capsys.readouterr() == ("", "step 1 of 2: reading\n  3 images\nstep 2 of 2: timing\n")


def test_nothing_is_said_that_is_not_shown(monkeypatch):
    stream = terminal(monkeypatch)
    step = Steps(1, show=False)
    step("reading")
    step.found("nothing")
    assert list(progress_bar(range(3), desc="reading", unit="image", show=False)) == [0, 1, 2]
    assert stream.getvalue() == ""


def test_what_was_printed_stands_before(monkeypatch, tmp_path):
    """Even where both go into one file, of which stdout is written in blocks."""
    with (tmp_path / "log").open("w") as log, (tmp_path / "log").open("a") as appending:
        monkeypatch.setattr(sys, "stdout", log)
        monkeypatch.setattr(sys, "stderr", appending)
        print("result")
        progress.say("next")
    assert (tmp_path / "log").read_text() == "result\nnext\n"


def test_a_bar_of_a_terminal_moves_and_goes(monkeypatch):
    stream = terminal(monkeypatch)
    list(progress_bar(range(3), desc="reading", unit="image"))
    drawn = stream.getvalue()
    assert "reading:   0%" in drawn
    assert "\n" not in drawn
    assert drawn.endswith("\r")


def test_without_a_terminal_there_are_lines(capsys, monkeypatch):
    """One for each item, as if each took long."""
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with progress_bar(desc="reading", unit="image", total=3, initial=1) as bar:
        bar.update()
        bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines][-2:] == ["  reading: 2 of 3 images", "  reading: 3 of 3 images"]
    assert not any("\r" in line for line in lines)


def test_without_a_terminal_what_is_short_has_no_line(capsys):
    list(progress_bar(range(3), desc="reading", unit="image"))
    assert capsys.readouterr().err == ""
