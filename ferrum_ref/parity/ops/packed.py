"""Projections by weights in every further packed form.   Clauses: PA-SCHEME-1..4, PA-QLINEAR-3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ferrum_ref.errors import BackendError, UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.parity import oracle
from ferrum_ref.parity.bounds.quantized import packed_linear_error
from ferrum_ref.parity.ops import bridge, draws
from ferrum_ref.parity.ops.linear import LOST_TERM
from ferrum_ref.parity.ops.operation import IID, Case, Expected, Inputs, Operation, axes_of, bounded, case, models_of
from ferrum_ref.parity.schemes.catalogue import SCHEMES
from ferrum_ref.parity.schemes.scheme import ONES, SUBNORMAL, Scheme
from ferrum_ref.parity.units import Storage
from ferrum_ref.types.algorithm import Algorithm

TENSORS = ("qzeros", "scales", "g_idx", "zeros", "scale")


class PackedLinear(Operation):
    """x (..., K), packed weights (N, K) of one scheme."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.name = f"quantized_linear_{scheme.name}"  # type: ignore[misc]  # of an instance: there is one a scheme
        self.cases = scheme.cases()  # type: ignore[misc]

    @property
    def algorithm_name(self) -> str:
        return "quantized_linear"

    def drawn(self, rng: np.random.Generator) -> Case:
        """Random sizes, and the other settings of one of the small random cases.  [PA-CASE-4]"""
        rows = [row for row in self.cases if row.probe == IID and row.small]
        like = rows[int(rng.integers(len(rows)))]
        unit = max(self.scheme.step_in, like.sizes.get("group", 1), 1)
        sizes = {
            "x": (draws.size(rng, 6), unit * draws.size(rng, 6)),
            "N": self.scheme.step_out * draws.size(rng, 64 // self.scheme.step_out),
        }
        return case(IID, **{**like.sizes, **sizes})

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        shape = case.sizes["x"]
        x = rng.standard_normal(shape)
        if case.probe == "tail of K":
            x[..., :-1] *= 0.01
            x[..., -1] = 8.0
        if case.probe == "one-hot rows":  # each output is one weight
            x = np.eye(shape[-1])[rng.permutation(shape[-1])[: shape[0]]]
        if case.probe == SUBNORMAL:
            x *= 2.0**10
        if case.probe == ONES:  # every weight is 1, every input but the first just below half a unit of it
            x = np.full(shape, LOST_TERM)
            x[..., 0] = 1.0
        if case.probe == "positive":
            x = np.abs(x)
        stored = storage.round(x)
        packed = self.scheme.draw(case, case.sizes["N"], shape[-1], rng)
        return Inputs(case, storage, {"x": draws.strided(stored) if case.probe == "strided" else stored, **packed})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Any, ...]:
        """Raises UnsupportedError where the backend's capabilities do not list this kind; BackendError where they do
        and the call is refused all the same."""
        kind = self.scheme.kind_of(inputs.case.sizes)
        if kind not in backend.capabilities().extra_capabilities.get("quantized_linear", []):
            raise UnsupportedError(f"backend {backend.name()!r} lists no {kind!r} among its quantized_linear")
        tensors = {name: bridge.tensor(backend, inputs, name) for name in inputs.arrays}
        scheme = self.scheme.described(tensors, inputs.case.sizes)
        try:
            y = bridge.linear_ops(backend).quantized_linear(tensors["x"], tensors["packed"], scheme)
        except UnsupportedError as error:
            raise BackendError(f"lists {kind!r} among its quantized_linear, and refuses it: {error}") from error
        return bridge.host(y)

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        x, sizes = inputs.exact("x"), inputs.case.sizes
        packed = packed_arrays(inputs)
        weight = self.scheme.weights(packed, sizes)
        magnitudes = np.abs(weight)
        if algorithm.folds_zero_point:
            offsets = self.scheme.offsets(packed, sizes)
            magnitudes = np.abs(weight - offsets) + np.abs(offsets)
        rows = x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])
        flat = oracle.linear(rows, weight)
        models = models_of(inputs, algorithm, flat.size)
        value = flat.reshape(*x.shape[:-1], weight.shape[0])
        errors = [
            packed_linear_error(model, rows, weight, magnitudes, self.scheme.roundings, flat).reshape(value.shape)
            for model in models
        ]
        return [bounded("y", value, axes_of(value.ndim, "row", "column"), models, errors)]


def packed_arrays(inputs: Inputs) -> Mapping[str, Any]:
    """The arrays of the weight, without x. Pure."""
    return {name: array for name, array in inputs.arrays.items() if name != "x"}


PACKED: tuple[PackedLinear, ...] = tuple(PackedLinear(scheme) for scheme in SCHEMES)
