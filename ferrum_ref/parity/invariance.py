"""The same input twice, and each row of a batch alone: do the same bits come out?

A kernel that gives other bits when it is repeated cannot be debugged, and fails. One that gives other bits for a row
alone than in a batch is common (another tile, another order of sums): that is reported, and is right as long as both
results lie within their bounds. One that gives its workspace away as its result fails: the next call overwrites it.
Clauses: PA-INVARIANT-1..4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.parity.ops.operation import Inputs, Operation
from ferrum_ref.parity.ops.packed import PACKED
from ferrum_ref.parity.runner import draw_case
from ferrum_ref.parity.subject import Subject
from ferrum_ref.parity.units import STORAGES, Array, Storage, storage_named
from ferrum_ref.parity.verdict import judge

SAME, CLOSE, DIFFERENT, UNSUPPORTED = "same bits", "within bounds", "different", "unsupported"
BATCHED: Mapping[str, tuple[Sequence[str], Sequence[str]]] = MappingProxyType(
    {
        "rms_norm": (("x",), ()),
        "rms_norm_residual": (("x", "residual"), ()),
        "layer_norm": (("x",), ()),
        "rotary_embedding": (("x",), ()),
        "attention": (("q", "k", "v"), ()),
        "paged_attention": (("q",), ("table", "lens")),
        "silu_mul": (("gate", "up"), ()),
        "gelu": (("x",), ()),
        "linear": (("x",), ()),
        "quantized_linear_q4_0": (("x",), ()),
        "quantized_linear_q8_0": (("x",), ()),
        **{operation.name: (("x",), ()) for operation in PACKED},
        "softmax": (("x",), ()),
        "softmax_async": (("x",), ()),
        "silu": (("x",), ()),
        "tensor_gelu": (("x",), ()),
        "gelu_tanh": (("x",), ()),
        "tensor_rms_norm": (("x",), ()),
    }
)
"""Operations with a batch, and which of their arrays and settings have it as first axis."""
MAX_ROWS_ALONE = 8  # of a batch, first and last among them


@dataclass(frozen=True, slots=True)
class Invariance:
    """repeated: of the same call twice; alone: of each row alone beside the batch; where the worst was seen."""

    operation: str
    dtype: str
    repeated: str
    alone: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        return DIFFERENT not in (self.repeated, self.alone)


def check_invariance(subject: Subject, operation: Operation, storage: Storage, seed: int) -> Invariance:
    """Every small case with a batch of two rows or more, run twice and row by row. Pure."""
    repeated = alone = SAME
    detail = ""
    try:
        subject.check_offers(storage)
        for index, case in enumerate(operation.cases):
            if not case.small:
                continue
            inputs = draw_case(operation, storage, index, seed)
            if _batch_size(operation, inputs) < 2:
                continue
            whole = subject.run(operation, inputs)
            first = [np.array(output) for output in whole]
            if not _equal(first, subject.run(operation, inputs)):
                repeated, detail = DIFFERENT, f"case {index} ({inputs.case.label}) gives other bits the second time"
            found = _rows_alone(subject, operation, inputs, first)
            subject.run(operation, draw_case(operation, storage, index, seed + 1))  # of one shape, with other numbers
            if not _equal(first, whole):
                repeated, detail = DIFFERENT, f"case {index} ({inputs.case.label}): a later call overwrites the result"
            if found == DIFFERENT or (found == CLOSE and alone == SAME):
                alone, detail = found, detail or f"case {index} ({inputs.case.label}), rows alone: {found}"
    except UnsupportedError as error:
        return Invariance(operation.name, storage.name, UNSUPPORTED, UNSUPPORTED, error.message)
    return Invariance(operation.name, storage.name, repeated, alone, detail)


def check_all(
    subject: Subject, seed: int, operations: Sequence[Operation], dtypes: Sequence[str] = ()
) -> Iterator[Invariance]:
    """Every operation that has a batch, on the named dtypes or on all."""
    for operation in operations:
        if operation.name in BATCHED:
            for storage in [storage_named(name) for name in dtypes] or STORAGES.values():
                yield check_invariance(subject, operation, storage, seed)


def _batch_size(operation: Operation, inputs: Inputs) -> int:
    arrays, _ = BATCHED[operation.name]
    first = inputs.arrays[arrays[0]]
    axis_is_last = first.ndim < 2 or inputs.case.sizes.get("axis", -1) in (0, -first.ndim)
    return 0 if axis_is_last else first.shape[0]


def _rows_alone(subject: Subject, operation: Operation, inputs: Inputs, whole: Sequence[Array]) -> str:
    """SAME if every row alone gives its bits, CLOSE if some differ but keep their bounds."""
    worst = SAME
    size = _batch_size(operation, inputs)
    for row in np.unique(np.linspace(0, size - 1, min(size, MAX_ROWS_ALONE)).astype(int)).tolist():
        one = row_of(operation, inputs, row)
        outputs = subject.run(operation, one)
        if _equal(outputs, [output[row : row + 1] for output in whole]):
            continue
        with np.errstate(all="ignore"):
            expected = operation.expect(one, subject.declared(operation))
        if not all(judge(wanted, got).passed for wanted, got in zip(expected, outputs, strict=True)):
            return DIFFERENT
        worst = CLOSE
    return worst


def row_of(operation: Operation, inputs: Inputs, row: int) -> Inputs:
    """The case with one row of its batch. Pure."""
    arrays, settings = BATCHED[operation.name]
    return replace(
        inputs,
        arrays={name: one[row : row + 1] if name in arrays else one for name, one in inputs.arrays.items()},
        settings={name: one[row : row + 1] if name in settings else one for name, one in inputs.settings.items()},
    )


def _equal(first: Sequence[Array], second: Sequence[Array]) -> bool:
    return all(
        one.shape == other.shape and np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()
        for one, other in zip(first, second, strict=True)
    )
