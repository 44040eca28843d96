"""SiLU, gated SiLU and GELU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.parity import oracle
from ferrum_ref.parity.bounds.activation import gelu_erf_error, gelu_tanh_error, silu_error
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

SHAPES = (
    case(IID, shape=(3, 7)),
    case("wide", shape=(2, 129)),
    case("saturated", shape=(2, 64)),
    case("around zero", shape=(2, 64)),
    case(IID, shape=(1,)),
    case(IID, shape=(2, 3, 80)),
    case("subnormal", shape=(2, 33)),
    case("zeros", shape=(2, 16)),
    case("strided", shape=(3, 70)),
    case(IID, shape=(0, 5)),
    case(IID, small=False, shape=(5, 1536)),
    case(IID, shape=(8, 128)),
    case("far left", shape=(2, 65)),
    case(DRAWN, number=1),
    case(DRAWN, number=2),
    case(IID, shape=(70, 33)),
    case("packed", shape=(3, 40)),
    case(NOT_FINITE, shape=(3, 8)),
)


def _draw(case: Case, storage: Storage, rng: np.random.Generator) -> Array:
    shape = case.sizes["shape"]
    scales = {"around zero": 1e-3, "subnormal": 0.25 * storage.smallest_normal, "zeros": 0.0}
    if case.probe == "wide":
        return draws.uniform(rng, shape, storage, -12.0, 12.0)
    if case.probe == "saturated":
        return storage.round(rng.choice([-1.0, 1.0], shape) * rng.uniform(20.0, 110.0, shape))
    if case.probe == "far left":  # exp(-x) is near the end of its range, the result near zero
        return draws.uniform(rng, shape, storage, -110.0, -60.0)
    x = draws.normal(rng, shape, storage, scales.get(case.probe, 1.0))
    if case.probe == NOT_FINITE:
        x[:, :2] = np.inf, np.nan
    return draws.laid_out(x, case.probe)


class _Activation(Operation):
    cases = SHAPES

    def draw_sizes(self, rng: np.random.Generator) -> Mapping[str, Any]:
        return {"shape": draws.shape(rng, 3, 200)}


class SiluMul(_Activation):
    name = "silu_mul"

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        gate = _draw(case, storage, rng)
        up = draws.normal(rng, gate.shape, storage)
        return Inputs(case, storage, {"gate": gate, "up": draws.laid_out(up, case.probe)})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        gate, up = bridge.tensor(backend, inputs, "gate"), bridge.tensor(backend, inputs, "up")
        return bridge.host(bridge.activation_ops(backend).silu_mul(gate, up))

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        gate, up = inputs.exact("gate"), inputs.exact("up")
        value = oracle.silu_mul(gate, up)
        models = models_of(inputs, algorithm, value.size)
        errors = [silu_error(model, gate, up, value) for model in models]
        return [bounded("y", value, axes_of(value.ndim, "element"), models, errors)]


class Silu(_Activation):
    name = "silu"

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        return Inputs(case, storage, {"x": _draw(case, storage, rng)})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        return bridge.host(backend.tensor_ops().silu(bridge.tensor(backend, inputs, "x")))

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        x = inputs.exact("x")
        value = oracle.silu(x)
        models = models_of(inputs, algorithm, value.size)
        errors = [silu_error(model, x, 1.0, value) for model in models]
        return [bounded("y", value, axes_of(value.ndim, "element"), models, errors)]


class Gelu(_Activation):
    """The erf form."""

    name = "gelu"

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        return Inputs(case, storage, {"x": _draw(case, storage, rng)})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        return bridge.host(bridge.activation_ops(backend).gelu(bridge.tensor(backend, inputs, "x")))

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        x = inputs.exact("x")
        value = oracle.gelu(x)
        models = models_of(inputs, algorithm, value.size)
        errors = [gelu_erf_error(model, x, value) for model in models]
        return [bounded("y", value, axes_of(value.ndim, "element"), models, errors)]


class TensorGelu(Gelu):
    """The erf form among the primitive operations."""

    name = "tensor_gelu"

    @property
    def algorithm_name(self) -> str:
        return "gelu"

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        return bridge.host(backend.tensor_ops().gelu(bridge.tensor(backend, inputs, "x")))


class GeluTanh(Gelu):
    """The tanh form, an option of the primitive operation."""

    name = "gelu_tanh"

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        x = bridge.tensor(backend, inputs, "x")
        return bridge.host(backend.tensor_ops().gelu(x, approximate="tanh"))

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        x = inputs.exact("x")
        value = oracle.gelu_tanh(x)
        models = models_of(inputs, algorithm, value.size)
        errors = [gelu_tanh_error(model, x, value) for model in models]
        return [bounded("y", value, axes_of(value.ndim, "element"), models, errors)]
