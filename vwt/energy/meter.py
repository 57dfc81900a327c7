"""Energy and mean power of each device over a measurement window, with the source of each figure.

Energy is measured (see `vwt.energy.sensors`) or None; estimates are made only on request, and are labelled.

>>> meter = EnergyMeter(find_sensors())  # doctest: +SKIP
>>> meter.begin()  # doctest: +SKIP
>>> work()  # doctest: +SKIP
>>> meter.end(images=1000).total.joules_per_image  # doctest: +SKIP
"""

import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from vwt.energy.sensors import POWERCAP, Missing, Sensor, find_sensors
from vwt.errors import ArgumentError, first_line
from vwt.measure.environment import cpu_model

STEPS = 10  # updates of the slowest sensor in the shortest window: the error at each end is one update


@dataclass(frozen=True)
class DeviceEnergy:
    """Energy of one device, or of all together, in a window.

    Attributes:
        device: its name.
        source: of the figure, see `vwt.energy.sensors.Source`; of several devices, joined by "+".
        seconds: length of the window.
        images: processed in it.
        joules: energy used; None where it is unknown.
        reason: why it is unknown.
    """

    device: str
    source: str
    seconds: float
    images: int
    joules: float | None
    reason: str | None = None

    @property
    def watts(self) -> float | None:
        """Mean power in watts, or None."""
        return None if self.joules is None else self.joules / self.seconds

    @property
    def joules_per_image(self) -> float | None:
        """Joules an image; None where the energy is unknown or there were no images."""
        return None if self.joules is None or not self.images else self.joules / self.images


@dataclass(frozen=True)
class Energy:
    """Energy of all devices in a window.

    Attributes:
        seconds: length of the window.
        images: processed in it.
        devices: one entry a device.
        cost: overhead of the meter in seconds: reading the sensors at both ends and in between.
    """

    seconds: float
    images: int
    devices: tuple[DeviceEnergy, ...]
    cost: float

    @property
    def total(self) -> DeviceEnergy:
        """The sum over all devices that have a sensor; its joules are None where one of those gave no figure."""
        sensed = [device for device in self.devices if device.source != "none"]
        silent = [device for device in sensed or self.devices if device.joules is None]
        joules = None if silent or not sensed else sum(device.joules or 0.0 for device in sensed)
        reason = "; ".join(f"{device.device}: {device.reason}" for device in silent) or None
        if not self.devices:
            reason = "no sensors"
        source = "+".join(sorted({device.source for device in sensed if device.joules is not None})) or "none"
        return DeviceEnergy("total", source, self.seconds, self.images, joules, reason)


class EnergyMeter:
    """Measures the energy of windows, one after the other.

    Args:
        sensors: see `find_sensors` and `estimator` of `vwt.energy.sensors`.
        clock: returns the time in seconds.

    Attributes:
        shortest: length in seconds of the shortest window that these sensors can measure.
        senses: whether there is a sensor that can be read.
    """

    def __init__(self, sensors: Sequence[Sensor], clock: Callable[[], float] = time.perf_counter) -> None:
        self.sensors = list(sensors)
        self.shortest = STEPS * max((sensor.step for sensor in self.sensors), default=0.0)
        self.senses = not all(isinstance(sensor, Missing) for sensor in self.sensors)
        self._clock = clock
        self._begun: float | None = None
        self._cost = 0.0
        self._trouble: dict[str, str] = {}
        self._stop = threading.Event()
        self._poller: threading.Thread | None = None

    def check(self, seconds: float) -> None:
        """Raise ArgumentError if a window of so many seconds is too short for the sensors."""
        if seconds < self.shortest:
            slowest = max(self.sensors, key=lambda sensor: sensor.step)
            raise ArgumentError(
                f"a window of {seconds:.3g} s is too short: the sensor of {slowest.name} ({slowest.source}) moves "
                f"every {slowest.step:g} s; measure at least {self.shortest:g} s"
            )

    def begin(self, *, idle: bool = False) -> None:
        """Begin a window, discarding one that has not ended; `idle` if nothing will be computed in it."""
        self._stop_polling()
        entered = self._clock()
        self._trouble = {}
        for sensor in self.sensors:
            try:
                sensor.begin(idle)
            except Exception as error:  # no error of a sensor's library may stop the measured work
                self._trouble[sensor.name] = first_line(error)
        self._begun = self._clock()
        self._cost = self._begun - entered
        self._start_polling()

    def end(self, images: int = 0) -> Energy:
        """End the window, in which so many images were processed.

        Raises:
            ArgumentError: without `begin`, or if the window is shorter than `shortest`.
        """
        if self._begun is None:
            raise ArgumentError("no window has begun; call begin() before each end()")
        seconds, self._begun = self._clock() - self._begun, None
        self._stop_polling()
        entered = self._clock()
        devices = tuple(self._read(sensor, seconds, images) for sensor in self.sensors)
        self.check(seconds)
        return Energy(seconds, images, devices, self._cost + self._clock() - entered)

    def _read(self, sensor: Sensor, seconds: float, images: int) -> DeviceEnergy:
        joules, reason = None, self._trouble.get(sensor.name)
        if reason is None:
            try:
                joules = sensor.end(seconds)
            except Exception as error:  # as in begin
                reason = first_line(error)
        return DeviceEnergy(sensor.name, sensor.source, seconds, images, joules, reason)

    def _start_polling(self) -> None:
        every = min((sensor.poll_every for sensor in self.sensors), default=float("inf"))
        if every < threading.TIMEOUT_MAX:
            self._stop.clear()
            self._poller = threading.Thread(target=self._poll, args=(every,), daemon=True)
            self._poller.start()

    def _stop_polling(self) -> None:
        if self._poller is not None:
            self._stop.set()
            self._poller.join()
            self._poller = None

    def _poll(self, every: float) -> None:
        while not self._stop.wait(every):
            entered = self._clock()
            for sensor in self.sensors:
                try:
                    sensor.poll()
                except Exception:  # the next reading makes up for it, or `end` raises
                    continue
            self._cost += self._clock() - entered


def environment_report(powercap: Path = POWERCAP) -> str:
    """Devices, sensors and which are usable, threads and versions, as lines of text.

    Raises:
        ArgumentError: see `find_sensors`.
    """
    sensors = find_sensors(powercap)
    lines = [f"device    cpu: {cpu_model()}, {torch.get_num_threads()} threads on {os.cpu_count()} cores"]
    lines += [f"device    cuda:{i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        lines.append("device    mps")
    for sensor in sensors:
        usable = f"not usable: {sensor.reason}" if isinstance(sensor, Missing) else f"usable ({sensor.source})"
        lines.append(f"sensor    {sensor.name}: {usable}")
    lines.append(f"version   Python {platform.python_version()}")
    lines += [f"version   {name} {_version(name, extra)}" for name, extra in _PACKAGES.items()]
    return "\n".join(lines)


# Packages that figures depend on, and the extra that installs each.
_PACKAGES = {
    "vwt": "", "torch": "", "timm": "", "numpy": "", "faiss-cpu": "", "zarr": "",
    "zeus": "energy", "codecarbon": "codecarbon", "torchao": "int8",
}  # fmt: skip


def _version(name: str, extra: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return f"not installed; pip install 'vwt[{extra}]'" if extra else "not installed"
