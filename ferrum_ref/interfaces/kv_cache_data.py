"""Records of the KV-cache contract: block table, allocation request, statistics, memory pressure.

Upstream: `ferrum_interfaces::kv_cache`.  Clauses: KV-TABLE-1..5, KV-PRESSURE-1 (specs/kv_cache.md).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from ferrum_ref.errors import BackendError, InvalidParameterError
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import BlockId, RequestId
from ferrum_ref.types.record import F32, U64, Record, Usize, check_unsigned
from ferrum_ref.types.sampling import Priority


@dataclass(slots=True)
class BlockTable:
    """Which physical block holds logical block i of one sequence; mutable.  [KV-TABLE-1..5; D-04, D-05, D-41]

    `sequence_length` is the manager's figure: the tokens it accounts for, of which a running step may still be writing
    none. Ids count from 0 and `num_blocks` is the length of the list.
    """

    physical_blocks: list[BlockId] = field(default_factory=list)
    sequence_length: int = 0
    block_size: int = 16

    def __post_init__(self) -> None:
        _check_block_size(self.block_size)

    @classmethod
    def new(cls, block_size: int) -> Self:
        """An empty table.  Raises InvalidParameterError unless block_size >= 1."""
        return cls([], 0, block_size)

    @property
    def logical_to_physical(self) -> list[BlockId]:
        """A copy of `physical_blocks` (upstream stores 0, 1, 2, … here). Pure.  [KV-TABLE-2; D-05]"""
        return list(self.physical_blocks)

    def num_blocks(self) -> int:
        """len(physical_blocks). Pure."""
        return len(self.physical_blocks)

    @staticmethod
    def blocks_needed_for_length(length: int, block_size: int) -> int:
        """ceil(length / block_size). Pure.  Raises InvalidParameterError unless length >= 0 and block_size >= 1."""
        _check_block_size(block_size)
        return -(-check_unsigned(length, 2**64, "blocks_needed_for_length", "length") // block_size)

    def has_free_space(self) -> bool:
        """free_tokens() > 0. Pure.  [KV-TABLE-3; D-04]"""
        return self.free_tokens() > 0

    def has_free_block(self) -> bool:
        """A whole spare block exists (upstream's has_free_space). Pure.  [KV-TABLE-3; D-04]"""
        return self.blocks_needed_for_length(self.sequence_length, self.block_size) < self.num_blocks()

    def free_tokens(self) -> int:
        """max(0, num_blocks * block_size - sequence_length). Pure.  [KV-TABLE-4; D-41]"""
        return max(0, len(self.physical_blocks) * self.block_size - self.sequence_length)

    def add_blocks(self, blocks: Sequence[BlockId]) -> None:
        """Append ids in logical order. Mutates the table."""
        self.physical_blocks.extend(blocks)

    def extend_sequence(self, additional_tokens: int) -> None:
        """sequence_length += additional_tokens.  [KV-TABLE-5; D-41]

        Mutates the table.  Raises BackendError, with no change, when the blocks cannot hold the new length.
        """
        check_unsigned(additional_tokens, 2**64, "BlockTable.extend_sequence", "additional_tokens")
        length = self.sequence_length + additional_tokens
        if length > len(self.physical_blocks) * self.block_size:
            raise BackendError(
                f"BlockTable.extend_sequence: {length} tokens do not fit {len(self.physical_blocks)} blocks of"
                f" {self.block_size}; add blocks first"
            )
        self.sequence_length = length


def _check_block_size(block_size: int) -> None:
    if block_size < 1:
        raise InvalidParameterError(f"BlockTable: block_size must be >= 1, got {block_size}")


@dataclass(frozen=True, slots=True)
class AllocationRequest(Record):
    """What a new cache is for. `num_heads` are key/value heads (D-21)."""

    request_id: RequestId
    initial_tokens: Usize
    max_sequence_length: Usize
    num_layers: Usize
    num_heads: Usize
    head_dim: Usize
    device: Device
    dtype: DataType
    priority: Priority

    def estimated_memory_bytes(self) -> int:
        """layers * heads * max_sequence_length * head_dim * 2 * dtype bytes; not rounded to blocks. Pure."""
        elements = self.num_layers * self.num_heads * self.max_sequence_length * self.head_dim * 2
        return elements * self.dtype.size_bytes()


@dataclass(frozen=True, slots=True)
class CacheHandleStats(Record):
    """Numbers of one sequence's cache."""

    memory_bytes: Usize
    blocks_allocated: Usize
    tokens_stored: Usize
    utilization: F32
    last_access: float


@dataclass(frozen=True, slots=True)
class CacheManagerStats(Record):
    """Numbers of a manager."""

    total_memory_bytes: Usize
    used_memory_bytes: Usize
    active_caches: Usize
    total_blocks: Usize
    free_blocks: Usize
    cache_hit_rate: F32
    eviction_count: U64
    allocation_count: U64
    allocation_failures: U64


@dataclass(frozen=True, slots=True)
class CacheGcStats(Record):
    """What a collection freed."""

    memory_freed: Usize
    caches_freed: Usize
    gc_time_ms: U64


class MemoryPressure(enum.IntEnum):
    """How full the pool is."""

    Low = 0
    Medium = 1
    High = 2
    Critical = 3


@dataclass(frozen=True, slots=True)
class MemoryPressureThresholds:
    """Used fractions at which a level begins."""

    medium_threshold: float = 0.6
    high_threshold: float = 0.8
    critical_threshold: float = 0.95


def pressure_from_fraction(used: float, thresholds: MemoryPressureThresholds) -> MemoryPressure:
    """The level of a used fraction; each threshold belongs to the level it begins. Pure.  [KV-PRESSURE-1; D-38]

    Raises InvalidParameterError unless 0 <= used <= 1.
    """
    if not 0.0 <= used <= 1.0:
        raise InvalidParameterError(f"pressure_from_fraction: used must be in [0, 1], got {used}")
    if used >= thresholds.critical_threshold:
        return MemoryPressure.Critical
    if used >= thresholds.high_threshold:
        return MemoryPressure.High
    return MemoryPressure.Medium if used >= thresholds.medium_threshold else MemoryPressure.Low
