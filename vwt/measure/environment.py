"""The machine that figures come from."""

import os
import platform
from pathlib import Path

import timm
import torch


def cpu_model(path: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, from Linux where it says so."""
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def hardware(device: torch.device, precision: str) -> str:
    """One line on where figures come from: processor, threads, versions, precision."""
    where = f"{cpu_model()} ({torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, {where}"
    return (
        f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__}, "
        f"Python {platform.python_version()}, {precision}"
    )
