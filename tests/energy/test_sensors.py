"""Where joules come from: fake powercap trees, zeus's replay monitor, a fake NVML below zeus, estimates."""

import builtins
import importlib.util
import os
import shutil
import stat
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.energy.test_meter import RANGE, Clock, make_tree, open_zone, wait_for, window, write_zone
from vwt.energy import sensors
from vwt.energy.meter import EnergyMeter
from vwt.energy.sensors import CodeCarbon, Missing, RaplZone, ZeusSensor, estimator, find_sensors
from vwt.errors import ArgumentError


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def zone(tmp_path, clock):
    """A zone and its folder."""
    folder = tmp_path / "intel-rapl:0"
    write_zone(folder, "package-0", 5_000_000)
    return open_zone(folder, "package-0", clock), folder


# -- powercap ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nested", "flat", "control type", "sysfs"])
def test_every_device_is_counted_once(tmp_path, layout):
    root = tmp_path / "powercap"
    make_tree(root / "intel-rapl" if layout == "control type" else root, nested=layout != "flat")
    if layout == "sysfs":  # every zone is there twice, below its package and beside it
        for sub in list(root.glob("*/intel-rapl:*")):
            (root / sub.name).symlink_to(sub)
    names = [sensor.name for sensor in sensors.rapl_sensors(root)]
    assert names == ["package-0", "package-0 dram", "package-1", "package-1 dram"]


def test_two_packages_and_their_memory(tmp_path):
    make_tree(tmp_path)
    meter = EnergyMeter(sensors.rapl_sensors(tmp_path))
    meter.begin()
    rises = {"intel-rapl:0": 2.0, "intel-rapl:0/intel-rapl:0:0": 1.5, "intel-rapl:0/intel-rapl:0:2": 0.5}
    rises |= {"intel-rapl:1": 1.0, "intel-rapl:1/intel-rapl:1:0": 0.25, "intel-rapl:2": 9.0, "intel-rapl-mmio:0": 2.0}
    for folder, joules in rises.items():
        file = tmp_path / folder / "energy_uj"
        file.write_text(f"{int(file.read_text()) + int(1e6 * joules)}\n")
    time.sleep(0.02)
    found = meter.end(images=10)
    assert {d.device: d.joules for d in found.devices} == {
        "package-0": 2.0,
        "package-0 dram": 0.5,
        "package-1": 1.0,
        "package-1 dram": 0.25,
    }
    assert (found.total.joules, found.total.joules_per_image, found.total.source) == (3.75, 0.375, "rapl")
    assert found.total.watts == pytest.approx(3.75 / found.seconds)


def test_wrap_around(zone, clock):
    rapl, folder = zone
    write_zone(folder, "package-0", RANGE - 30_000_000)
    found = window(EnergyMeter([rapl], clock), clock, 2.0, lambda: write_zone(folder, "package-0", 20_000_000))
    assert found.total.joules == 50.0


def test_a_window_of_several_wraps(tmp_path, clock):
    """A range of 60 J wraps five times in 300 J; the meter looks often enough to see it."""
    folder, span = tmp_path / "intel-rapl:0", 60_000_000
    write_zone(folder, "package-0", 50_000_000, span)
    rapl = RaplZone(folder, "package-0", clock)
    assert rapl.poll_every == pytest.approx(0.015)  # half of what 2000 W need for 60 J
    meter = EnergyMeter([rapl], clock)
    meter.begin()
    for step in range(1, 13):
        write_zone(folder, "package-0", (50_000_000 + 25_000_000 * step) % span, span)
        clock.now += 0.02
        wait_for(lambda: rapl._when == clock.now)
    assert meter.end().total.joules == 300.0


