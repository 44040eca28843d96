"""Sums, differences, products and quotients of two tensors, with broadcasting; and relu."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.tensor import TensorOps, TensorRef
from ferrum_ref.parity.bounds.elementwise import elementwise_error, quotient_error
from ferrum_ref.parity.error_model import ErrorModel
from ferrum_ref.parity.ops import bridge, draws
from ferrum_ref.parity.ops.operation import (
    DRAWN,
    IID,
    NOT_FINITE,
    OVERFLOW,
    Case,
    Expected,
    Inputs,
    Operation,
    axes_of,
    bounded,
    case,
    exact,
    models_of,
)
from ferrum_ref.parity.units import Array, Storage
from ferrum_ref.types.algorithm import Algorithm

BINARY_CASES = (
    case(IID, a=(3, 7), b=(3, 7)),
    case(IID, a=(2, 3, 80), b=(80,)),
    case(IID, a=(4, 1, 5), b=(3, 1)),
    case("subnormal", a=(3, 16), b=(3, 16)),
    case("strided", a=(3, 40), b=(3, 40)),
    case(IID, a=(0, 5), b=(0, 5)),
    case(NOT_FINITE, a=(9, 10), b=(9, 10)),
    case(IID, a=(), b=()),
    case(DRAWN, number=1),
    case(DRAWN, number=2),
    case(IID, a=(41, 103), b=(41, 103)),
    case(IID, small=False, a=(300, 1031), b=(1031,)),
    case("packed", a=(3, 40), b=(3, 40)),
    case(OVERFLOW, a=(4, 16), b=(4, 16)),
)
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -2.0, 0.5, 3.0])


class _Binary(Operation):
    cases = BINARY_CASES

    def draw_sizes(self, rng: np.random.Generator) -> Mapping[str, Any]:
        shape = draws.shape(rng, 3, 70)
        broadcast = tuple(1 if rng.random() < 0.3 else size for size in shape)
        return {"a": shape, "b": broadcast[int(rng.integers(len(shape))) :]}

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        scale = 0.25 * storage.smallest_normal if case.probe == "subnormal" else 1.0
        a, b = draws.normal(rng, case.sizes["a"], storage, scale), draws.normal(rng, case.sizes["b"], storage)
        if case.probe == NOT_FINITE:  # every special value meets every other one
            a[:, :-1], b[:, :-1] = storage.round(SPECIAL)[:, None], storage.round(SPECIAL)[None, :]
        if case.probe == OVERFLOW:
            a, b = (storage.round(storage.largest * rng.uniform(0.4, 0.9, case.sizes[name])) for name in "ab")
        return Inputs(case, storage, {"a": draws.laid_out(a, case.probe), "b": draws.laid_out(b, case.probe)})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        a, b = bridge.tensor(backend, inputs, "a"), bridge.tensor(backend, inputs, "b")
        return bridge.host(self.apply(backend.tensor_ops(), a, b))

    @abstractmethod
    def apply(self, ops: TensorOps, a: TensorRef, b: TensorRef) -> TensorRef:
        """The backend's operation."""

    @abstractmethod
    def value(self, a: Array, b: Array) -> Array:
        """The float64 result."""

    def error(self, model: ErrorModel, value: Array) -> Array:
        return elementwise_error(model, 1, np.abs(value))

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        with np.errstate(all="ignore"):
            value = np.asarray(self.value(inputs.exact("a"), inputs.exact("b")))
            models = models_of(inputs, algorithm, value.size)
            errors = [self.error(model, value) for model in models]
        return [bounded("y", value, axes_of(value.ndim), models, errors)]


class Add(_Binary):
    name = "add"

    def apply(self, ops: TensorOps, a: TensorRef, b: TensorRef) -> TensorRef:
        return ops.add(a, b)

    def value(self, a: Array, b: Array) -> Array:
        return np.asarray(a + b)


class Sub(_Binary):
    name = "sub"

    def apply(self, ops: TensorOps, a: TensorRef, b: TensorRef) -> TensorRef:
        return ops.sub(a, b)

    def value(self, a: Array, b: Array) -> Array:
        return np.asarray(a - b)


class Mul(_Binary):
    name = "mul"

    def apply(self, ops: TensorOps, a: TensorRef, b: TensorRef) -> TensorRef:
        return ops.mul(a, b)

    def value(self, a: Array, b: Array) -> Array:
        return np.asarray(a * b)


class Div(_Binary):
    name = "div"

    def apply(self, ops: TensorOps, a: TensorRef, b: TensorRef) -> TensorRef:
        return ops.div(a, b)

    def value(self, a: Array, b: Array) -> Array:
        return np.asarray(a / b)

    def error(self, model: ErrorModel, value: Array) -> Array:
        return quotient_error(model, value)


class Relu(Operation):
    """max(x, 0), exact; NaN stays. A zero of either sign is left out: both signs are a right answer."""

    name = "relu"
    cases = (
        case(IID, shape=(3, 7)),
        case("special values", shape=(2, 3, 80)),
        case("strided", shape=(3, 40)),
        case(IID, shape=(0, 5)),
        case(IID, shape=()),
        case("subnormal", shape=(2, 129)),
        case(DRAWN, number=1),
        case(IID, shape=(41, 103)),
    )

    def draw_sizes(self, rng: np.random.Generator) -> Mapping[str, Any]:
        return {"shape": draws.shape(rng, 4, 40)}

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        scale = 0.25 * storage.smallest_normal if case.probe == "subnormal" else 1.0
        x = draws.normal(rng, case.sizes["shape"], storage, scale)
        if case.probe == "special values":
            x[..., :3] = storage.round(np.array([np.inf, -np.inf, np.nan]))
        x = np.asarray(np.where(x == 0, storage.round(np.array(1.0)), x))
        return Inputs(case, storage, {"x": draws.strided(x) if case.probe == "strided" else x})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        return bridge.host(backend.tensor_ops().relu(bridge.tensor(backend, inputs, "x")))

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        x = inputs.arrays["x"]
        return [exact("y", np.where(x < 0, np.zeros_like(x), x))]
