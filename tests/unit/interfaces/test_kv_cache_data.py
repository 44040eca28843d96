"""Block table, pressure levels, allocation requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import BackendError, InvalidParameterError
from ferrum_ref.interfaces.kv_cache import (
    AllocationRequest,
    BlockTable,
    MemoryPressure,
    MemoryPressureThresholds,
    pressure_from_fraction,
)
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.sampling import Priority


@pytest.mark.clause("KV-TABLE-1")
def test_blocks_needed_is_a_ceiling() -> None:
    assert [BlockTable.blocks_needed_for_length(n, 16) for n in (0, 1, 16, 17, 32, 33)] == [0, 1, 1, 2, 2, 3]
    assert BlockTable.new(16).num_blocks() == 0
    for broken in (0, -1):
        with pytest.raises(InvalidParameterError):
            BlockTable.new(broken)
        with pytest.raises(InvalidParameterError):
            BlockTable.blocks_needed_for_length(4, broken)
    with pytest.raises(InvalidParameterError):
        BlockTable.blocks_needed_for_length(-1, 4)


@pytest.mark.clause("KV-TABLE-2")
def test_tables_map_logical_to_physical_ids() -> None:
    table = BlockTable.new(16)
    table.add_blocks([7, 3])
    assert table.logical_to_physical == [7, 3]  # upstream: [0, 1]
    assert table.num_blocks() == 2  # upstream's paged handle: 8
    table.logical_to_physical.append(9)
    assert table.physical_blocks == [7, 3]


@pytest.mark.clause("KV-TABLE-3")
def test_a_partly_filled_block_is_free_space() -> None:
    table = BlockTable([0], 5, 16)
    assert table.free_tokens() == 11
    assert table.has_free_space()  # upstream: False
    assert not table.has_free_block()
    assert BlockTable([0, 1], 16, 16).has_free_block()
    assert not BlockTable([0], 16, 16).has_free_space()


@pytest.mark.clause("KV-TABLE-4")
def test_free_tokens_never_go_below_zero() -> None:
    assert BlockTable([0], 9, 4).free_tokens() == 0  # upstream underflows
    assert BlockTable.new(4).free_tokens() == 0


@pytest.mark.clause("KV-TABLE-5")
@given(st.integers(0, 5), st.integers(1, 8), st.integers(0, 60), st.integers(0, 60))
def test_extend_fits_or_changes_nothing(num_blocks: int, size: int, first: int, second: int) -> None:
    table = BlockTable(list(range(num_blocks)), 0, size)
    for more in (first, second):
        before = table.sequence_length
        if before + more <= num_blocks * size:
            table.extend_sequence(more)
            assert table.sequence_length == before + more
        else:
            with pytest.raises(BackendError):
                table.extend_sequence(more)
            assert table.sequence_length == before


@pytest.mark.clause("KV-PRESSURE-1")
def test_levels_begin_at_their_thresholds() -> None:
    levels = [pressure_from_fraction(u, MemoryPressureThresholds()) for u in (0, 0.59, 0.6, 0.79, 0.8, 0.94, 0.95, 1)]
    low, medium, high, critical = MemoryPressure
    assert levels == [low, low, medium, medium, high, high, critical, critical]
    assert low < medium < high < critical
    for broken in (-0.1, 1.1, float("nan")):
        with pytest.raises(InvalidParameterError):
            pressure_from_fraction(broken, MemoryPressureThresholds())


@pytest.mark.clause("KV-HANDLE-6")
def test_estimated_memory_counts_the_whole_sequence_unrounded() -> None:
    request = AllocationRequest(RequestId.new(), 5, 100, 30, 3, 64, Device.CPU, DataType.FP16, Priority.Normal)
    assert request.estimated_memory_bytes() == 30 * 3 * 100 * 64 * 2 * 2
