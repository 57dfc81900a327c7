"""The benchmark of energy: arithmetic of known answers, and runs on a small random model with fake counters."""

import csv
import json
import math
import re
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import energy
import energy_record
import harness
import peers
import pytest

from tests.energy.test_meter import make_tree
from vwt.energy import sensors
from vwt.energy.meter import DeviceEnergy, Energy
from vwt.errors import ArgumentError
from vwt.measure.timing import time_call

TINY = ["--model", "test_vit", "--random-weights", "--data", "images", "--words-data", "images", "--quiet"]
CHOSEN = ["--only", "quantised", "IntraImage", "InterImage embedding 20, 0.1", "Neighbours 0.4", "ToMe r"]
QUICK = [*TINY, "--images", "2", "--runs", "1", "--words", "20", "--seconds", "0.01", *CHOSEN]
NAMES = [
    "full", "bfloat16", "int8 (torchao, dynamic)", "IntraImage 0.25", "IntraImage 0.33", "IntraImage 0.5",
    "InterImage embedding 20, 0.1", "InterImage embedding 20, 0.1, padded and masked", "Neighbours 0.4",
    "Neighbours 0.4 + Absorb(0.5) in block 3", "InterImage embedding 20, 0.1 + Prune(56) in block 3",
    "ToMe r 8", "ToMe r 13",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_sensors(folder, monkeypatch):
    """A machine without sensors, and results of others; nobody rests."""
    (folder / "text.json").write_text("text")
    (folder / "other.json").write_text('{"hardware": "", "tables": {}}')
    monkeypatch.setattr(sensors, "zeus_sensors", lambda gpus=None: [])
    monkeypatch.setattr(energy, "REST", 0.0)
    monkeypatch.setattr(energy, "WARMUP", 1)


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """A powercap tree that sees 0.4 and 0.2 J of each call in packages, 0.05 and 0.04 J in memory, and 10 W at rest."""
    root = tmp_path / "powercap"
    make_tree(root)
    zones = ["intel-rapl:0", "intel-rapl:1", "intel-rapl:0/intel-rapl:0:2", "intel-rapl:1/intel-rapl:1:0"]

    def rise(*millijoules):
        for zone, amount in zip(zones, millijoules, strict=True):
            with suppress(OSError):  # a zone that a test took away
                file = root / zone / "energy_uj"
                file.write_text(f"{int(file.read_text()) + 1000 * amount}\n")

    def call(*rest):
        spent = time_call(*rest)
        rise(400, 200, 50, 40)
        return spent

    def sleep(seconds):
        time.sleep(seconds)
        rise(*(int(1e3 * watts * seconds) for watts in (5, 3, 1, 1)))

    monkeypatch.setattr(energy, "time_call", call)
    monkeypatch.setattr(energy, "time", SimpleNamespace(sleep=sleep))
    return root


def results(name="out"):
    return json.loads(Path(f"{name}.json").read_text())


def rows(name="out", table="energy"):
    return {row["name"]: row for row in results(name)["tables"][table]}


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--estimate"], r"got ''; expected IDLE,BUSY \(as in 5,35\) or codecarbon"),
        (["--estimate", "5"], "got '5'; expected IDLE,BUSY"),
        (["--estimate", "35,5"], "expected 0 <= idle <= busy"),
        (["--seconds", "0"], "'0' is not a number of seconds above 0"),
        (["--seconds", "long"], "'long' is not a number of seconds"),
        (["--seconds", "nan"], "'nan' is not a number of seconds"),
        (["--powercap", "missing"], "no folder missing; expected one with RAPL zones"),
        (["--plot", "plot.png"], "--plot draws joules, and no sensor can be read .*--estimate IDLE,BUSY"),
        (["--results-file", "text"], "text.json holds no energy figures of this benchmark; measure anew with --fresh"),
        (["--results-file", "other"], "other.json holds no energy figures of this benchmark"),
        (["--device", "nowhere"], "no device 'nowhere'"),
    ],
)
def test_errors_are_one_line(run, options, message):
    status, _, err = run(energy.main, [*QUICK, *options])
    assert status == 2
    assert err.startswith("energy: ")
    assert err.count("\n") == 1, err
    assert re.search(message, err), err


