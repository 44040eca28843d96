"""Operations over lists of tensors, and operations that are awaited: each judged as the single, direct one.

Two calls are awaited at the same time, and the first is judged.  Clauses: PA-CASE-1, PA-CASE-5.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.parity import oracle
from ferrum_ref.parity.bounds.dot import dot_error
from ferrum_ref.parity.ops import bridge, draws
from ferrum_ref.parity.ops.linear import MatMul
from ferrum_ref.parity.ops.operation import IID, Case, Expected, Inputs, Operation, axes_of, bounded, case, models_of
from ferrum_ref.parity.ops.softmax import Softmax
from ferrum_ref.parity.units import Array, Storage
from ferrum_ref.types.algorithm import Algorithm


class BatchMatMul(Operation):
    """[a_i @ b_i]: pairs of different sizes, one output each."""

    name = "batch_matmul"
    cases = (
        case(IID, pairs=(((3, 7), (7, 5)), ((1, 65), (65, 2)))),
        case(IID, pairs=(((2, 3, 16), (16, 4)),)),
        case("strided", pairs=(((3, 40), (40, 6)), ((2, 8), (8, 1)))),
        case(IID, pairs=(((2, 0), (0, 3)), ((0, 3), (3, 2)), ((1, 1), (1, 1)))),
    )

    @property
    def algorithm_name(self) -> str:
        return "matmul"

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        arrays = {}
        for index, pair in enumerate(case.sizes["pairs"]):
            for side, shape in zip("ab", pair, strict=True):
                array = draws.normal(rng, shape, storage)
                arrays[f"{side}{index}"] = draws.strided(array) if case.probe == "strided" else array
        return Inputs(case, storage, arrays)

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        left, right = (
            [bridge.tensor(backend, inputs, name) for name in inputs.arrays if name[0] == side] for side in "ab"
        )
        return bridge.host(*bridge.batch_ops(backend).batch_matmul(left, right))

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        outputs = []
        for index in range(len(inputs.case.sizes["pairs"])):
            a, b = inputs.exact(f"a{index}"), inputs.exact(f"b{index}")
            value = oracle.matmul(a, b)
            models = models_of(inputs, algorithm, value.size)
            errors = [dot_error(model, a, b, value) for model in models]
            outputs.append(bounded(f"y{index}", value, axes_of(value.ndim, "row", "column"), models, errors))
        return outputs


class MatMulAsync(MatMul):
    name = "matmul_async"

    @property
    def algorithm_name(self) -> str:
        return "matmul"

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        a, b = bridge.tensor(backend, inputs, "a"), bridge.tensor(backend, inputs, "b")
        ops, other = bridge.async_ops(backend), _reversed(backend, inputs, "a")
        return bridge.host(_first_of(ops.matmul_async(a, b), ops.matmul_async(other, b)))


class SoftmaxAsync(Softmax):
    name = "softmax_async"

    @property
    def algorithm_name(self) -> str:
        return "softmax"

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        x, axis = bridge.tensor(backend, inputs, "x"), inputs.case.sizes["axis"]
        ops, other = bridge.async_ops(backend), _reversed(backend, inputs, "x")
        return bridge.host(_first_of(ops.softmax_async(x, axis), ops.softmax_async(other, axis)))


def _reversed(backend: ComputeBackend, inputs: Inputs, name: str) -> TensorRef:
    """Other numbers of the same shape, for a second call at the same time."""
    return backend.tensor_factory().from_numpy(np.ascontiguousarray(np.flip(inputs.arrays[name])))


def _first_of(*operations: Coroutine[Any, Any, TensorRef]) -> TensorRef:
    """The first one's result, all of them being awaited at the same time: calls must not share a workspace."""

    async def together() -> TensorRef:
        return (await asyncio.gather(*operations))[0]

    return asyncio.run(together())
