"""Joules, watts and seconds of windows: arithmetic of known answers, the meter, and `vwt env`."""

import math
import os
import time

import numpy as np
import pytest

from vwt import cli
from vwt.energy import meter as energy
from vwt.energy.meter import DeviceEnergy, Energy, EnergyMeter
from vwt.energy.sensors import GivenWatts, Missing, RaplZone, Sensor
from vwt.errors import ArgumentError

RANGE = 262_143_328_850  # microjoules, as a server's package has it


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def write_zone(folder, name, count, span=RANGE):
    """A zone of the tree; an update, like the kernel's, is never seen half."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in {"name": name, "max_energy_range_uj": span, "energy_uj": count}.items():
        (folder / "new").write_text(f"{text}\n")
        os.replace(folder / "new", folder / file)


def open_zone(folder, name, clock):
    """A zone on a fake clock, which the meter's thread, on the real one, leaves alone."""
    zone = RaplZone(folder, name, clock)
    zone.poll_every = math.inf
    return zone


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def zone(tmp_path, clock):
    """A zone and its folder."""
    folder = tmp_path / "intel-rapl:0"
    write_zone(folder, "package-0", 5_000_000)
    return open_zone(folder, "package-0", clock), folder


def make_tree(root, nested=True):
    """Two packages with memory, cores and graphics, the platform, and the same package through another interface."""
    zones = {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "uncore",
        "intel-rapl:0:2": "dram",
        "intel-rapl:1": "package-1",
        "intel-rapl:1:0": "dram",
        "intel-rapl:2": "psys",
        "intel-rapl-mmio:0": "package-0",
    }
    for index, (folder, name) in enumerate(zones.items()):
        above = folder.rpartition(":")[0] if nested and folder.count(":") == 2 else ""
        write_zone(root / above / folder, name, 1000 * index)


def window(meter, clock, seconds, between=lambda: None, images=0):
    """What a meter says of a window on a fake clock."""
    meter.begin()
    between()
    clock.now += seconds
    return meter.end(images)


def wait_for(condition):
    """Wait until a thread has done something, five seconds at most."""
    until = time.perf_counter() + 5
    while not condition() and time.perf_counter() < until:
        time.sleep(0.001)
    assert condition()


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_watts_times_seconds_are_joules():
    device = DeviceEnergy("package-0", "rapl", 4.0, 50, 60.0)
    assert (device.watts, device.joules_per_image) == (15.0, 1.2)
    assert device.watts * device.seconds == device.joules
    assert DeviceEnergy("package-0", "rapl", 4.0, 0, 60.0).joules_per_image is None
    lost = DeviceEnergy("package-0", "rapl", 4.0, 50, None, "gone")
    assert (lost.watts, lost.joules_per_image) == (None, None)


def test_total_is_the_sum_or_nothing():
    one, two = DeviceEnergy("a", "rapl", 2.0, 10, 3.0), DeviceEnergy("b", "nvml", 2.0, 10, 5.0)
    none = DeviceEnergy("c", "none", 2.0, 10, None, "no sensor")
    lost = DeviceEnergy("d", "rapl", 2.0, 10, None, "gone")

    total = Energy(2.0, 10, (one, two, none), 0.0).total
    assert (total.joules, total.watts, total.joules_per_image) == (8.0, 4.0, 0.8)
    assert (total.source, total.reason) == ("nvml+rapl", None)
    total = Energy(2.0, 10, (one, two, lost), 0.0).total
    assert (total.joules, total.source, total.reason) == (None, "nvml+rapl", "d: gone")
    total = Energy(2.0, 10, (none,), 0.0).total
    assert (total.joules, total.source, total.reason) == (None, "none", "c: no sensor")
    assert Energy(2.0, 10, (), 0.0).total.reason == "no sensors"


def test_the_meter_counts_its_own_cost(clock):
    class Slow(GivenWatts):
        def begin(self, idle):
            clock.now += 0.25

        def end(self, seconds):
            clock.now += 0.5
            return super().end(seconds)

    found = window(EnergyMeter([Slow(1, 2)], clock), clock, 3.0)
    assert (found.seconds, found.cost, found.total.joules) == (3.0, 0.75, 6.0)


