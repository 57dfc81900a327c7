"""The allocator of this process, and the page faults of calls: what temporaries cost beside arithmetic.

With glibc's own settings, memory of more than 32 MB is given back as soon as it is free; the next call faults it in
again, page by page. How much that costs depends on the size of temporaries, so that it differs between the full model
and a reduced one.
"""

import os
import platform
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_OTHERS = ("jemalloc", "tcmalloc", "mimalloc")
_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "TCMALLOC_", "MIMALLOC_")


def allocator(maps: Path = Path("/proc/self/maps")) -> str:
    """Which allocator answers malloc, with the settings that the environment has for it."""
    loaded = maps.read_text() if maps.exists() else ""
    found = [name for name in _OTHERS if f"lib{name}" in loaded]
    name = found[0] if found else platform.libc_ver()[0] or "unknown"
    settings = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(_SETTINGS)]
    return " ".join([name, *settings])


def page_faults(call: Callable[[int], Any], items: int) -> float:
    """Pages that one call faults in without reading a disk: the median over items."""
    counts = []
    for item in range(items):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call(item)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return float(np.median(counts))
