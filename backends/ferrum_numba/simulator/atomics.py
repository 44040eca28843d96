"""`cuda.atomic` inside a kernel: each call reads and writes one element before any other thread runs."""

from __future__ import annotations

from typing import Any

from ferrum_numba.simulator.memory import CheckedArray


class SimulatedAtomic:
    """The operations return the element as it was before.  [BK-CUDASIM-7]"""

    def add(self, array: CheckedArray, index: Any, value: Any) -> Any:
        return array.update(index, lambda old: old + value)

    def sub(self, array: CheckedArray, index: Any, value: Any) -> Any:
        return array.update(index, lambda old: old - value)

    def max(self, array: CheckedArray, index: Any, value: Any) -> Any:
        return array.update(index, lambda old: max(old, value))

    def min(self, array: CheckedArray, index: Any, value: Any) -> Any:
        return array.update(index, lambda old: min(old, value))

    def and_(self, array: CheckedArray, index: Any, value: Any) -> Any:
        return array.update(index, lambda old: old & value)

    def or_(self, array: CheckedArray, index: Any, value: Any) -> Any:
        return array.update(index, lambda old: old | value)

    def xor(self, array: CheckedArray, index: Any, value: Any) -> Any:
        return array.update(index, lambda old: old ^ value)

    def exch(self, array: CheckedArray, index: Any, value: Any) -> Any:
        return array.update(index, lambda old: value)

    def cas(self, array: CheckedArray, index: Any, old: Any, value: Any) -> Any:
        return array.update(index, lambda held: value if held == old else held)