def test_a_replayed_series_is_exact(tmp_path, clock):
    """Two packages of random power over 200 windows, of which several wrap."""
    rng = np.random.default_rng(0)
    span = 300_000_000
    for number in (0, 1):
        write_zone(tmp_path / f"intel-rapl:{number}", f"package-{number}", 0, span)
    zones = [open_zone(tmp_path / f"intel-rapl:{number}", f"package-{number}", clock) for number in (0, 1)]
    meter, counts, wraps = EnergyMeter(zones, clock), [0, 0], 0
    for seconds in rng.uniform(0.02, 0.14, 200):
        rises = (rng.uniform(5, 1500, 2) * seconds * 1e6).astype(int)
        before = list(counts)

        def go_on(rises=rises):
            for number in (0, 1):
                counts[number] = (counts[number] + int(rises[number])) % span
                (tmp_path / f"intel-rapl:{number}" / "energy_uj").write_text(str(counts[number]))

        found = window(meter, clock, seconds, go_on, images=7)
        wraps += sum(now < then for now, then in zip(counts, before, strict=True))
        assert found.total.joules == pytest.approx(rises.sum() / 1e6, rel=1e-9)
        assert found.total.watts == pytest.approx(rises.sum() / 1e6 / seconds, rel=1e-9)
        assert [device.joules for device in found.devices] == pytest.approx(rises / 1e6, rel=1e-9)
    assert wraps > 20


# -- the meter ---------------------------------------------------------------------------------------------------------


def test_too_short_a_window_is_refused(zone, clock):
    meter = EnergyMeter([zone[0], GivenWatts(1, 2)], clock)
    assert meter.shortest == pytest.approx(0.01)
    meter.check(0.01)
    with pytest.raises(
        ArgumentError, match=r"0.004 s is too short: .* package-0 \(rapl\) moves every 0.001 s; .*0.01 s"
    ):
        window(meter, clock, 0.004)
    with pytest.raises(ArgumentError, match="call begin"):
        meter.end()


def test_a_dropped_window_leaves_nothing_behind(zone, clock):
    rapl, folder = zone
    meter = EnergyMeter([rapl], clock)
    meter.begin()
    clock.now += 50
    write_zone(folder, "package-0", 105_000_000)
    found = window(meter, clock, 1.0, lambda: write_zone(folder, "package-0", 108_000_000))
    assert (found.seconds, found.total.joules) == (1.0, 3.0)


def test_interrupts_pass_through(clock):
    class Interrupted(Sensor):
        def begin(self, idle):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EnergyMeter([Interrupted("a", "rapl", 0.0)], clock).begin()


def test_senses(zone):
    assert EnergyMeter([zone[0], Missing("GPU", "none")]).senses
    assert not EnergyMeter([Missing("GPU", "none")]).senses
    assert not EnergyMeter([]).senses


def test_polling_survives_errors_and_ends_with_the_window(clock):
    class Polled(GivenWatts):
        poll_every, polls = 0.001, 0

        def poll(self):
            self.polls += 1
            clock.now += 0.125
            raise OSError("gone for a moment")

    sensor = Polled(1, 2)
    meter = EnergyMeter([sensor], clock)
    meter.begin()
    wait_for(lambda: sensor.polls >= 3)
    found = meter.end()
    polls = sensor.polls
    assert found.cost == 0.125 * polls
    time.sleep(0.01)
    assert sensor.polls == polls


# -- vwt env -----------------------------------------------------------------------------------------------------------


def test_env(tmp_path, capsys):
    make_tree(tmp_path)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert cli.main(["env", "--powercap", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "device    cpu: " in out
    assert "threads on" in out
    assert "sensor    package-0: usable (rapl)" in out
    assert f"sensor    package-1: not usable: cannot read {tmp_path}" in out
    assert "version   torch " in out
    assert cli.main(["env", "--powercap", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_env_names_the_extra_of_what_is_missing(monkeypatch):
    def version(name):
        if name == "zeus":
            raise energy.PackageNotFoundError(name)
        return "9.9"

    monkeypatch.setattr(energy, "version", version)
    report = energy.environment_report()
    assert "version   zeus not installed; pip install 'vwt[energy]'" in report
    assert "version   torch 9.9" in report
