"""How long a build will take, from what this machine does per second.  Clauses: MB-ESTIMATE-1..4
(specs/model_builder.md).

    loading    = file bytes / read rate + elements / (conversion or quantization rate * threads)
    init       = cache bytes / fill rate
    validation = parameter bytes / fill rate: one token reads every weight once

Optimisation takes no time of its own: projections are stacked while their weights are read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from ferrum_ref.errors import FerrumIOError
from ferrum_ref.interfaces.model_builder import BuildTimeBreakdown, BuildTimeEstimate, BuildTimeFactor

SAMPLE_BYTES: Final = 16 * 2**20
_SPREAD: Final = 3.0  # a cold disk or a busy machine; the fast side is what was measured, taken twice as fast
_UNKNOWN_READ_RATE: Final = 100 * 2.0**20  # bytes/s: a network, or a disk whose file is not there to be tried


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes and elements per second of this machine, and whether the file itself was tried."""

    read_bytes_per_s: float
    convert_elements_per_s: float
    quantize_elements_per_s: float
    fill_bytes_per_s: float
    is_measured: bool


class RateMeter(Protocol):
    """Finds out how fast this machine is."""

    def measure(self, files: list[Path]) -> Rates:
        """Rates for reading these files.  Raises FerrumIOError."""


class SamplingMeter:
    """Reads the first 16 MiB of the first file; converts, quantises and fills as many bytes, once each."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter, sample_bytes: int = SAMPLE_BYTES) -> None:
        self._clock = clock
        self._sample_bytes = sample_bytes

    def measure(self, files: list[Path]) -> Rates:
        halves = np.zeros(self._sample_bytes // 2, dtype=np.float16)
        convert_s = self._timed(lambda: halves.astype(np.float32))
        wide = halves.astype(np.float32)
        quantize_s = self._timed(lambda: np.rint(wide / max(float(np.abs(wide).max()), 1.0)) * np.float32(0.5))
        target = np.empty(self._sample_bytes, dtype=np.uint8)
        fill_s = self._timed(lambda: target.fill(1))
        rates = halves.size / convert_s, halves.size / quantize_s, target.size / fill_s
        if not files:
            return Rates(_UNKNOWN_READ_RATE, *rates, False)
        read: list[int] = []
        read_s = self._timed(lambda: read.append(self._read(files[0])))
        rate = read[0] / read_s if read[0] else _UNKNOWN_READ_RATE
        return Rates(rate, *rates, bool(read[0]))

    def _read(self, path: Path) -> int:
        try:
            with path.open("rb", buffering=0) as file:
                return len(file.read(self._sample_bytes))
        except OSError as error:
            raise FerrumIOError(f"estimate_build_time: {path}: {error.strerror or error}") from error

    def _timed(self, work: Callable[[], object]) -> float:
        start_s = self._clock()
        work()
        return max(self._clock() - start_s, 1e-9)


@dataclass(frozen=True, slots=True)
class Workload:
    """What a build has to do."""

    file_bytes: int
    num_elements: int
    parameter_bytes: int
    cache_bytes: int
    num_threads: int
    converts: bool
    quantizes: bool


def estimate(work: Workload, rates: Rates) -> BuildTimeEstimate:
    """The estimate. Pure.  [MB-ESTIMATE-1..4]"""
    threads = float(max(1, work.num_threads))
    rate = rates.quantize_elements_per_s if work.quantizes else rates.convert_elements_per_s
    convert_s = work.num_elements / (rate * threads) if work.converts or work.quantizes else 0.0
    read_s = work.file_bytes / rates.read_bytes_per_s
    init_s = work.cache_bytes / rates.fill_bytes_per_s
    check_s = work.parameter_bytes / rates.fill_bytes_per_s
    parts = [read_s + convert_s, init_s, 0.0, check_s]
    quantizing = rates.convert_elements_per_s / rates.quantize_elements_per_s if work.quantizes else 1.0
    expected_s = sum(parts)
    whole = [math.floor(part) for part in parts]
    expected = math.ceil(expected_s)
    factors = [
        BuildTimeFactor("threads", 1.0 / threads, f"{work.num_threads} threads decode and convert weights"),
        BuildTimeFactor("quantization", quantizing, "each weight is rounded to its scheme and back"),
        BuildTimeFactor("conversion", 1.0 if work.converts else 0.0, "weights change their element type"),
        BuildTimeFactor("spread", _SPREAD, "max: a cold disk or a busy machine; min: twice as fast as measured"),
        BuildTimeFactor("read_rate", 1.0, f"{rates.read_bytes_per_s / 2**20:.0f} MiB/s, " + _source_of(rates)),
    ]
    return BuildTimeEstimate(
        min_time_seconds=math.floor(expected_s / 2.0),
        max_time_seconds=math.ceil(expected_s * _SPREAD),
        expected_time_seconds=expected,
        time_breakdown=BuildTimeBreakdown(whole[0], whole[1], whole[2], whole[3], expected - sum(whole)),
        factors=factors,
    )


def _source_of(rates: Rates) -> str:
    return "measured on the weight file" if rates.is_measured else "assumed: no local file to try"
