"""RMSNorm, RMSNorm of a residual sum, LayerNorm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.parity import oracle
from ferrum_ref.parity.bounds.elementwise import elementwise_error
from ferrum_ref.parity.bounds.norm import layer_norm_error, rms_norm_error
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

EPS = 1e-5


def _draw_rows(case: Case, storage: Storage, rng: np.random.Generator) -> Array:
    """x of a norm: the probe decides how its size relates to sqrt(eps) and to the storage type's range."""
    shape, eps = case.sizes["shape"], case.sizes.get("eps", EPS)
    scales = {
        "near sqrt(eps)": eps**0.5,
        "below sqrt(eps)": 0.05 * eps**0.5,
        "large": 200.0,
        "subnormal": 0.25 * storage.smallest_normal,
        "zeros": 0.0,
    }
    x = draws.normal(rng, shape, storage, scales.get(case.probe, 1.0))
    if case.probe == "outlier":
        x = draws.normal(rng, shape, storage, 0.01)
        x[..., rng.integers(shape[-1])] = 100.0
    if case.probe == "far from zero":
        x = storage.round(1000.0 + rng.standard_normal(shape))
    if case.probe == "shifted":
        x = storage.round(30.0 + rng.standard_normal(shape))
    if case.probe == NOT_FINITE:  # one row only: the others are what they are without it
        x[0, rng.integers(shape[-1])] = np.nan
    return draws.laid_out(x, case.probe)


class RmsNorm(Operation):
    name = "rms_norm"
    cases = (
        case(IID, shape=(3, 7)),
        case(IID, shape=(4, 64)),
        case("near sqrt(eps)", shape=(4, 33)),
        case("outlier", shape=(3, 70)),
        case(IID, shape=(1, 1)),
        case(IID, shape=(2, 2)),
        case(IID, shape=(3, 80)),
        case(IID, shape=(2, 127)),
        case(IID, shape=(2, 129), eps=1e-6),
        case(IID, shape=(2, 3, 96)),
        case(IID, shape=(576,)),
        case("below sqrt(eps)", shape=(3, 100), eps=1e-6),
        case("large", shape=(2, 640)),
        case("subnormal", shape=(2, 40)),
        case("zeros", shape=(2, 16)),
        case("strided", shape=(3, 70)),
        case(IID, shape=(0, 64)),
        case(IID, shape=(5, 576)),
        case(IID, small=False, shape=(2, 4096)),
        case(IID, small=False, shape=(1, 16384)),
        case(DRAWN, number=1),
        case(DRAWN, number=2),
        case(IID, shape=(70, 48)),
        case("packed", shape=(3, 40)),
        case(NOT_FINITE, shape=(5, 33)),
        case(IID, small=False, shape=(70001, 3)),
    )

    def draw_sizes(self, rng: np.random.Generator) -> Mapping[str, Any]:
        return {"shape": draws.shape(rng, 3, 300)}

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        x = _draw_rows(case, storage, rng)
        weight = draws.gain(rng, x.shape[-1], storage)
        return Inputs(case, storage, {"x": x, "weight": weight}, {"eps": case.sizes.get("eps", EPS)})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        x, weight = bridge.tensor(backend, inputs, "x"), bridge.tensor(backend, inputs, "weight")
        return bridge.host(bridge.norm_ops(backend).rms_norm(x, weight, inputs.settings["eps"]))

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        x, weight, eps = inputs.exact("x"), inputs.exact("weight"), inputs.settings["eps"]
        value = oracle.rms_norm(x, weight, eps)
        models = models_of(inputs, algorithm, value.size)
        errors = [rms_norm_error(model, x, eps, value) for model in models]
        return [bounded("y", value, axes_of(value.ndim, "row", "feature"), models, errors)]


class TensorRmsNorm(RmsNorm):
    """The same among the primitive operations."""

    name = "tensor_rms_norm"

    @property
    def algorithm_name(self) -> str:
        return "rms_norm"

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        x, weight = bridge.tensor(backend, inputs, "x"), bridge.tensor(backend, inputs, "weight")
        return bridge.host(backend.tensor_ops().rms_norm(x, weight, inputs.settings["eps"]))


