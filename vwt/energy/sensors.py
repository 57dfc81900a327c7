"""Energy sensors: the counters of processors, GPUs and SoCs and, only on request, estimates.

A sensor measures one device over one window, and every device is counted once: the zones of cores and graphics are
parts of their package, the platform (psys) contains all of them, and neither is read. Memory (dram) is not part of a
package, and is read. A device that cannot be read stays in the list as `Missing`, with the reason, so that an
incomplete sum is not taken for the total.

Processors are read from the powercap files of Linux. zeus (extra `energy`) reads all other devices, and is imported
only here, when it is used.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from vwt.errors import ArgumentError, VWTError, first_line

# amdsmi is the counterpart of NVML for AMD's GPUs; soc are the meters of the whole chip on Apple silicon and Jetson.
Source = Literal["nvml", "amdsmi", "rapl", "soc", "estimated", "none"]


POWERCAP = Path("/sys/class/powercap")


RAPL_STEP = 1e-3  # seconds; Intel's manual: the counters are updated about once a millisecond


SLOW_STEP = 0.1  # seconds; NVML's counters move every 20 to 100 ms, those of the others about as fast


POLL = 1.0  # seconds between two readings of a counter at most, so that one that has stopped is noticed


STOPPED = 0.1  # seconds without a rise after which a counter has stopped: every device uses some energy


MAX_WATTS = 2000.0  # more than any processor package; bounds how soon a counter can wrap around


JOULES_PER_KWH = 3.6e6


class SensorError(VWTError):
    """The energy of a device in a window is unknown; the message is the reason."""


class Sensor:
    """The energy of one device over a window.

    `begin` and `end` may raise any exception: then the energy of that window is unknown, and the error is the reason.

    Args:
        name: of the device.
        source: of its figures.
        step: seconds between two updates of the sensor.
    """

    poll_every = math.inf  # seconds within which `poll` must be called again

    def __init__(self, name: str, source: Source, step: float) -> None:
        self.name, self.source, self.step = name, source, step

    def begin(self, idle: bool) -> None:
        """Begin a window; `idle` says that nothing will be computed in it, which only estimates need to know."""
        raise NotImplementedError

    def poll(self) -> None:
        """Read the counter during a window."""

    def end(self, seconds: float) -> float:
        """Joules since `begin`, that many seconds ago."""
        raise NotImplementedError


class Missing(Sensor):
    """A device that cannot be read.

    Args:
        name: of the device.
        reason: why, and what to do.
        source: of the sensor that cannot be read; "none" where there is no sensor.
    """

    def __init__(self, name: str, reason: str, source: Source = "none") -> None:
        super().__init__(name, source, 0.0)
        self.reason = reason

    def begin(self, idle: bool) -> None:
        """Nothing to begin."""

    def end(self, seconds: float) -> float:
        """Raise SensorError with the reason."""
        raise SensorError(self.reason)


class RaplZone(Sensor):
    """A package or its memory, from the files `energy_uj` and `max_energy_range_uj` of a powercap zone.

    The counter wraps around. Readings are so frequent (`poll_every`) that it wraps at most once in between.

    Args:
        folder: of the zone.
        name: of the device.
        clock: returns the time in seconds.

    Raises:
        SensorError: if a file cannot be read.
    """

    def __init__(self, folder: Path, name: str, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(name, "rapl", RAPL_STEP)
        self.file = folder / "energy_uj"
        self.range = _read_count(folder / "max_energy_range_uj")
        if self.range < 1:
            raise SensorError(f"{folder / 'max_energy_range_uj'} says {self.range}; expected microjoules above 0")
        self.poll_every = min(POLL, self.range / 1e6 / MAX_WATTS / 2)
        self._clock, self._lock = clock, threading.Lock()
        self._when, self._last, self._sum = clock(), _read_count(self.file), 0

    def begin(self, idle: bool) -> None:
        """Start from the counter's present value."""
        with self._lock:
            self._when, self._last, self._sum = self._clock(), _read_count(self.file), 0

    def poll(self) -> None:
        """Add what the counter rose since it was last read."""
        with self._lock:
            self._advance()

    def end(self, seconds: float) -> float:
        """Joules since `begin`; raises SensorError where they are not certain."""
        self.poll()
        return self._sum / 1e6

    def _advance(self) -> None:
        begun, count = self._clock(), _read_count(self.file)
        # From before one reading to after the next, so that a process that was suspended overestimates the gap.
        gap, rise = self._clock() - self._when, (count - self._last) % self.range
        if not rise and (gap >= STOPPED or not self._sum):
            raise SensorError(f"{self.file} did not rise in {gap:.3g} s; the sensor is not working")
        if gap * MAX_WATTS > self.range / 1e6:
            raise SensorError(f"{self.file} was not read for {gap:.3g} s, in which it may have wrapped more than once")
        if rise / 1e6 > MAX_WATTS * (gap + 10 * self.step):
            raise SensorError(f"{self.file} went from {self._last} to {count} in {gap:.3g} s; the counter was reset")
        self._last, self._when, self._sum = count, begun, self._sum + rise


