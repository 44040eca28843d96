"""Reading the attributes of a graph operation out of JSON.  Clause: MB-IR-4 (specs/model_builder.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ferrum_ref.errors import ConfigError
from ferrum_ref.types.devices import DataType


@dataclass(frozen=True, slots=True)
class Attributes:
    """One operation's JSON settings; every getter raises ConfigError naming operation and attribute. Pure."""

    operation: str
    values: Mapping[str, Any]

    def whole(self, name: str, low: int, high: int = 2**31) -> int:
        """An integer in [low, high)."""
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value < high:
            raise self._refused(name, value, f"an integer in [{low}, {high})")
        return value

    def optional_whole(self, name: str, default: int, low: int, high: int = 2**31) -> int:
        """An integer in [low, high), or the default where there is none."""
        return default if self.values.get(name) is None else self.whole(name, low, high)

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.values.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > 1e300:
            raise self._refused(name, value, "a finite number")
        if not math.isfinite(value):
            raise self._refused(name, value, "a finite number")
        return float(value)

    def dims(self, name: str, lowest: int = -1) -> list[int]:
        """A list of at most 8 dims, each `lowest` or more and with at most one -1."""
        value = self.values.get(name)
        if (
            not isinstance(value, (list, tuple))
            or len(value) > 8
            or any(not isinstance(dim, int) or isinstance(dim, bool) or not lowest <= dim < 2**31 for dim in value)
            or sum(dim == -1 for dim in value) > 1
        ):
            raise self._refused(name, value, "a list of dims with at most one -1")
        return list(value)

    def text(self, name: str) -> str:
        """A string."""
        value = self.values.get(name)
        if not isinstance(value, str):
            raise self._refused(name, value, "a string")
        return value

    def data_type(self, name: str) -> DataType:
        """A float element type by name."""
        found = self.text(name)
        for kind in (DataType.FP32, DataType.FP16, DataType.BF16):
            if kind.value == found:
                return kind
        raise self._refused(name, found, "FP32, FP16 or BF16")

    def _refused(self, name: str, value: Any, expected: str) -> ConfigError:
        found = " ".join(repr(value).split())
        return ConfigError(f"{self.operation}: {name}: got {found:.80}, expected {expected}")
