"""Softmax along any axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.parity import oracle
from ferrum_ref.parity.bounds.softmax import softmax_error
from ferrum_ref.parity.ops import bridge, draws
from ferrum_ref.parity.ops.operation import (
    DRAWN,
    IID,
    NOT_FINITE,
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


class Softmax(Operation):
    name = "softmax"
    cases = (
        case(IID, shape=(3, 7), axis=-1),
        case(IID, shape=(2, 129), axis=-1),
        case("wide", shape=(3, 65), axis=-1),
        case("offset", shape=(3, 33), axis=-1),
        case("masked", shape=(4, 40), axis=-1),
        case(IID, shape=(2, 1), axis=-1),
        case(IID, shape=(5, 4, 3), axis=1),
        case(IID, shape=(6, 5), axis=0),
        case("equal", shape=(2, 100), axis=-1),
        case("one winner", shape=(2, 64), axis=-1),
        case("nothing visible", shape=(3, 9), axis=-1),
        case("strided", shape=(3, 40), axis=-1),
        case(IID, shape=(0, 8), axis=-1),
        case(IID, shape=(2, 1000), axis=-1),
        case(IID, small=False, shape=(1, 49152), axis=-1),
        case("far apart", shape=(3, 17), axis=-1),
        case(DRAWN, number=1),
        case(DRAWN, number=2),
        case("offset below", shape=(3, 33), axis=-1),
        case(NOT_FINITE, shape=(4, 20), axis=-1),
    )

    def draw_sizes(self, rng: np.random.Generator) -> Mapping[str, Any]:
        shape = draws.shape(rng, 3, 130)
        return {"shape": shape, "axis": int(rng.integers(-len(shape), len(shape)))}

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        shape = case.sizes["shape"]
        x = rng.standard_normal(shape)
        if case.probe == "wide":
            x = rng.uniform(-60.0, 60.0, shape)
        if case.probe == "offset":  # overflows unless the maximum is taken off
            x = 0.4 * x + 1000.0
        if case.probe == "offset below":  # nothing is left where the maximum is taken with zero
            x = 0.4 * x - 1000.0
        if case.probe == NOT_FINITE:  # two lanes are NaN, the others are what they are without them
            x[0, 3], x[1, 5] = np.nan, np.inf
        if case.probe == "far apart":  # every probability but one is below the accumulator's range
            x = 100.0 * np.arange(shape[-1]) * np.ones(shape)
        if case.probe == "equal":
            x = np.full(shape, 0.75)
        if case.probe == "one winner":
            x[:, rng.integers(shape[-1])] = 30.0
        if case.probe == "masked":
            x[rng.random(shape) < 0.5] = -np.inf
            x[:, 0] = 0.0
        if case.probe == "nothing visible":
            x[1] = -np.inf
        stored = storage.round(x)
        return Inputs(case, storage, {"x": draws.strided(stored) if case.probe == "strided" else stored})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        x = bridge.tensor(backend, inputs, "x")
        return bridge.host(backend.tensor_ops().softmax(x, inputs.case.sizes["axis"]))

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        x, axis = inputs.exact("x"), inputs.case.sizes["axis"]
        value = oracle.softmax(x, axis)
        models = models_of(inputs, algorithm, value.size)
        lanes, probabilities = np.moveaxis(x, axis, -1), np.moveaxis(value, axis, -1)
        errors = [np.moveaxis(softmax_error(model, lanes, probabilities), -1, axis) for model in models]
        return [bounded("p", value, axes_of(x.ndim), models, errors)]
