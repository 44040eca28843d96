"""Sums and products of two tensors, with broadcasting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.tensor import TensorOps, TensorRef
from ferrum_ref.parity.bounds.elementwise import elementwise_error
from ferrum_ref.parity.ops import bridge, draws
from ferrum_ref.parity.ops.operation import IID, Case, Expected, Inputs, Operation, bounded, case, models_of
from ferrum_ref.parity.units import Array, Storage
from ferrum_ref.types.algorithm import Algorithm


class _Binary(Operation):
    cases = (
        case(IID, a=(3, 7), b=(3, 7)),
        case(IID, a=(2, 3, 80), b=(80,)),
        case(IID, a=(4, 1, 5), b=(3, 1)),
        case("subnormal", a=(3, 16), b=(3, 16)),
        case("strided", a=(3, 40), b=(3, 40)),
        case(IID, a=(0, 5), b=(0, 5)),
    )

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        scale = 0.25 * storage.smallest_normal if case.probe == "subnormal" else 1.0
        a, b = draws.normal(rng, case.sizes["a"], storage, scale), draws.normal(rng, case.sizes["b"], storage)
        if case.probe == "strided":
            a, b = draws.strided(a), draws.strided(b)
        return Inputs(case, storage, {"a": a, "b": b})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        a, b = bridge.tensor(backend, inputs, "a"), bridge.tensor(backend, inputs, "b")
        return bridge.host(self.apply(backend.tensor_ops(), a, b))

    def apply(self, ops: TensorOps, a: TensorRef, b: TensorRef) -> TensorRef:
        return ops.add(a, b)

    def value(self, a: Array, b: Array) -> Array:
        return np.asarray(a + b)

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        value = self.value(inputs.exact("a"), inputs.exact("b"))
        models = models_of(inputs, algorithm, value.size)
        errors = [elementwise_error(model, 1, np.abs(value)) for model in models]
        return [bounded("y", value, tuple(f"axis{index}" for index in range(value.ndim)), models, errors)]


class Add(_Binary):
    name = "add"


class Mul(_Binary):
    name = "mul"

    def apply(self, ops: TensorOps, a: TensorRef, b: TensorRef) -> TensorRef:
        return ops.mul(a, b)

    def value(self, a: Array, b: Array) -> Array:
        return np.asarray(a * b)
