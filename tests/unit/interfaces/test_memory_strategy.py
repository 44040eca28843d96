"""The choice of a device: best fit by its formula, and the guards of D-40."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.memory import (
    AllocationRequirements,
    AllocationStrategy,
    BestFitStrategy,
    MemoryInfo,
    MemoryType,
)
from ferrum_ref.numpy_backend.memory import MostFreeStrategy, PreferredFirstStrategy
from ferrum_ref.types.devices import Device
from ferrum_ref.types.parity_mode import ParityMode

A, B, C = Device.CUDA(0), Device.CUDA(1), Device.CPU


def wish(preferred: list[Device] | None = None, alignment: int | None = None) -> AllocationRequirements:
    return AllocationRequirements(preferred or [], MemoryType.General, alignment, False, None)


def info(free: int, total: int) -> MemoryInfo:
    return MemoryInfo(total, max(0, total - free), free, 0, 0, 0.0, None)


@pytest.mark.clause("ME-STRATEGY-1", "ME-STRATEGY-2")
def test_best_fit_by_hand() -> None:
    """Size 100 of 1000: a, 200 free: 1-.1-.5*.3 = .75; b, 500 free: 1-.4-0 = .6; b wins from a preference of .15."""
    infos = {A: info(200, 1000), B: info(500, 1000)}
    best = BestFitStrategy()
    assert best.name() == "best_fit"
    assert best.select_device(100, wish(), [B, A], infos) == A
    assert best.select_device(100, wish([B]), [A, B], infos) == B  # .6 + .2
    assert best.select_device(100, wish([C, B]), [A, B], infos) == A  # .6 + .1
    assert best.select_device(201, wish(), [A, B], infos) == B
    assert best.select_device(501, wish(), [A, B], infos) is None
    assert best.select_device(100, wish([A]), [C], infos) is None  # no info, and a is not available


@pytest.mark.clause("ME-STRATEGY-2")
@pytest.mark.parametrize(
    ("used", "free", "preferred", "chosen"),
    [
        (50, 190, [], A),  # 1 - .09 - .5 * .45 = .685, under a's .7
        (50, 170, [], B),  # 1 - .07 - .5 * .45 = .705
        (950, 190, [], A),
        (950, 170, [], B),
        (500, 610, [B], A),  # 1 - .51 + .2 = .69
        (500, 590, [B], B),  # 1 - .49 + .2 = .71
        (500, 470, [C, Device.Metal, B], A),  # 1 - .37 + .2 / 3 = .697
        (500, 460, [C, Device.Metal, B], B),  # 1 - .36 + .2 / 3 = .707
    ],
)
def test_every_weight_of_the_score(used: int, free: int, preferred: list[Device], chosen: Device) -> None:
    """Size 100 of 1000; a scores 1 - .3 - 0 = .7; the fields of b are independent of each other."""
    infos = {A: MemoryInfo(1000, 500, 400, 0, 0, 0.0, None), B: MemoryInfo(1000, used, free, 0, 0, 0.0, None)}
    assert BestFitStrategy().select_device(100, wish(preferred), [A, B], infos) == chosen


@pytest.mark.clause("ME-STRATEGY-2")
def test_first_wins_a_tie() -> None:
    infos = {A: info(300, 1000), B: info(300, 1000)}
    assert BestFitStrategy().select_device(10, wish(), [B, A], infos) == B
    assert BestFitStrategy().select_device(10, wish(), [A, B], infos) == A


@pytest.mark.clause("ME-STRATEGY-3")
def test_alignment_counts() -> None:
    infos = {A: info(100, 1000), B: info(1000, 1000)}
    assert BestFitStrategy().select_device(1, wish(alignment=256), [A, B], infos) == B
    upstream = BestFitStrategy(parity_mode=ParityMode.UPSTREAM)
    assert upstream.select_device(1, wish(alignment=256), [A, B], infos) == A
    assert BestFitStrategy().select_device(1, wish(), [A, B], infos) == A
    with pytest.raises(InvalidParameterError, match="power of two"):
        BestFitStrategy().select_device(1, wish(alignment=24), [A], infos)


@pytest.mark.clause("ME-STRATEGY-4")
@pytest.mark.parametrize("mode", list(ParityMode))
def test_total_zero_is_never_chosen(mode: ParityMode) -> None:
    odd = MemoryInfo(0, 0, 1000, 0, 0, 0.0, None)
    assert BestFitStrategy(parity_mode=mode).select_device(1, wish([A]), [A], {A: odd}) is None
    assert BestFitStrategy(parity_mode=mode).select_device(1, wish([A]), [A, B], {A: odd, B: info(9, 9)}) == B


@pytest.mark.clause("ME-STRATEGY-4")
def test_what_does_not_count() -> None:
    infos = {A: info(200, 1000), B: info(500, 1000)}
    other = AllocationRequirements([], MemoryType.Cache, None, True, timedelta(seconds=1))
    assert BestFitStrategy().select_device(100, other, [A, B], infos) == A
    """Present use .5 of b is best although 500 more would fill it: 1-0-0 = 1 beats a's 1-.3-.15."""
    infos = {A: info(800, 1000), B: info(500, 1000)}
    assert BestFitStrategy().select_device(500, wish(), [A, B], infos) == B