def test_a_window_shorter_than_the_sensors_step(run, folder):
    make_tree(folder / "powercap")
    status, _, err = run(energy.main, [*QUICK, "--powercap", "powercap", "--seconds", "0.001"])
    assert (status, err.count("\n")) == (2, 1)
    assert "moves every 0.001 s; measure at least 0.01 s" in err


# -- arithmetic --------------------------------------------------------------------------------------------------------


def make_window(joules, seconds, images=10, session=1, reason=None):
    watts = None if joules is None else joules / seconds
    return {
        "joules": joules, "seconds": seconds, "images": images, "session": session, "reason": reason, "watts": watts,
        "source": "rapl",
    }  # fmt: skip


def test_rows_of_known_answers():
    windows = [make_window(60.0, 2.0), make_window(132.0, 4.0, images=22, session=2)]
    row = energy_record.summarise(windows, {1: 10.0, 2: 11.0}, batch=2)
    assert row["joules_per_image"] == 6.0
    assert row["joules_ci"] == 0.0
    assert row["watts"] == pytest.approx((30 + 33) / 2)
    assert row["above_idle"] == pytest.approx(((60 - 20) / 10 + (132 - 44) / 22) / 2)
    assert row["ms"] == pytest.approx((400 + 8000 / 22) / 2)
    assert row["images_per_second"] == pytest.approx(2000 / row["ms"])
    assert (row["windows"], row["source"], row["note"]) == (2, "rapl", None)
    assert energy_record.summarise(windows, {1: 10.0}, batch=2)["above_idle"] is None  # no idle of session 2


def test_watts_times_seconds_are_joules():
    row = energy_record.summarise([make_window(37.0, 2.5, images=16)], {}, batch=4)
    assert row["watts"] * row["ms"] / 1e3 / 4 == pytest.approx(row["joules_per_image"])
    assert row["joules_ci"] is None


def test_a_window_without_joules_counts_for_time_only():
    windows = [make_window(60.0, 2.0), make_window(None, 3.0, reason="package-1: gone")]
    row = energy_record.summarise(windows, {}, batch=1)
    assert (row["joules_per_image"], row["watts"], row["ms"]) == (6.0, 30.0, 250.0)
    assert row["note"] == "no joules in 1 of 2 windows: package-1: gone"
    assert row["source"] == "rapl"
    assert energy_record.summarise([{**windows[1], "source": "none"}, windows[0]], {}, batch=1)["source"] == "rapl"
    assert energy_record.summarise([windows[0], {**windows[1], "source": "none"}], {}, batch=1)["source"] == "rapl"
    row = energy_record.summarise(windows[1:], {}, batch=1)
    assert row["source"] == "none"
    assert (row["joules_per_image"], row["joules_ci"], row["watts"], row["above_idle"]) == (None, None, None, None)


def test_idle_watts_are_the_mean_of_before_and_after():
    record = energy_record.Record([], {})
    for session, joules in ((1, 10.0), (1, 14.0), (2, 30.0)):
        record.idle.append({"session": session, "device": "total", "watts": joules / 2.0})
    record.idle.append({"session": 3, "device": "total", "watts": None})
    assert record.idle_watts("total") == {1: 6.0, 2: 15.0}


def test_difference():
    header = {"version": "1", "arguments": {"seconds": 2.0, "batch_size": 1}}
    assert energy_record.difference({**header, "version": "0"}, header) == "another version: '0', and not '1'"
    more = {**header, "arguments": {**header["arguments"], "speed": None}}
    assert energy_record.difference(more, header) == "another --speed: None, and not None"
    then = {**header, "arguments": {"seconds": 2.0, "batch_size": 8}}
    assert energy_record.difference(then, header) == "another --batch-size: 8, and not 1"


# -- runs --------------------------------------------------------------------------------------------------------------


