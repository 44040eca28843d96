"""One door for all trace formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ferrum_ref.errors import UnsupportedError
from ferrum_sim.workload.azure import read_azure
from ferrum_sim.workload.mooncake import read_mooncake
from ferrum_sim.workload.request import Workload

READERS: dict[str, Callable[[Path, int | None], Workload]] = {".csv": read_azure, ".jsonl": read_mooncake}


def read_trace(path: Path, limit: int | None = None) -> Workload:
    """The workload in `path`: `.csv` is Azure's form, `.jsonl` Mooncake's.  [SI-TRACE-1..4]

    Raises UnsupportedError for another ending, and what the readers raise.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UnsupportedError(
            f"read_trace: {path} ends in '{path.suffix}'; expected .csv (Azure) or .jsonl (Mooncake)"
        )
    return reader(path, limit)