def test_polls_that_come_between_lose_nothing(zone, clock):
    rapl, folder = zone

    def go_on():
        for count in (RANGE - 1_000_000, 90_000_000, 180_000_000):
            clock.now += 130.0  # 131 s is the most
            write_zone(folder, "package-0", count)
            rapl.poll()
        write_zone(folder, "package-0", 190_000_000)

    write_zone(folder, "package-0", RANGE - 200_000_000)
    found = window(EnergyMeter([rapl], clock), clock, 1.0, go_on)
    assert found.total.joules == pytest.approx(199 + 91 + 90 + 10)


def test_a_window_that_may_have_wrapped_twice_has_no_joules(zone, clock):
    rapl, folder = zone
    found = window(EnergyMeter([rapl], clock), clock, 140.0, lambda: write_zone(folder, "package-0", 6_000_000))
    assert found.total.joules is None
    assert "was not read for 140 s, in which it may have wrapped more than once" in found.total.reason


def test_a_counter_that_was_reset_has_no_joules(zone, clock):
    rapl, folder = zone
    found = window(EnergyMeter([rapl], clock), clock, 2.0, lambda: write_zone(folder, "package-0", 1000))
    assert found.total.joules is None
    assert "went from 5000000 to 1000 in 2 s; the counter was reset" in found.total.reason


def test_a_process_that_is_kept_waiting_is_no_reset(zone, clock, monkeypatch):
    """30 s between reading a counter and the clock; the 1200 J of these are not taken for a jump."""
    rapl, folder = zone
    read = sensors._read_count

    def wait(path):
        count = read(path)
        clock.now += 30.0
        return count

    monkeypatch.setattr(sensors, "_read_count", wait)
    found = window(EnergyMeter([rapl], clock), clock, 1.0, lambda: write_zone(folder, "package-0", 1_205_000_000))
    assert found.total.joules == 1200.0


def test_a_counter_that_stands_still_has_no_joules(zone, clock):
    found = window(EnergyMeter([zone[0]], clock), clock, 2.0)
    assert found.total.joules is None
    assert "did not rise in 2 s" in found.total.reason


def test_a_counter_that_stops_midway_has_no_joules(zone, clock):
    """5 J of the first second are not the joules of two."""
    rapl, folder = zone

    def go_on():
        clock.now += 1.0
        write_zone(folder, "package-0", 10_000_000)
        rapl.poll()

    found = window(EnergyMeter([rapl], clock), clock, 1.0, go_on)
    assert found.total.joules is None
    assert "did not rise in 1 s" in found.total.reason


@pytest.mark.parametrize("damage", ["removed", "emptied", "text", "directory"])
def test_a_sensor_that_vanishes_midway(tmp_path, clock, damage):
    folders = [tmp_path / f"intel-rapl:{number}" for number in (0, 1)]
    for number, folder in enumerate(folders):
        write_zone(folder, f"package-{number}", 0)
    zones = [open_zone(folder, f"package-{number}", clock) for number, folder in enumerate(folders)]
    meter = EnergyMeter(zones, clock)

    def go_on():
        write_zone(folders[0], "package-0", 7_000_000)
        file = folders[1] / "energy_uj"
        file.unlink()
        if damage == "directory":
            file.mkdir()
        elif damage != "removed":
            file.write_text({"emptied": "", "text": "none\n"}[damage])

    found = window(meter, clock, 1.0, go_on)
    kept, lost = found.devices
    assert (kept.joules, lost.joules) == (7.0, None)
    assert f"cannot read {folders[1] / 'energy_uj'}" in lost.reason
    assert found.total.joules is None  # 7 J are not the total
    assert found.total.reason == f"package-1: {lost.reason}"

    assert window(meter, clock, 1.0).devices[1].joules is None  # nor is it there when the next window begins
    shutil.rmtree(folders[1])
    write_zone(folders[1], "package-1", 0)
    found = window(meter, clock, 1.0, lambda: [write_zone(f, "package", 9_000_000) for f in folders])
    assert found.total.joules == 2.0 + 9.0