def test_without_sensors(run):
    status, out, err = run(energy.main, [*QUICK, "--results-file", "out"])
    assert (status, err) == (0, "")
    missing = [line for line in out.splitlines() if line.startswith("No joules: ")]
    assert len(missing) == 1
    assert "/sys/class/powercap" in missing[0] or "RAPL" in missing[0]
    assert "--estimate" in missing[0]
    assert "joules_per_image" not in out
    table = rows()
    assert list(table) == NAMES
    for name, row in table.items():
        if row["note"] is None:
            assert row["ms"] > 0, name
            assert row["joules_per_image"] is None
            assert row["watts"] is None
            assert row["source"] == "none"
            assert 0 <= row["agreement"] <= 1
    assert '"joules_per_image": null' in Path("out.json").read_text()
    assert table["full"]["agreement"] == 1
    assert [table[name]["tokens"] for name in ("IntraImage 0.5", "Neighbours 0.4")] == [51, 61]
    assert table["Neighbours 0.4 + Absorb(0.5) in block 3"]["tokens"] == 1 + (4 * 60 + 2 * 30) / 6


def test_estimates_are_labelled(run):
    options = ["--estimate", "5,35", "--results-file", "out", "--plot", "plot.svg", "--runs", "2"]
    status, out, err = run(energy.main, [*QUICK, *options])
    assert (status, err) == (0, "")
    assert "Energy, joules and watts ESTIMATED" in out
    assert "Idle, before and after: 5.00, 5.00 W" in out
    saved = results()
    for row in saved["tables"]["energy"]:
        assert row["source"] == "estimated"
        assert row["watts"] == pytest.approx(35)
        assert row["joules_per_image"] == pytest.approx(35 * row["ms"] / 1e3)
        assert row["above_idle"] == pytest.approx(30 * row["ms"] / 1e3)
        assert row["windows"] == 2
    with open("out.csv", newline="") as file:
        written = [row for row in csv.DictReader(file) if row["table"] == "energy"]
    assert [row["name"] for row in written] == NAMES
    assert {row["source"] for row in written} == {"estimated"}
    assert {row["hardware"] for row in written} == {saved["hardware"]}
    assert "threads, torch" in saved["hardware"]
    assert Path("plot.svg").stat().st_size > 1000


def test_powercap(run, powercap):
    options = ["--powercap", str(powercap), "--results-file", "out", "--plot", "plot.png"]
    status, out, err = run(energy.main, [*QUICK, *options])
    assert (status, err) == (0, "")
    assert "Joules of package-0 (rapl), package-0 dram (rapl), package-1 (rapl), package-1 dram (rapl)." in out
    assert "Joules an image by device" in out
    for row in rows().values():
        assert row["source"] == "rapl"
        assert row["joules_per_image"] == pytest.approx(0.69)
        assert row["watts"] * row["ms"] / 1e3 == pytest.approx(0.69)
        assert 0.69 - 10 * row["ms"] / 1e3 <= row["above_idle"] < 0.69  # sleep takes longer than it is told to
    windows = results()["tables"]["windows"]
    for total, *devices in (windows[i : i + 5] for i in range(0, len(windows), 5)):
        assert total["device"] == "total"
        assert [d["device"] for d in devices] == ["package-0", "package-0 dram", "package-1", "package-1 dram"]
        assert total["joules"] == pytest.approx(sum(d["joules"] for d in devices))
        assert [d["joules"] / d["images"] for d in devices] == pytest.approx([0.4, 0.05, 0.2, 0.04])
        assert total["seconds"] >= 0.01
        assert total["images"] % 2 == 0
    assert len(results()["tables"]["idle"]) == 2 * 5


def test_a_sensor_that_vanishes_in_the_run(run, powercap, monkeypatch):
    measure_window, done = energy.measure_window, []

    def vanish(*rest):
        done.append(1)
        if len(done) == 5:
            (powercap / "intel-rapl:1").rename(powercap / "gone")
        return measure_window(*rest)

    monkeypatch.setattr(energy, "measure_window", vanish)
    options = ["--powercap", str(powercap), "--results-file", "out"]
    status, out, err = run(energy.main, [*QUICK, *options])
    assert (status, err) == (0, "")
    table = rows().values()
    assert sum(row["joules_per_image"] is not None for row in table) == 4
    lost = [row for row in table if row["joules_per_image"] is None]
    assert all("no joules in 1 of 1 windows: package-1: cannot read" in row["note"] for row in lost)
    assert "package-1: cannot read" in out