class RmsNormResidual(Operation):
    name = "rms_norm_residual"
    cases = (
        case(IID, shape=(5, 65)),
        case("growing residual", shape=(4, 96)),
        case("cancelling", shape=(3, 40)),
        case(IID, shape=(1, 1)),
        case(IID, shape=(2, 3, 80)),
        case(IID, shape=(3, 127)),
        case("near sqrt(eps)", shape=(4, 33)),
        case("outlier", shape=(3, 70)),
        case("zeros", shape=(2, 16)),
        case("strided", shape=(3, 70)),
        case(IID, shape=(0, 64)),
        case(IID, shape=(4, 576), eps=1e-6),
        case(IID, small=False, shape=(2, 4096)),
        case(DRAWN, number=1),
        case(DRAWN, number=2),
        case("near sqrt(eps)", shape=(4, 33), eps=1e-6),
        case(IID, shape=(70, 48)),
        case("packed", shape=(3, 40)),
        case(NOT_FINITE, shape=(5, 33)),
    )

    def draw_sizes(self, rng: np.random.Generator) -> Mapping[str, Any]:
        return {"shape": draws.shape(rng, 3, 300)}

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        x = _draw_rows(case, storage, rng)
        residual = _draw_rows(case, storage, rng)
        if case.probe == "growing residual":
            residual = draws.normal(rng, x.shape, storage, 30.0)
        if case.probe == "cancelling":
            residual = storage.round(-x.astype(np.float64) * (1.0 + 0.01 * rng.standard_normal(x.shape)))
        weight = draws.gain(rng, x.shape[-1], storage)
        arrays = {"x": x, "residual": residual, "weight": weight}
        return Inputs(case, storage, arrays, {"eps": case.sizes.get("eps", EPS)})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        x, residual, weight = (bridge.tensor(backend, inputs, name) for name in ("x", "residual", "weight"))
        part = bridge.norm_ops(backend)
        return bridge.host(*part.rms_norm_residual(x, residual, weight, inputs.settings["eps"]))

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        weight, eps = inputs.exact("weight"), inputs.settings["eps"]
        total = inputs.exact("x") + inputs.exact("residual")
        value = oracle.rms_norm(total, weight, eps)
        models = models_of(inputs, algorithm, value.size)
        rounded = inputs.storage.unit if algorithm.rounds_residual else 0.0
        errors = [rms_norm_error(model, total, eps, value, model.unit + rounded) for model in models]
        sums = [elementwise_error(model, 1, np.abs(total)) for model in models]
        axes = axes_of(value.ndim, "row", "feature")
        return [bounded("y", value, axes, models, errors), bounded("residual", total, axes, models, sums)]


class LayerNorm(Operation):
    name = "layer_norm"
    cases = (
        case(IID, shape=(3, 7)),
        case(IID, shape=(4, 65)),
        case("near sqrt(eps)", shape=(4, 33)),
        case("shifted", shape=(3, 70)),
        case(IID, shape=(1, 2)),
        case(IID, shape=(2, 3, 96)),
        case("outlier", shape=(3, 129)),
        case("zeros", shape=(2, 16)),
        case("strided", shape=(3, 70)),
        case(IID, shape=(0, 64)),
        case(IID, shape=(3, 384), bias=False),
        case(IID, small=False, shape=(2, 4096)),
        case("far from zero", shape=(8, 16)),
        case(DRAWN, number=1),
        case(DRAWN, number=2),
        case("near sqrt(eps)", shape=(4, 33), eps=1e-6),
        case(IID, shape=(70, 48)),
        case("packed", shape=(3, 40)),
        case(NOT_FINITE, shape=(5, 33)),
    )

    def draw_sizes(self, rng: np.random.Generator) -> Mapping[str, Any]:
        return {"shape": draws.shape(rng, 3, 300), "bias": bool(rng.random() < 0.5)}

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        x = _draw_rows(case, storage, rng)
        arrays = {"x": x, "weight": draws.gain(rng, x.shape[-1], storage)}
        if case.sizes.get("bias", True):
            arrays["bias"] = draws.normal(rng, x.shape[-1:], storage)
        return Inputs(case, storage, arrays, {"eps": case.sizes.get("eps", EPS)})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        x, weight = bridge.tensor(backend, inputs, "x"), bridge.tensor(backend, inputs, "weight")
        bias = bridge.tensor(backend, inputs, "bias") if "bias" in inputs.arrays else None
        return bridge.host(backend.tensor_ops().layer_norm(x, weight, bias, inputs.settings["eps"]))

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        x, weight, eps = inputs.exact("x"), inputs.exact("weight"), inputs.settings["eps"]
        bias = inputs.exact("bias") if "bias" in inputs.arrays else None
        value = oracle.layer_norm(x, weight, bias, eps)
        models = models_of(inputs, algorithm, value.size)
        errors = [layer_norm_error(model, x, weight, eps, value) for model in models]
        return [bounded("y", value, axes_of(value.ndim, "row", "feature"), models, errors)]