def test_no_permission_names_the_file_and_the_way_out(monkeypatch):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        make_tree(root)
        locked = root / "intel-rapl:1" / "energy_uj"
        locked.chmod(stat.S_IWUSR)
        if os.geteuid() == 0:  # whom no file refuses
            os.seteuid(65534)
            try:
                found = sensors.rapl_sensors(root)
            finally:
                os.seteuid(0)
        else:
            found = sensors.rapl_sensors(root)
        assert [sensor.name for sensor in found if isinstance(sensor, Missing)] == ["package-1"]
        assert found[2].source == "rapl"
        assert found[2].reason.startswith(f"no permission to read {locked}; allow it")
        assert found[2].reason.endswith(f"sudo chmod a+r {locked}")
        meter = EnergyMeter(found)
        meter.begin()
        time.sleep(0.02)
        assert meter.end().total.joules is None  # package-0 alone is not the total


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("max_energy_range_uj", None, "cannot read .*max_energy_range_uj: No such file"),
        ("max_energy_range_uj", "0", "says 0; expected microjoules above 0"),
        ("energy_uj", "", "cannot read .*energy_uj"),
        ("name", None, "cannot read .*name: No such file"),
    ],
)
def test_damaged_zones(tmp_path, file, text, reason):
    write_zone(tmp_path / "intel-rapl:0", "package-0", 1)
    (tmp_path / "intel-rapl:0" / file).unlink()
    if text is not None:
        (tmp_path / "intel-rapl:0" / file).write_text(text)
    (sensor,) = sensors.rapl_sensors(tmp_path)
    assert (sensor.source, isinstance(sensor, Missing)) == ("rapl", True)
    with pytest.raises(sensors.SensorError, match=reason):
        sensor.end(1.0)


def test_no_powercap(tmp_path):
    (sensor,) = sensors.rapl_sensors(tmp_path)
    assert (sensor.source, sensor.reason.startswith(f"no RAPL zones in {tmp_path}")) == ("none", True)
    (sensor,) = sensors.rapl_sensors(tmp_path / "nowhere")
    assert sensor.reason.startswith(f"no {tmp_path / 'nowhere'}")
    with pytest.raises(ArgumentError, match=r"no folder .*nowhere; expected one with RAPL zones"):
        find_sensors(tmp_path / "nowhere")


# -- estimates ---------------------------------------------------------------------------------------------------------


def test_given_watts(clock):
    meter = EnergyMeter([estimator("5,35")], clock)
    meter.begin(idle=True)
    clock.now += 3
    idle = meter.end().total
    assert (idle.joules, idle.watts, idle.source) == (15.0, 5.0, "estimated")
    busy = window(meter, clock, 3.0, images=70).total
    assert (busy.joules, busy.watts, busy.joules_per_image) == (105.0, 35.0, 1.5)


@pytest.mark.parametrize("text", ["", "5", "5,", "5,35,7", "5 35", "a,b", "35,5", "-1,5", "0,0", "nan,5", "1,inf"])
def test_estimates_need_watts(text):
    with pytest.raises(ArgumentError, match=r"expected (IDLE,BUSY|0 <= idle <= busy)"):
        estimator(text)


def test_codecarbon_of_known_answers(monkeypatch, clock):
    """Kilowatt-hours become joules; a window that was dropped is ended first."""

    class Tracker:
        def __init__(self, **options):
            self.running = False
            assert options["output_methods"] == []

        def start_task(self):
            assert not self.running
            self.running = True

        def stop_task(self):
            self.running = False
            return SimpleNamespace(energy_consumed=2e-6)

    monkeypatch.setitem(sys.modules, "codecarbon", SimpleNamespace(OfflineEmissionsTracker=Tracker))
    meter = EnergyMeter([estimator("codecarbon")], clock)
    meter.begin()
    total = window(meter, clock, 2.0).total
    assert (total.joules, total.source) == (pytest.approx(7.2), "estimated")


def test_codecarbon_itself(capfd):
    if importlib.util.find_spec("codecarbon") is None:  # importing it here would print what is not to be printed
        pytest.skip("codecarbon is not installed")
    sensor = CodeCarbon()
    sensor.begin(idle=False)
    time.sleep(0.1)
    assert 0.1 < sensor.end(0.1) < 1000
    assert capfd.readouterr() == ("", "")


