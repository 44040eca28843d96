"""Where arrays live and what their elements are.

Upstream: `ferrum_types::devices`.  Clauses: TY-DEVICE-1..2, TY-DTYPE-1..3 (specs/types.md).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.types.record import Usize, check_unsigned
from ferrum_ref.types.text_form import Displayed

Kind = Literal["cpu", "cuda", "rocm", "metal"]


@dataclass(frozen=True, slots=True)
class Device(Displayed):
    """A compute device: `Device.CPU`, `Device.Metal`, `Device.CUDA(n)`, `Device.ROCm(n)`.  [TY-DEVICE-1..2; D-50]

    Hashable; `str()` is cpu / cuda:N / rocm:N / metal. Metal exists on every platform (upstream: on macOS only).
    """

    kind: Kind = "cpu"
    ordinal: int | None = None

    CPU: ClassVar[Device]
    Metal: ClassVar[Device]

    def __post_init__(self) -> None:
        if self.kind not in ("cpu", "cuda", "rocm", "metal"):
            raise InvalidParameterError(f"Device: unknown kind {self.kind!r}; expected cpu, cuda, rocm or metal")
        if self.kind in ("cuda", "rocm"):
            check_unsigned(self.ordinal, 2**64, "Device", f"{self.kind} index")
        elif self.ordinal is not None:
            raise InvalidParameterError(f"Device: {self.kind} takes no index, got {self.ordinal!r}")

    @staticmethod
    def CUDA(index: Usize) -> Device:
        return Device("cuda", index)

    @staticmethod
    def ROCm(index: Usize) -> Device:
        return Device("rocm", index)

    @staticmethod
    def cuda(index: int = 0) -> Device:
        return Device("cuda", index)

    @staticmethod
    def parse(text: str) -> Device:
        """The device written as cpu, metal, cuda, cuda:N, rocm or rocm:N (case ignored).  [TY-DEVICE-2; D-50]

        Pure. Raises InvalidParameterError for anything else.
        """
        kind, colon, number = text.strip().lower().partition(":")
        if kind == "cpu" and not colon:
            return Device.CPU
        if kind == "metal" and not colon:
            return Device.Metal
        if kind in ("cuda", "rocm") and (number.isdecimal() if colon else True):
            return Device("cuda" if kind == "cuda" else "rocm", int(number) if colon else 0)
        raise InvalidParameterError(f"Device.parse: got {text!r}; expected cpu, metal, cuda:N or rocm:N")

    def is_gpu(self) -> bool:
        return self.kind != "cpu"

    def index(self) -> int | None:
        """N for CUDA and ROCm; None for CPU and Metal."""
        return self.ordinal

    def __str__(self) -> str:
        return self.kind if self.ordinal is None else f"{self.kind}:{self.ordinal}"


Device.CPU = Device("cpu")
Device.Metal = Device("metal")


class ElementType(Displayed):
    """What can be asked of an element type, told from its name; `DataType` lists the names."""

    _value_: str

    def __new__(cls, name: str) -> Self:
        element = object.__new__(cls)
        element._value_ = name
        return element

    def size_bytes(self) -> int:
        """Upstream's figure: whole bytes, so 4-bit data is over-counted twofold; see packed_bytes.  [TY-DTYPE-1]"""
        return (self.size_bits() + 7) // 8

    def size_bits(self) -> int:
        """Bits of one element in packed storage (BOOL is stored as a byte).  [TY-DTYPE-2]"""
        name = self._value_
        if name == "BOOL":
            return 8
        return int(name.lstrip("BFPUINT"))

    def packed_bytes(self, num_elements: int) -> int:
        """ceil(num_elements * size_bits / 8): the true storage of packed data.  [TY-DTYPE-2]"""
        return (check_unsigned(num_elements, 2**64, "packed_bytes", "num_elements") * self.size_bits() + 7) // 8

    def is_float(self) -> bool:
        return self._value_ in ("FP32", "FP16", "BF16", "FP8")

    def is_integer(self) -> bool:
        """All INT* and UINT* types; BOOL is not one."""
        return "INT" in self._value_

    def is_quantized(self) -> bool:
        """FP8, INT8, INT4 and UINT4, as upstream (UINT8 is not).  [TY-DTYPE-3]"""
        return self._value_ in ("FP8", "INT8", "INT4", "UINT4")


class DataType(ElementType, enum.Enum):
    """An element type; `str()` is its lower-case name.  [TY-DTYPE-1..3; D-07]

    FP8 is E4M3FN (finite only, largest value 448). There are no 64-bit types.
    """

    FP32 = "FP32"
    FP16 = "FP16"
    BF16 = "BF16"
    FP8 = "FP8"
    INT32 = "INT32"
    INT16 = "INT16"
    INT8 = "INT8"
    INT4 = "INT4"
    UINT32 = "UINT32"
    UINT16 = "UINT16"
    UINT8 = "UINT8"
    UINT4 = "UINT4"
    BOOL = "BOOL"

    def __str__(self) -> str:
        return self.value.lower()
