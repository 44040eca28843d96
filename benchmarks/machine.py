"""The machine that a CPU benchmark runs on, as its report tells it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any


def machine(*packages: str) -> dict[str, Any]:
    """What the figures of a CPU benchmark depend on, the versions of `packages` among it."""
    import numpy as np

    facts: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    flags = facts.get("flags", "").split()
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "cpu": facts.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "vector_units": [flag for flag in ("avx2", "avx512f", "amx_tile") if flag in flags],
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas['name']} {blas['version']}",
        **{name: importlib.metadata.version(name) for name in packages},
    }


def read_bandwidth(num_threads: int) -> float:
    """Bytes per second that many threads read together from memory: a dot product each, best of five."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    parts = [np.ones(64 * 1024**2, dtype=np.float32) for _ in range(num_threads)]
    best_s = float("inf")
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(5):
            began_s = time.perf_counter()
            list(pool.map(lambda part: np.dot(part, part), parts))
            best_s = min(best_s, time.perf_counter() - began_s)
    return sum(part.nbytes for part in parts) / best_s


def copy_bandwidth() -> float:
    """Bytes per second that are read and written while an array is copied: best of five."""
    import numpy as np

    source = np.ones(16 * 1024**2, dtype=np.float32)
    target, best_s = np.empty_like(source), float("inf")
    for _ in range(6):
        began_s = time.perf_counter()
        np.copyto(target, source)
        best_s = min(best_s, time.perf_counter() - began_s)
    return 2 * source.nbytes / best_s