def test_without_codecarbon(monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(ArgumentError, match=r"codecarbon is not installed; pip install 'vwt\[codecarbon\]'"):
        estimator("codecarbon")


# -- zeus --------------------------------------------------------------------------------------------------------------


def test_without_zeus(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "zeus"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "zeus", None)
    make_tree(tmp_path)
    found = find_sensors(tmp_path)
    assert [type(sensor) for sensor in found] == [RaplZone] * 4 + [Missing]
    assert "pip install 'vwt[energy]'" in found[-1].reason
    assert sensors.zeus_processors() == []


def test_zeus_is_imported_only_when_used(monkeypatch):
    asked = []
    real = builtins.__import__

    def note(name, *rest):
        asked.append(name.partition(".")[0])
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", note)
    EnergyMeter([estimator("5,35"), *sensors.rapl_sensors()]).begin()
    assert "zeus" not in asked
    assert "codecarbon" not in asked


def test_replay_of_zeus(tmp_path, clock):
    """The series that a ZeusMonitor recorded, through zeus's own replay."""
    testing = pytest.importorskip("zeus.utils.testing")
    rng = np.random.default_rng(1)
    series = [(float(s), float(s * w)) for s, w in zip(rng.uniform(2, 9, 200), rng.uniform(40, 700, 200), strict=True)]
    lines = [f"0.0,GPU 0,{seconds!r},{joules!r}" for seconds, joules in series]
    (tmp_path / "log.csv").write_text("\n".join(["start_time,window_name,elapsed_time,gpu0_energy", *lines]) + "\n")
    monitor = testing.ReplayZeusMonitor(log_file=tmp_path / "log.csv", ignore_sync_execution=True)
    meter = EnergyMeter([ZeusSensor("GPU 0", "nvml", monitor, sensors.gpu_joules)], clock)
    for seconds, joules in series:
        total = window(meter, clock, seconds, images=64).total
        assert total.source == "nvml"
        assert total.joules == pytest.approx(joules, rel=1e-3)
        assert total.watts == pytest.approx(joules / seconds, rel=1e-3)
        assert total.joules_per_image == pytest.approx(joules / 64, rel=1e-3)
    lost = window(meter, clock, 5.0).total  # the log has ended
    assert (lost.joules, lost.reason) == (None, "GPU 0: No more lines in the log file.")
    with pytest.raises(ArgumentError, match="measure at least 1 s"):
        window(meter, clock, 0.5)


class FakeNVML:
    """Two GPUs of 300 and 100 W, as pynvml shows them; a lost one raises."""

    def __init__(self, clock, pynvml):
        self.clock, self.pynvml, self.lost = clock, pynvml, set()

    def joules(self, handle):
        if handle in self.lost:
            raise self.pynvml.NVMLError(self.pynvml.NVML_ERROR_GPU_IS_LOST)
        return int((300, 100)[handle] * 1e3 * self.clock.now)

    def unsupported(self, handle):
        raise self.pynvml.NVMLError(self.pynvml.NVML_ERROR_NOT_SUPPORTED)


@pytest.fixture
def nvml(monkeypatch, clock):
    """A fake NVML below the real zeus."""
    pynvml = pytest.importorskip("pynvml")
    pytest.importorskip("zeus")
    from zeus.device import gpu as zeus_gpu

    fake = FakeNVML(clock, pynvml)
    calls = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetArchitecture": lambda handle: pynvml.NVML_DEVICE_ARCH_HOPPER,
        "nvmlDeviceGetC2cModeInfoV": fake.unsupported,
        "nvmlDeviceGetTotalEnergyConsumption": fake.joules,
    }
    for name, call in calls.items():
        monkeypatch.setattr(pynvml, name, call)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(zeus_gpu, "_gpus", None)
    zeus_gpu.nvml_is_available.cache_clear()
    yield fake
    zeus_gpu.nvml_is_available.cache_clear()