@pytest.mark.clause("ME-STRATEGY-6", "ME-STRATEGY-1")
def test_other_strategies() -> None:
    infos = {A: info(200, 1000), B: info(500, 1000), C: info(500, 500)}
    assert PreferredFirstStrategy().name() == "preferred_first"
    assert PreferredFirstStrategy().select_device(100, wish([C, B]), [A, B, C], infos) == C
    assert PreferredFirstStrategy().select_device(100, wish(), [B, A], infos) == B
    assert PreferredFirstStrategy().select_device(300, wish([A]), [A, B], infos) == B
    assert PreferredFirstStrategy().select_device(501, wish([A]), [A, B], infos) is None
    assert MostFreeStrategy().name() == "most_free"
    assert MostFreeStrategy().select_device(1, wish(), [A, C, B], infos) == C
    assert MostFreeStrategy().select_device(1, wish(alignment=256), [A, B], infos) == B
    assert MostFreeStrategy().select_device(501, wish(), [A, B, C], infos) is None


@pytest.mark.clause("ME-STRATEGY-1", "ME-STRATEGY-2")
@given(
    frees=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=4),
    size=st.integers(0, 60),
    preferred=st.lists(st.integers(0, 3), max_size=3, unique=True),
)
def test_law_of_best_fit(frees: list[tuple[int, int]], size: int, preferred: list[int]) -> None:
    devices = [Device.CUDA(index) for index in range(len(frees))]
    infos = {d: MemoryInfo(total, total // 3, free, 0, 0, 0.0, None) for d, (free, total) in zip(devices, frees)}
    requirements = wish([Device.CUDA(index) for index in preferred])
    scores = []
    for device, (free, total) in zip(devices, frees):
        pref = 1 / (requirements.preferred_devices.index(device) + 1) if device in requirements.preferred_devices else 0
        fits = total > 0 and free >= size
        waste, used = ((free - size) / total, total // 3 / total) if fits else (math.nan, math.nan)
        scores.append(1.0 - waste - 0.5 * abs(used - 0.5) + 0.2 * pref if fits else -math.inf)
    best = max(scores, default=-math.inf)
    expected = None if best == -math.inf else devices[scores.index(best)]
    strategies: list[AllocationStrategy] = [BestFitStrategy(), MostFreeStrategy(), PreferredFirstStrategy()]
    assert strategies[0].select_device(size, requirements, devices, infos) == expected
    for strategy in strategies:
        assert (strategy.select_device(size, requirements, devices, infos) is None) == (expected is None)
