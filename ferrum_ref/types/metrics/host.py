"""The machine an engine runs on; `ferrum_ref.types.metrics` re-exports these names.

Clause: TY-METRICS-4 (specs/types.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from ferrum_ref.types.metrics.status import MemoryUsage
from ferrum_ref.types.record import F32, U64, Record, Usize


@dataclass(frozen=True, slots=True)
class GpuMetrics(Record):
    """One GPU: percent, bytes, degrees Celsius, watts."""

    utilization_percent: F32
    memory_used_bytes: Usize
    memory_total_bytes: Usize
    temperature_celsius: F32
    power_watts: F32


@dataclass(frozen=True, slots=True)
class NetworkMetrics(Record):
    """Network traffic per second."""

    rx_bytes_per_sec: U64
    tx_bytes_per_sec: U64
    rx_packets_per_sec: U64
    tx_packets_per_sec: U64


@dataclass(frozen=True, slots=True)
class DiskMetrics(Record):
    """Disk traffic per second."""

    read_bytes_per_sec: U64
    write_bytes_per_sec: U64
    read_ops_per_sec: U64
    write_ops_per_sec: U64


@dataclass(frozen=True, slots=True)
class SystemMetrics:
    """The host; `load_average` over 1, 5 and 15 minutes."""

    cpu_usage_percent: F32
    memory_usage: MemoryUsage
    gpu_utilization: GpuMetrics | None
    network_io: NetworkMetrics
    disk_io: DiskMetrics
    load_average: tuple[F32, F32, F32]