def test_nvml(nvml, clock, tmp_path):
    make_tree(tmp_path)
    found = [sensor for sensor in find_sensors(tmp_path) if sensor.source == "nvml"]
    assert [sensor.name for sensor in found] == ["GPU 0", "GPU 1"]
    measured = window(EnergyMeter(found, clock), clock, 2.5, images=100)
    assert [device.joules for device in measured.devices] == pytest.approx([750.0, 250.0], rel=1e-3)
    assert measured.total.joules_per_image == pytest.approx(10.0, rel=1e-3)
    assert [s.name for s in sensors.zeus_sensors([1]) if s.source == "nvml"] == ["GPU 1"]
    assert "zeus knows 2 GPUs, and none of number 2" in sensors.zeus_sensors([2])[0].reason
    assert "GPU" not in [sensor.name for sensor in sensors.zeus_sensors([])]


def test_a_gpu_that_is_lost_midway(nvml, clock):
    meter = EnergyMeter([s for s in sensors.zeus_sensors() if s.source == "nvml"], clock)
    found = window(meter, clock, 2.0, lambda: nvml.lost.add(1))
    assert [device.joules for device in found.devices] == [pytest.approx(600.0), None]
    assert found.total.joules is None
    assert found.total.reason.startswith("GPU 1: ")
    assert "lost" in found.total.reason.lower()
    nvml.lost.clear()
    assert window(meter, clock, 2.0).total.joules == pytest.approx(800.0)


def test_socs_count_no_part_twice():
    pytest.importorskip("zeus")
    from zeus.device.soc.apple import AppleSiliconMeasurement
    from zeus.device.soc.jetson import JetsonMeasurement

    apple = AppleSiliconMeasurement(
        cpu_total_mj=5000, efficiency_cores_mj=[1000, 1000], performance_cluster_mj=[3000], dram_mj=500, gpu_mj=2000,
        gpu_sram_mj=20, ane_mj=4,
    )  # fmt: skip
    jetson = JetsonMeasurement(cpu_energy_mj=1500.0, gpu_energy_mj=2500.0)
    assert sensors.soc_joules(SimpleNamespace(soc_energy=apple)) == pytest.approx(7.524)
    assert sensors.soc_joules(SimpleNamespace(soc_energy=jetson)) == pytest.approx(4.0)
    jetson.total_energy_mj = 6000.0
    assert sensors.soc_joules(SimpleNamespace(soc_energy=jetson)) == pytest.approx(6.0)
    with pytest.raises(sensors.SensorError, match="gave no joules"):
        sensors.soc_joules(SimpleNamespace(soc_energy=AppleSiliconMeasurement()))


def test_processors_through_zeus(monkeypatch, clock):
    """Where the files cannot be read, zeus's daemon may."""
    pytest.importorskip("zeus")
    import zeus.device
    import zeus.monitor

    class Monitor:
        def __init__(self, gpu_indices, cpu_indices):
            self.index = cpu_indices[0] if cpu_indices else None

        def begin_window(self, *rest, **options):
            pass

        def end_window(self, *rest, **options):
            return zeus.monitor.Measurement(2.0, {}, {self.index: 30.0 + self.index}, {self.index: 4.0})

    monkeypatch.setattr(zeus.device, "get_cpus", lambda: [object(), object()])
    monkeypatch.setattr(zeus.monitor, "ZeusMonitor", Monitor)
    monkeypatch.setattr(sensors, "POWERCAP", Path("/nowhere"))
    found = find_sensors(Path("/nowhere"), gpus=[])
    assert [(s.name, s.source) for s in found[:2]] == [("package-0", "rapl"), ("package-1", "rapl")]
    assert window(EnergyMeter(found, clock), clock, 2.0).total.joules == 34.0 + 35.0
    with pytest.raises(sensors.SensorError):
        sensors.processor_joules(zeus.monitor.Measurement(2.0, {}))
