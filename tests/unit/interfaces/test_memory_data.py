"""Records of the memory contract: handles, transfers, settings, utilisation and pressure levels."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces import kv_cache, memory
from ferrum_ref.interfaces.memory import (
    EventHandle,
    MemoryHandle,
    MemoryInfo,
    MemoryManagerConfig,
    MemoryPoolConfig,
    MemoryPressure,
    MemoryTransfer,
    MemoryType,
    StreamHandle,
)
from ferrum_ref.types.config import MemoryConfig
from ferrum_ref.types.parity_mode import ParityMode


def info(used: int, total: int) -> MemoryInfo:
    return MemoryInfo(total, used, max(0, total - used), 0, 0, 0.0, None)


@pytest.mark.clause("ME-HANDLE-1")
def test_memory_handle() -> None:
    handle = MemoryHandle.new(7)
    assert (handle.id(), handle.is_valid(), getattr(handle, "0"), handle.value) == (7, True, 7, 7)
    assert not MemoryHandle(0).is_valid()
    assert len({MemoryHandle(3), MemoryHandle(3), MemoryHandle(4)}) == 2
    assert MemoryHandle(2**64 - 1).id() == 2**64 - 1
    for bad in (-1, 2**64):
        with pytest.raises(InvalidParameterError, match="MemoryHandle"):
            MemoryHandle(bad)


@pytest.mark.clause("ME-HANDLE-2")
def test_stream_and_event_handles() -> None:
    assert StreamHandle.default() == StreamHandle.default_stream() == StreamHandle.new(0)
    assert (getattr(StreamHandle(5), "0"), getattr(EventHandle(9), "0")) == (5, 9)
    assert EventHandle(1) != StreamHandle(1)


@pytest.mark.clause("ME-TRANSFER-1")
def test_transfer_builders_copy() -> None:
    first = MemoryTransfer.new(MemoryHandle(1), MemoryHandle(2), 10)
    second = first.with_src_offset(3).with_dst_offset(4)
    assert (first.src_offset, first.dst_offset) == (0, 0)
    assert second == MemoryTransfer(MemoryHandle(1), MemoryHandle(2), 10, 3, 4)
    with pytest.raises(InvalidParameterError):
        first.with_src_offset(-1)


@pytest.mark.clause("ME-CONFIG-1")
def test_defaults_are_upstreams() -> None:
    pool = MemoryPoolConfig()
    assert pool == MemoryPoolConfig(1073741824, None, 536870912, True, 256, False, True)
    config = MemoryManagerConfig()
    assert config == MemoryManagerConfig({MemoryType.General: pool}, True, True, 0.85, False, 4)
    config.pool_configs[MemoryType.Cache] = pool
    assert MemoryType.Cache not in MemoryManagerConfig().pool_configs


@pytest.mark.clause("ME-PRESSURE-1")
@pytest.mark.parametrize(
    ("used", "level"),
    [
        (0, "Low"),
        (69, "Low"),
        (70, "Medium"),
        (84, "Medium"),
        (85, "High"),
        (94, "High"),
        (95, "Critical"),
        (100, "Critical"),
    ],
)
def test_levels_begin_at_their_threshold(used: int, level: str) -> None:
    assert info(used, 100).pressure_level() is MemoryPressure[level]
    assert info(used, 100).pressure_level(parity_mode=ParityMode.UPSTREAM) is MemoryPressure[level]


@pytest.mark.clause("ME-PRESSURE-1")
def test_which_thresholds_rule() -> None:
    """83 % used: the KV cache's rule says High, MemoryConfig's warning is reached, device memory is Medium."""
    assert info(83, 100).pressure_level() is MemoryPressure.Medium
    kv = kv_cache.pressure_from_fraction(0.83, kv_cache.MemoryPressureThresholds())
    assert kv is kv_cache.MemoryPressure.High
    assert MemoryConfig().pressure_warning_threshold < 0.83
    assert memory.MemoryPressure is not kv_cache.MemoryPressure
    assert MemoryPressure.Low < MemoryPressure.Medium < MemoryPressure.High < MemoryPressure.Critical


@pytest.mark.clause("ME-PRESSURE-2")
def test_nothing_and_too_much() -> None:
    assert info(0, 0).pressure_level() is MemoryPressure.Low
    assert info(0, 100).pressure_level() is MemoryPressure.Low
    assert info(150, 100).pressure_level() is MemoryPressure.Critical
    assert info(5, 0).pressure_level(parity_mode=ParityMode.UPSTREAM) is MemoryPressure.Low


@pytest.mark.clause("ME-PRESSURE-3")
def test_one_byte_below_the_threshold_of_16_gib() -> None:
    one_short = info(16320875724, 2**34)
    assert Fraction(16320875724, 2**34) < Fraction(95, 100) < Fraction(16320875725, 2**34)
    assert one_short.utilization_percent() == 95.0
    assert one_short.pressure_level() is MemoryPressure.High
    assert one_short.pressure_level(parity_mode=ParityMode.UPSTREAM) is MemoryPressure.Critical
    assert info(16320875725, 2**34).pressure_level() is MemoryPressure.Critical


@pytest.mark.clause("ME-PRESSURE-3")
@given(total=st.integers(1, 2**49), data=st.data())
def test_level_is_exact_and_percent_is_float32(total: int, data: st.DataObject) -> None:
    near = st.sampled_from([70, 85, 95]).flatmap(lambda p: st.integers(-2, 2).map(lambda d: total * p // 100 + d))
    used = min(total, max(0, data.draw(st.one_of(st.integers(0, total), near))))
    expected = sum(100 * used >= limit * total for limit in (70, 85, 95))
    assert info(used, total).pressure_level() == expected
    percent = info(used, total).utilization_percent()
    exact = Fraction(100 * used, total)
    assert abs(Fraction(percent) - exact) <= exact * Fraction(5, 2**24)  # five roundings of half a unit in float32


@pytest.mark.clause("ME-PRESSURE-3")
def test_percent_of_nothing() -> None:
    assert info(0, 0).utilization_percent() == 0.0
    assert info(1, 3).utilization_percent() == 33.33333206176758  # the float32 next to 100/3
