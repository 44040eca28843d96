"""Operations over lists of tensors, and operations that are awaited: each judged as the single, direct one."""

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
from ferrum_ref.parity.ops.operation import IID, Case, Expected, Inputs, Operation, bounded, case, models_of
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
            axes = tuple(f"axis{axis}" for axis in range(value.ndim))
            outputs.append(bounded(f"y{index}", value, axes, models, errors))
        return outputs


class MatMulAsync(MatMul):
    name = "matmul_async"

    @property
    def algorithm_name(self) -> str:
        return "matmul"

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        a, b = bridge.tensor(backend, inputs, "a"), bridge.tensor(backend, inputs, "b")
        return bridge.host(_awaited(bridge.async_ops(backend).matmul_async(a, b)))


class SoftmaxAsync(Softmax):
    name = "softmax_async"

    @property
    def algorithm_name(self) -> str:
        return "softmax"

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        x = bridge.tensor(backend, inputs, "x")
        return bridge.host(_awaited(bridge.async_ops(backend).softmax_async(x, inputs.case.sizes["axis"])))


def _awaited(operation: Coroutine[Any, Any, TensorRef]) -> TensorRef:
    return asyncio.run(operation)
