"""Description of the machine on which figures were measured."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch


def cpu_model(path: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, from Linux where it says so."""
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def hardware(device: torch.device, precision: str) -> str:
    """The machine in one line: processor, threads, versions, precision."""
    where = f"{cpu_model()} ({torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, {where}"
    return (
        f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__}, "
        f"Python {platform.python_version()}, {precision}"
    )


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The same as a mapping, for what is stored with figures: "device", "cpu", "threads", "torch", "timm"."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "timm": timm.__version__,
    }


def is_machine(machine: Any) -> bool:
    """Whether a value of a file says where something was measured."""
    return isinstance(machine, dict) and all(isinstance(machine.get(name), str) for name in ("cpu", "device"))


def other_threads(machine: Mapping[str, Any]) -> str:
    """How the threads here differ from those of a stored machine, on a CPU; empty if they do not."""
    there, here = machine.get("threads"), torch.get_num_threads()
    differ = machine.get("device") == "cpu" and there is not None and there != here
    return f"{there} threads, here torch has {here} (torch.set_num_threads, --threads)" if differ else ""