def interrupt_after(monkeypatch, count):
    """Ctrl-C in the window after so many; the list of those that ended."""
    measure_window, ended = energy.measure_window, []

    def measure(*rest):
        if len(ended) == count:
            raise KeyboardInterrupt
        found = measure_window(*rest)
        ended.append(found)
        return found

    monkeypatch.setattr(energy, "measure_window", measure)
    return ended


def test_interrupted(run, monkeypatch):
    options = [*QUICK, "--estimate", "5,35", "--results-file", "out", "--runs", "2"]
    ended = interrupt_after(monkeypatch, 17)
    status, out, err = run(energy.main, options)
    assert status == 130
    assert err.startswith("\nenergy: interrupted; with --results-file, the windows that were finished are kept")
    assert err.count("\n") == 2
    assert "| full " in out
    kept = results()["tables"]["windows"]
    assert [row["seconds"] for row in kept if row["device"] == "total"] == [e.seconds for e in ended]
    assert len(ended) == 17  # a round of 13, and 4 more


def test_resuming_measures_what_is_missing_only(run, monkeypatch):
    options = [*QUICK, "--estimate", "5,35", "--results-file", "out"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 9)
        assert run(energy.main, options)[0] == 130
    kept = results()["tables"]["windows"]
    finished = {row["name"] for row in kept}
    assert len(finished) == 9

    ended = interrupt_after(monkeypatch, None)
    built, build = [], energy.build
    monkeypatch.setattr(energy, "build", lambda bench, left, batch: built.extend(left) or build(bench, left, batch))
    assert run(energy.main, options)[0] == 0
    assert {variant.name for variant in built} == set(NAMES) - finished
    assert len(ended) == len(NAMES) - 9
    windows = results()["tables"]["windows"]
    assert windows[: len(kept)] == kept
    assert {row["session"] for row in windows} == {1, 2}
    assert list(rows()) == NAMES

    ended.clear()
    status, out, _ = run(energy.main, options)
    assert (status, len(ended)) == (0, 0)
    assert "ToMe r 13" in out
    assert run(energy.main, [*options, "--runs", "2"])[0] == 0  # more windows of the same
    assert len(ended) == len(NAMES)
    ended.clear()
    assert run(energy.main, [*options, "--fresh"])[0] == 0
    assert len(ended) == len(NAMES)
    assert {row["session"] for row in results()["tables"]["windows"]} == {1}


