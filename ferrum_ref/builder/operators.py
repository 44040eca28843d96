"""What an operation of a graph is: how many operands, which result shapes, how it is computed, whether it is pure.

A value on an edge is a tensor, or integers (token ids, positions, row numbers). Shapes are lists of dims, -1 for one
that is known only when the graph runs.  Clauses: MB-IR-2, MB-IR-4 (specs/model_builder.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ferrum_ref.builder.attributes import Attributes
from ferrum_ref.errors import ConfigError, UnsupportedError
from ferrum_ref.interfaces.model_builder import CustomLayer
from ferrum_ref.types.devices import DataType

if TYPE_CHECKING:
    from ferrum_ref.interfaces.backend import ComputeBackend
    from ferrum_ref.interfaces.kernel_ops import KernelOps
    from ferrum_ref.interfaces.kv_storage import KvBatch
    from ferrum_ref.interfaces.tensor import TensorRef

Ints: TypeAlias = npt.NDArray[np.int64]
Value: TypeAlias = "TensorRef | Ints"
MAX_ELEMENTS = 2**33  # of any value of a graph
MAX_CONSTANT_ELEMENTS = 2**28  # of one that is made from nothing
INTEGERS = DataType.UINT32  # the element type that edges of ids and positions are declared with


@dataclass(frozen=True, slots=True)
class Signal:
    """What is known of a value before the graph runs."""

    shape: tuple[int, ...]
    dtype: DataType


@dataclass(slots=True)
class Runtime:
    """What operations compute with: a backend and, during a forward, its entries and its cache."""

    backend: ComputeBackend
    entries: Mapping[str, Ints] = field(default_factory=dict)
    kv: KvBatch | None = None
    custom_layers: Mapping[str, CustomLayer] = field(default_factory=dict)

    def kernels(self) -> KernelOps:
        """Raises UnsupportedError if the backend offers no fused kernels."""
        kernels = self.backend.kernel_ops()
        if kernels is None:
            raise self.missing("fused")
        return kernels

    def missing(self, kind: str) -> UnsupportedError:
        return UnsupportedError(f"graph: backend {self.backend.name()!r} offers no {kind} kernels; choose another")


Infer: TypeAlias = Callable[[Attributes, Sequence[Signal]], list[Signal]]
Run: TypeAlias = Callable[[Runtime, Attributes, Sequence[Any]], list[Any]]


@dataclass(frozen=True, slots=True)
class Operator:
    """One kind of operation.

    integer_operands: the slots that take integers; all others take float tensors.
    is_pure: equal operands give equal results and nothing else happens, so it may be shared, folded or dropped.
    is_view: it moves no number, it only looks at its operand otherwise.
    """

    name: str
    num_operands: tuple[int, int]
    infer: Infer
    run: Run
    integer_operands: tuple[int, ...] = ()
    is_pure: bool = True
    is_view: bool = False

    def check(self, attributes: Attributes, operands: Sequence[Signal]) -> list[Signal]:
        """Signals of the results. Pure.  Raises ConfigError if operands or attributes do not fit."""
        low, high = self.num_operands
        if not low <= len(operands) <= high:
            expected = str(low) if low == high else f"{low} to {high}"
            raise ConfigError(f"{attributes.operation}: got {len(operands)} operands, expected {expected}")
        for slot, operand in enumerate(operands):
            wants_integers = slot in self.integer_operands
            if (operand.dtype is INTEGERS) != wants_integers:
                expected = "integers" if wants_integers else "a float tensor"
                raise ConfigError(
                    f"{attributes.operation}: operand {slot}: got {operand.dtype.name}, expected {expected}"
                )
        return self.infer(attributes, operands)


def tensors(values: Sequence[Any]) -> list[TensorRef]:
    """The operands of an operation that takes tensors only (`Operator.check` has seen to it)."""
    return cast("list[TensorRef]", list(values))


def agree(left: int, right: int) -> bool:
    """Whether two dims may be the same size."""
    return left == right or -1 in (left, right)


def static_size(shape: Sequence[int]) -> int:
    """Product of the known dims."""
    size = 1
    for dim in shape:
        size *= 1 if dim == -1 else dim
    return size
