"""How a packed weight is laid out: upstream's two schemes and this project's extensions.

    QuantScheme.Q4_0(32)  QuantScheme.Q8_0(32)      upstream's: ggml's blocks of 32
    QuantScheme.Rows("Q6_K")                        rows of whole blocks in any named format, ggml's or plain numbers
    QuantScheme.Gptq(...)  QuantScheme.Awq(...)  QuantScheme.Groups(...)  QuantScheme.Fp8(...)
                                                    these carry the tensors that go with the packed one

A backend names those it takes in `capabilities().extra_capabilities["quantized_linear"]`, by `kind`.
Clauses: KN-PARAMS-3..4 (specs/kernels.md), QT-SCHEME-1..2 (specs/quant.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ferrum_ref.errors import BackendError
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.types.record import Record, Usize


class QuantScheme:
    """How packed weights are laid out: `QuantScheme.Q4_0(group_size=32)` or `QuantScheme.Q8_0(group_size=32)`.

    The others are extensions.  Raises BackendError for a group size below 1.  [KN-PARAMS-3..4, QT-SCHEME-1]
    """

    __slots__ = ()

    Q4_0: ClassVar[type[QuantQ4_0]]
    Q8_0: ClassVar[type[QuantQ8_0]]
    Rows: ClassVar[type[QuantRows]]
    Gptq: ClassVar[type[QuantGptq]]
    Awq: ClassVar[type[QuantAwq]]
    Groups: ClassVar[type[QuantGroups]]
    Fp8: ClassVar[type[QuantFp8]]

    @property
    def kind(self) -> str:
        """The name in a backend's capability list, such as "q4_0" or "gptq" (extension).  Pure."""
        raise BackendError(f"QuantScheme: {type(self).__name__} has no name")


@dataclass(frozen=True, slots=True)
class QuantQ4_0(QuantScheme, Record):
    """4 bits a weight, one scale for `group_size` weights (32 in ggml)."""

    group_size: Usize

    def __post_init__(self) -> None:
        _check_group("Q4_0", self.group_size)
        Record.__post_init__(self)

    @property
    def kind(self) -> str:
        return "q4_0"


@dataclass(frozen=True, slots=True)
class QuantQ8_0(QuantScheme, Record):
    """8 bits a weight, one scale for `group_size` weights (32 in ggml)."""

    group_size: Usize

    def __post_init__(self) -> None:
        _check_group("Q8_0", self.group_size)
        Record.__post_init__(self)

    @property
    def kind(self) -> str:
        return "q8_0"


@dataclass(frozen=True, slots=True)
class QuantRows(QuantScheme, Record):
    """Extension: packed_weight uint8 (out, row bytes), rows of whole blocks of `format`: a ggml name such as "Q6_K",
    or plain numbers, "F64" "F32" "F16" "BF16" "F8_E4M3" "F8_E5M2"."""

    format: str

    @property
    def kind(self) -> str:
        return self.format.lower()


@dataclass(frozen=True, slots=True, eq=False)
class QuantGptq(QuantScheme):
    """Extension: packed_weight int32 (in * bits / 32, out), bits along `in`, and GPTQ's other tensors as stored.

    qzeros int32 (groups, out * bits / 32); scales (groups, out) float; g_idx int32 (in,) with act-order. Version
    "gptq" keeps the zero point minus one, "gptq_v2" the zero point.
    """

    bits: int
    group_size: int
    version: Literal["gptq", "gptq_v2"]
    qzeros: TensorRef
    scales: TensorRef
    g_idx: TensorRef | None = None

    @property
    def kind(self) -> str:
        return "gptq"


@dataclass(frozen=True, slots=True, eq=False)
class QuantAwq(QuantScheme):
    """Extension: packed_weight int32 (in, out / 8) in AWQ's order of nibbles; qzeros int32 (groups, out / 8); scales
    (groups, out) float."""

    group_size: int
    qzeros: TensorRef
    scales: TensorRef

    @property
    def kind(self) -> str:
        return "awq"


@dataclass(frozen=True, slots=True, eq=False)
class QuantGroups(QuantScheme):
    """Extension: integers by groups of inputs; packed_weight (out, in) int8 or uint8 for 8 bits, uint8 (out, in / 2)
    low nibble first for 4; scales (out, groups) float; `zeros` uint8 (out, groups), None is symmetric."""

    bits: Literal[4, 8]
    scales: TensorRef
    zeros: TensorRef | None = None

    @property
    def kind(self) -> str:
        return f"int{self.bits}"


@dataclass(frozen=True, slots=True, eq=False)
class QuantFp8(QuantScheme):
    """Extension: packed_weight uint8 (out, in), the codes of FP8 numbers; scale: one, one a row, or one a block."""

    format: Literal["e4m3", "e5m2"]
    scale: TensorRef

    @property
    def kind(self) -> str:
        return "fp8"


QuantScheme.Q4_0 = QuantQ4_0
QuantScheme.Q8_0 = QuantQ8_0
QuantScheme.Rows = QuantRows
QuantScheme.Gptq = QuantGptq
QuantScheme.Awq = QuantAwq
QuantScheme.Groups = QuantGroups
QuantScheme.Fp8 = QuantFp8


def _check_group(scheme: str, group_size: int) -> None:
    if group_size < 1:
        raise BackendError(f"QuantScheme.{scheme}: group_size is {group_size}, expected at least 1 (32 in ggml)")