def test_the_results_of_something_else_are_refused(run, monkeypatch):
    options = [*QUICK, "--estimate", "5,35", "--results-file", "out"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert run(energy.main, options)[0] == 130
    before = Path("out.json").read_text()
    for other, message in (
        (["--batch-size", "2"], "another --batch-size: 1, and not 2"),
        (["--estimate", "5,36"], "another --estimate: '5,35', and not '5,36'"),
        (["--seed", "1"], "another --seed: 0, and not 1"),
    ):
        status, _, err = run(energy.main, [*options, *other])
        assert (status, err.count("\n")) == (2, 1)
        assert message in err
        assert "--fresh" in err
    monkeypatch.setattr(harness, "hardware", lambda *rest: "another machine")
    assert "another hardware: " in run(energy.main, options)[2]
    assert Path("out.json").read_text() == before


@pytest.mark.parametrize(
    ("table", "row"),
    [
        ("windows", 3),
        ("windows", {"seconds": "2"}),
        ("windows", {"seconds": 0.0}),
        ("windows", {"images": 0}),
        ("windows", {"joules": math.nan}),
        ("windows", {"watts": None, "joules": 3.0}),
        ("windows", {"session": None}),
        ("idle", {"seconds": [[1.0]]}),
        ("facts", {"name": 3}),
        ("facts", {"tokens": "many"}),
    ],
)
def test_damaged_results_are_refused(tmp_path, table, row):
    header, path = {"hardware": "Abacus", "sensors": [], "arguments": {"batch_size": 1}}, tmp_path / "out.json"
    record = energy_record.Record([path, tmp_path / "out.csv"], header)
    record.facts = [{"name": "full", "group": "full", "note": None, "tokens": None, "agreement": None}]
    for rows in (record.windows, record.idle):
        record.add(rows, "full", 1, Energy(2.0, 8, (DeviceEnergy("cpu", "rapl", 2.0, 8, 4.0),), 0.01))
    assert energy_record.Record.open([path], header, fresh=False) == replace(record, paths=[path])
    content = json.loads(path.read_text())
    rows = content["tables"][table]
    rows[0] = {**rows[0], **row} if isinstance(row, dict) else row
    path.write_text(json.dumps(content))
    with pytest.raises(ArgumentError, match="holds no energy figures of this benchmark; measure anew with --fresh"):
        energy_record.Record.open([path], header, fresh=False)


def test_results_nested_without_end_are_refused(tmp_path):
    (tmp_path / "out.json").write_text("[" * 100_000)
    with pytest.raises(ArgumentError, match="holds no energy figures"):
        energy_record.Record.open([tmp_path / "out.json"], {}, fresh=False)


def test_interrupted_without_a_file(run, monkeypatch):
    interrupt_after(monkeypatch, 2)
    status, out, err = run(energy.main, QUICK)
    assert (status, err) == (130, f"\nenergy: interrupted; {energy.KEPT}\n")
    assert "with --results-file" in energy.KEPT
    assert "| full " in out


def test_order_differs_between_rounds(run):
    assert run(energy.main, [*QUICK, "--runs", "3", "--results-file", "out"])[0] == 0
    order = [row["name"] for row in results()["tables"]["windows"] if row["device"] == "total"]
    rounds = [order[i : i + len(NAMES)] for i in range(0, len(order), len(NAMES))]
    assert [sorted(names) for names in rounds] == [sorted(NAMES)] * 3
    assert rounds[0] != rounds[1] != rounds[2]


def test_a_variant_that_this_machine_cannot_run(run, monkeypatch):
    def no_kernel(images):
        raise RuntimeError("no kernel for int8")

    monkeypatch.setattr(peers, "in_int8", lambda model: no_kernel)
    status, out, _ = run(energy.main, [*QUICK, "--results-file", "out"])
    assert status == 0
    row = rows()["int8 (torchao, dynamic)"]
    assert row["note"] == "not measured: no kernel for int8"
    assert "no kernel for int8" in out
    assert "ms" not in row
    monkeypatch.setattr(energy, "rest", None)  # and a run that has nothing else to measure does not rest either
    assert run(energy.main, [*QUICK, "--results-file", "out"])[0] == 0


def test_more_variants_go_on_with_the_same_file(run):
    options = ["--estimate", "5,35", "--results-file", "out"]
    assert run(energy.main, [*QUICK[: -len(CHOSEN)], "--only", "ToMe r 8", *options])[0] == 0
    kept = rows()
    assert list(kept) == ["full", "ToMe r 8"]
    assert run(energy.main, [*QUICK[: -len(CHOSEN)], "--only", "ToMe r", *options])[0] == 0
    assert list(rows()) == ["full", "ToMe r 8", "ToMe r 13"]
    assert rows()["ToMe r 8"] == kept["ToMe r 8"]


def test_reports_are_written_whole(folder):
    """An interrupted write leaves the old state; the draft never bears the file's name."""
    header = {"hardware": "h", "sensors": ["package-0 (rapl)"], "arguments": {"batch_size": 1}}
    record = energy_record.Record([folder / "a.json", folder / "a.csv"], header)
    record.set_facts({"name": "full", "group": "full", "tokens": 9, "agreement": 1.0, "note": None})
    device = DeviceEnergy("package-0", "rapl", 2.0, 10, 6.0)
    record.add(record.windows, "full", 1, Energy(2.0, 10, (device,), 0.001))
    assert sorted(path.name for path in folder.glob("a.*")) == ["a.csv", "a.json"]
    again = energy_record.Record.open(record.paths, header, fresh=False)
    assert (again.windows, again.facts, again.session, again.done("full")) == (record.windows, record.facts, 2, 1)
    assert energy_record.Record.open(record.paths, header, fresh=True).windows == []