def rapl_sensors(root: Path = POWERCAP) -> list[Sensor]:
    """Packages and their memory in a powercap folder, whether they can be read or not."""
    folders: dict[tuple[int, ...], Path] = {}  # zones can be found flat, nested, or, in sysfs, both
    for above in (root, root / "intel-rapl"):
        for folder in [*above.glob("intel-rapl:*"), *above.glob("intel-rapl:*/intel-rapl:*")]:
            parts = folder.name.split(":")[1:]
            if all(part.isdecimal() for part in parts):
                folders.setdefault(tuple(map(int, parts)), folder)
    found: list[Sensor] = []
    packages: dict[int, str] = {}
    for numbers, folder in sorted(folders.items()):
        try:
            kind = (folder / "name").read_text().strip()
        except (OSError, ValueError) as error:
            found.append(Missing(folder.name, _why(folder / "name", error), "rapl"))
            continue
        package = packages.setdefault(numbers[0], kind if len(numbers) == 1 else f"package-{numbers[0]}")
        if len(numbers) == 1 and kind.startswith("package"):
            found.append(_open_zone(folder, package))
        elif len(numbers) == 2 and kind == "dram":
            found.append(_open_zone(folder, f"{package} dram"))
    if found:
        return found
    what = f"no RAPL zones in {root}" if root.is_dir() else f"no {root}"
    return [Missing("processor", f"{what}; a Linux host with RAPL, not a virtual machine, has them")]


def _open_zone(folder: Path, name: str) -> Sensor:
    try:
        return RaplZone(folder, name)
    except SensorError as error:
        return Missing(name, str(error), "rapl")


def _read_count(path: Path) -> int:
    """An integer from a file; raises SensorError if it cannot be read."""
    try:
        return int(path.read_text())
    except (OSError, ValueError) as error:
        raise SensorError(_why(path, error)) from error


