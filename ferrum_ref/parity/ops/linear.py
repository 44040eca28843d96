"""Projections and matrix products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.parity import oracle
from ferrum_ref.parity.bounds.dot import dot_error
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
    models_of,
)
from ferrum_ref.parity.units import Array, Storage
from ferrum_ref.types.algorithm import Algorithm

LOST_TERM = 2.0**-24 * (1.0 - 2.0**-20)


def _around_largest(rng: np.random.Generator, shape: tuple[int, ...], storage: Storage) -> Array:
    """Positive factors whose sums of 16 products lie around float16's largest number, or a third of another type's.

    Beyond float16 an accumulator still has room; where it has none, what comes after an infinity is open.
    """
    room = 9.0 if storage.name == "fp16" else 64.0
    return np.asarray(rng.uniform(0.4, 1.1, shape) * (storage.largest / room) ** 0.5)


class Linear(Operation):
    """x (..., K), weight (N, K)."""

    name = "linear"
    cases = (
        case(IID, x=(3, 7), N=5),
        case(IID, x=(4, 127), N=33),
        case("tail of K", x=(3, 129), N=9),
        case("one-hot rows", x=(6, 64), N=17),
        case(IID, x=(1, 1), N=1),
        case(IID, x=(2, 2), N=3),
        case(IID, x=(2, 64), N=64),
        case(IID, x=(2, 3, 80), N=24),
        case(IID, x=(96,), N=12),
        case("positive", x=(2, 255), N=8),
        case("cancelling", x=(2, 66), N=8),
        case("strided", x=(3, 40), N=6),
        case("transposed weight", x=(3, 40), N=6),
        case(IID, x=(0, 64), N=8),
        case(IID, x=(2, 0), N=3),
        case(IID, x=(2, 8), N=0),
        case(IID, small=False, x=(5, 576), N=192),
        case(IID, small=False, x=(2, 4096), N=16),
        case("tail of K", small=False, x=(2, 1536), N=64),
        case(IID, small=False, x=(1, 16384), N=4),
        case("subnormal", x=(3, 33), N=5),
        case("lost terms", x=(2, 250), N=3),
        case(DRAWN, number=1),
        case(DRAWN, number=2),
        case(IID, x=(18, 24), N=130),
        case(IID, x=(130, 17), N=9),
        case("packed", x=(3, 40), N=6),
        case(NOT_FINITE, x=(4, 40), N=6),
        case(OVERFLOW, x=(6, 16), N=9),
    )

    def draw_sizes(self, rng: np.random.Generator) -> Mapping[str, Any]:
        return {"x": draws.shape(rng, 3, 200), "N": draws.size(rng, 130)}

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        shape = case.sizes["x"]
        size, num_columns = shape[-1], case.sizes["N"]
        x, weight = rng.standard_normal(shape), rng.standard_normal((num_columns, size)) * max(size, 1) ** -0.5
        if case.probe == "tail of K":  # the last terms carry the answer
            x[..., :-1] *= 0.01
            x[..., -1] = 8.0
        if case.probe == "one-hot rows":
            x = np.eye(size)[rng.permutation(size)[: shape[0]]]
        if case.probe == "positive":
            x, weight = np.abs(x), np.abs(weight)
        if case.probe == "lost terms":  # each is just below half a unit of the first: a running sum may lose all
            x, weight = np.full(shape, LOST_TERM), np.ones_like(weight)
            x[..., 0] = 1.0
        if case.probe == "subnormal":  # products below the storage type's range, sums within
            x = x * 0.25 * storage.smallest_normal
        if case.probe == "cancelling":
            x[..., size // 2 :], weight[:, size // 2 :] = x[..., : size // 2], -weight[:, : size // 2]
            x[..., 0] *= 1.0 + 0.01 * rng.standard_normal()
        if case.probe == NOT_FINITE:  # one row only: the others are what they are without it
            x[0, rng.integers(size)] = np.nan
        if case.probe == OVERFLOW:
            x, weight = _around_largest(rng, x.shape, storage), _around_largest(rng, weight.shape, storage)
        stored_x, stored_weight = draws.laid_out(storage.round(x), case.probe), storage.round(weight)
        if case.probe == "transposed weight":
            stored_weight = draws.swapped(stored_weight, 0, 1)
        return Inputs(case, storage, {"x": stored_x, "weight": stored_weight})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        x, weight = bridge.tensor(backend, inputs, "x"), bridge.tensor(backend, inputs, "weight")
        return bridge.host(bridge.linear_ops(backend).linear(x, weight))

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        x, weight = inputs.exact("x"), inputs.exact("weight")
        value = oracle.linear(x, weight)
        models = models_of(inputs, algorithm, value.size)
        rows = x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])
        flat = value.reshape(rows.shape[0], weight.shape[0])
        errors = [dot_error(model, rows, weight.T, flat).reshape(value.shape) for model in models]
        return [bounded("y", value, axes_of(value.ndim, "row", "column"), models, errors)]


class MatMul(Operation):
    """a (..., M, K), b (..., K, N), leading axes broadcast."""

    name = "matmul"
    cases = (
        case(IID, a=(3, 7), b=(7, 5)),
        case(IID, a=(2, 4, 33), b=(2, 33, 9)),
        case("tail of K", a=(3, 65), b=(65, 4)),
        case(IID, a=(1, 1), b=(1, 1)),
        case(IID, a=(2, 1, 3, 16), b=(5, 16, 2)),
        case(IID, a=(3, 0), b=(0, 2)),
        case("strided", a=(3, 40), b=(40, 6)),
        case(IID, small=False, a=(2, 2048), b=(2048, 16)),
        case(DRAWN, number=1),
        case(DRAWN, number=2),
        case(IID, a=(33, 20), b=(20, 70)),
        case("transposed weight", a=(3, 40), b=(40, 6)),
        case(OVERFLOW, a=(6, 16), b=(16, 9)),
    )

    def draw_sizes(self, rng: np.random.Generator) -> Mapping[str, Any]:
        rows, terms, columns = (draws.size(rng, 130) for _ in range(3))
        batch = draws.shape(rng, 2, 3) if rng.random() < 0.5 else ()
        return {"a": (*batch, rows, terms), "b": (*batch[int(rng.integers(len(batch) + 1)) :], terms, columns)}

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        a, b = rng.standard_normal(case.sizes["a"]), rng.standard_normal(case.sizes["b"])
        if case.probe == "tail of K":
            a[..., :-1] *= 0.01
            a[..., -1] = 8.0
        if case.probe == OVERFLOW:
            a, b = _around_largest(rng, a.shape, storage), _around_largest(rng, b.shape, storage)
        left, right = storage.round(a), storage.round(b)
        if case.probe == "transposed weight":
            right = draws.swapped(right, 0, 1)
        if case.probe == "strided":
            left, right = draws.strided(left), draws.strided(right)
        return Inputs(case, storage, {"a": left, "b": right})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        a, b = bridge.tensor(backend, inputs, "a"), bridge.tensor(backend, inputs, "b")
        return bridge.host(backend.tensor_ops().matmul(a, b))

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        a, b = inputs.exact("a"), inputs.exact("b")
        value = oracle.matmul(a, b)
        models = models_of(inputs, algorithm, value.size)
        errors = [dot_error(model, a, b, value) for model in models]
        return [bounded("y", value, axes_of(value.ndim, "row", "column"), models, errors)]