def _why(path: Path, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return f"no permission to read {path}; allow it, until the next boot, with: sudo chmod a+r {path}"
    return f"cannot read {path}: {getattr(error, 'strerror', None) or first_line(error)}"


class ZeusSensor(Sensor):
    """A device that zeus reads.

    Args:
        name: of the device.
        source: where zeus reads it.
        monitor: a ZeusMonitor, or what behaves like it, of this device.
        joules: energy in joules of a zeus Measurement.
        step: seconds between two updates of the sensor.
    """

    def __init__(
        self, name: str, source: Source, monitor: Any, joules: Callable[[Any], float], step: float = SLOW_STEP
    ) -> None:
        super().__init__(name, source, step)
        self.monitor, self.joules = monitor, joules

    def begin(self, idle: bool) -> None:
        """Begin a window of zeus; the caller synchronises the GPU."""
        self.monitor.begin_window(self.name, sync_execution=False, restart=True)

    def end(self, seconds: float) -> float:
        """End it."""
        joules = self.joules(self.monitor.end_window(self.name, sync_execution=False))
        if not joules > 0:
            raise SensorError(f"its counter did not rise in {seconds:.3g} s; the sensor is not working")
        return joules


def zeus_sensors(gpus: Sequence[int] | None = None) -> list[Sensor]:
    """GPUs, all or those of some indices (as in torch), and the SoC, as far as zeus finds them."""
    try:
        from zeus.device import get_gpus, get_soc
        from zeus.device.gpu import AMDGPUs
        from zeus.monitor import ZeusMonitor
    except ImportError:
        return [Missing("GPU, SoC", "zeus, which reads them, is not installed; pip install 'vwt[energy]'")]

    found: list[Sensor] = []
    # zeus and the vendors' libraries below it have no common exception, and none of them may stop a measurement.
    try:
        devices = get_gpus() if gpus is None or gpus else ()
        source: Source = "amdsmi" if isinstance(devices, AMDGPUs) else "nvml"
        for index in range(len(devices)) if gpus is None else gpus:
            if index >= len(devices):
                raise SensorError(f"zeus knows {len(devices)} GPUs, and none of number {index}")
            monitor = ZeusMonitor(gpu_indices=[index], cpu_indices=[])
            found.append(ZeusSensor(f"GPU {index}", source, monitor, gpu_joules))
    except Exception as error:
        found.append(Missing("GPU", f"zeus finds none that it can read: {first_line(error)}"))
    try:
        get_soc()
        found.append(ZeusSensor("SoC", "soc", ZeusMonitor(gpu_indices=[], cpu_indices=[]), soc_joules))
    except Exception as error:
        found.append(Missing("SoC", f"zeus finds none that it can read: {first_line(error)}"))
    return found


def zeus_processors() -> list[Sensor]:
    """Packages with their memory, as zeus reads them: through its daemon, or from the host's files in a container."""
    try:
        from zeus.device import get_cpus
        from zeus.monitor import ZeusMonitor

        count = len(get_cpus())
    except Exception:  # of any library; the powercap files' own reasons say more
        return []
    return [
        ZeusSensor(f"package-{i}", "rapl", ZeusMonitor(gpu_indices=[], cpu_indices=[i]), processor_joules, RAPL_STEP)
        for i in range(count)
    ]


def gpu_joules(measurement: Any) -> float:
    """Joules of the GPUs of a zeus Measurement."""
    return float(sum(measurement.gpu_energy.values()))


def soc_joules(measurement: Any) -> float:
    """Joules of a whole SoC from a zeus Measurement; raises SensorError where it has none.

    The figures of cores and clusters are parts of the total of the processor.
    """
    parts = vars(measurement.soc_energy)
    if parts.get("total_energy_mj") is not None:
        return float(parts["total_energy_mj"]) / 1e3
    names = ("cpu_total_mj", "cpu_energy_mj", "gpu_mj", "gpu_energy_mj", "gpu_sram_mj", "dram_mj", "ane_mj")
    known = [parts[name] for name in names if parts.get(name) is not None]
    if not known:
        raise SensorError("the SoC gave no joules")
    return float(sum(known)) / 1e3


def processor_joules(measurement: Any) -> float:
    """Joules of a zeus Measurement's packages and their memory; raises SensorError where it has none."""
    if not measurement.cpu_energy:
        raise SensorError("zeus gave no joules of the package")
    return float(sum(measurement.cpu_energy.values()) + sum((measurement.dram_energy or {}).values()))


def find_sensors(powercap: Path = POWERCAP, gpus: Sequence[int] | None = None) -> list[Sensor]:
    """Every device that could have a sensor; those that cannot be read are `Missing`.

    Args:
        powercap: folder of the processors' counters.
        gpus: numbers of GPUs, as torch counts them; None for all.

    Raises:
        ArgumentError: if `powercap` is another folder than the system's, and does not exist.
    """
    if powercap != POWERCAP and not powercap.is_dir():
        raise ArgumentError(f"no folder {powercap}; expected one with RAPL zones (intel-rapl:0), such as {POWERCAP}")
    processors = rapl_sensors(powercap)
    if powercap == POWERCAP and all(isinstance(sensor, Missing) for sensor in processors):
        processors = zeus_processors() or processors
    return [*processors, *zeus_sensors(gpus)]


class GivenWatts(Sensor):
    """An estimate: given power in watts times seconds.

    Args:
        idle: watts while nothing is computed.
        busy: watts under load.

    Raises:
        ArgumentError: unless 0 <= idle <= busy, and busy is above 0.
    """

    def __init__(self, idle: float, busy: float) -> None:
        super().__init__("machine", "estimated", 0.0)
        if not 0 <= idle <= busy or not 0 < busy < math.inf:
            raise ArgumentError(f"idle is {idle:g} W and busy {busy:g} W; expected 0 <= idle <= busy, busy above 0")
        self.idle, self.busy = idle, busy
        self._watts = busy

    def begin(self, idle: bool) -> None:
        """Select the power of this window."""
        self._watts = self.idle if idle else self.busy

    def end(self, seconds: float) -> float:
        """Watts times seconds."""
        return self._watts * seconds


class CodeCarbon(Sensor):
    """An estimate: that of codecarbon, from the processor's load and the size of the memory.

    Raises:
        ArgumentError: if codecarbon is not installed.
    """

    def __init__(self) -> None:
        super().__init__("machine", "estimated", SLOW_STEP)
        self._running = False
        with _silence():
            try:
                from codecarbon import OfflineEmissionsTracker
            except ImportError as error:
                raise ArgumentError("codecarbon is not installed; pip install 'vwt[codecarbon]'") from error
            # The country affects CO2 only, not energy; given one, codecarbon does not ask the network.
            self._tracker = OfflineEmissionsTracker(
                country_iso_code="USA", output_methods=[], log_level="critical", allow_multiple_runs=True
            )
            self.begin(idle=True)  # looks at the hardware, which takes a second
            self.end(0.0)

    def begin(self, idle: bool) -> None:
        """Begin a task of codecarbon."""
        if self._running:
            self._tracker.stop_task()
        self._tracker.start_task()
        self._running = True

    def end(self, seconds: float) -> float:
        """End it."""
        self._running = False
        return float(self._tracker.stop_task().energy_consumed) * JOULES_PER_KWH


@contextmanager
def _silence() -> Iterator[None]:
    """Suppress the messages of codecarbon and amdsmi about missing GPUs."""
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def estimator(text: str) -> Sensor:
    """The sensor of an estimate, `IDLE,BUSY` (watts) or `codecarbon`.

    Raises:
        ArgumentError: for any other text, or without codecarbon.
    """
    if text == "codecarbon":
        return CodeCarbon()
    try:
        idle, busy = map(float, text.split(","))
    except ValueError:
        raise ArgumentError(
            f"an estimate needs watts, got {text!r}; expected IDLE,BUSY (as in 5,35) or codecarbon"
        ) from None
    return GivenWatts(idle, busy)
