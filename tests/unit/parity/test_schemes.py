"""Every packed form of the judge: what its numbers are, by other libraries and by formulas written out again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.kernel_ops import KernelOps, LinearOps
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.numpy_backend.quantized import KINDS
from ferrum_ref.parity.error_model import ErrorModel
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.ops.packed import PACKED, PackedLinear, packed_arrays
from ferrum_ref.parity.runner import FAILED, PASSED, UNSUPPORTED, Selection, draw_case, run_case
from ferrum_ref.parity.schemes.scheme import ONES
from ferrum_ref.parity.subject import BackendSubject
from ferrum_ref.parity.units import STORAGES
from ferrum_ref.types.algorithm import Algorithm

Array = np.ndarray[Any, Any]
FP32 = STORAGES["fp32"]


def words(packed: Array, bits: int, axis: int) -> Array:
    """Integers of `bits` bits, from one long number for each line of words."""

    def line(values: Array) -> Array:
        stream = sum(int(np.uint32(word)) << (32 * place) for place, word in enumerate(values.tolist()))
        return np.array([(stream >> (bits * k)) % (1 << bits) for k in range(len(values) * 32 // bits)])

    return np.apply_along_axis(line, axis, packed.view(np.uint32))


def gptq(arrays: dict[str, Array], sizes: dict[str, Any]) -> Array:
    bits = sizes["bits"]
    q, z = words(arrays["packed"], bits, 0), words(arrays["qzeros"], bits, 1)
    size = len(q) if sizes["group"] == -1 else sizes["group"]
    weight = np.zeros(q.shape)
    for k in range(len(q)):
        group = int(arrays["g_idx"][k]) if "g_idx" in arrays else k // size
        less = z[group] + (1 if sizes["version"] == 1 else 0)
        weight[k] = (q[k] - less) * arrays["scales"][group].astype(np.float64)
    return weight.T


def awq(arrays: dict[str, Array], sizes: dict[str, Any]) -> Array:
    def outputs(packed: Array) -> Array:
        nibbles = words(packed, 4, 1)
        found = np.zeros_like(nibbles)
        for place in range(nibbles.shape[1]):
            found[:, place // 8 * 8 + (0, 2, 4, 6, 1, 3, 5, 7)[place % 8]] = nibbles[:, place]
        return found

    q, z = outputs(arrays["packed"]), outputs(arrays["qzeros"])
    repeats = len(q) // len(z)
    return ((q - z.repeat(repeats, 0)) * arrays["scales"].astype(np.float64).repeat(repeats, 0)).T


def groups(arrays: dict[str, Array], bits: int) -> Array:
    packed = arrays["packed"]
    if bits == 4:
        q = np.stack([packed % 16, packed // 16], axis=-1).reshape(len(packed), -1).astype(np.int64)
    else:
        q = packed.astype(np.int64)
    repeats = q.shape[1] // arrays["scales"].shape[1]
    if "zeros" in arrays:
        q = q - arrays["zeros"].astype(np.int64).repeat(repeats, 1)
    elif bits == 4:
        q = np.where(q > 7, q - 16, q)
    return q * arrays["scales"].astype(np.float64).repeat(repeats, 1)


def fp8(arrays: dict[str, Array], sizes: dict[str, Any]) -> Array:
    element = ml_dtypes.float8_e4m3fn if sizes["format"] == "e4m3" else ml_dtypes.float8_e5m2
    table = np.arange(256, dtype=np.uint8).view(element).astype(np.float64)
    numbers, scale = table[arrays["packed"]], arrays["scale"].astype(np.float64)
    if sizes["scaled"] == "rows":
        scale = scale[:, None]
    if sizes["scaled"] == "blocks":
        scale = scale.repeat(32, 0).repeat(32, 1)[: numbers.shape[0], : numbers.shape[1]]
    return numbers * scale


def plain(arrays: dict[str, Array], sizes: dict[str, Any]) -> Array:
    kinds = {"f8_e4m3": ml_dtypes.float8_e4m3fn, "f8_e5m2": ml_dtypes.float8_e5m2, "bf16": ml_dtypes.bfloat16}
    element = kinds.get(sizes["kind"]) or np.dtype(f"f{int(sizes['kind'][1:]) // 8}")
    return arrays["packed"].view(element).astype(np.float64).astype(np.float32).astype(np.float64)


def independent(operation: PackedLinear, inputs: Inputs) -> Array:
    """W (N, K) float64 by other code than the reference's."""
    arrays, sizes, name = dict(packed_arrays(inputs)), dict(inputs.case.sizes), operation.scheme.name
    if name in ("gptq", "awq", "fp8", "plain"):
        return {"gptq": gptq, "awq": awq, "fp8": fp8, "plain": plain}[name](arrays, sizes)
    if name in ("int4", "int8"):
        return groups(arrays, int(name[3:]))
    kind = gguf.GGMLQuantizationType[name.upper()]
    return np.asarray(gguf.quants.dequantize(arrays["packed"], kind)).astype(np.float64)


@pytest.mark.clause("PA-SCHEME-1", "PA-SCHEME-2", "PA-SCHEME-3", "PA-ORACLE-2")
@pytest.mark.parametrize("operation", PACKED, ids=lambda one: one.name)
def test_the_numbers_are_those_of_other_libraries_and_formulas(operation: PackedLinear) -> None:
    """To one rounding to float32 of a weight, and to float64 noise of the sum."""
    for index, case in enumerate(operation.cases):
        if not case.small:
            continue
        inputs = draw_case(operation, FP32, index, 0)
        if not inputs.arrays["packed"].size:
            continue
        weight, (expected,) = independent(operation, inputs), operation.expect(inputs, Algorithm())
        found = operation.scheme.weights(packed_arrays(inputs), inputs.case.sizes)
        assert weight.shape == found.shape
        assert np.abs(weight - found).max() <= 2.0**-23 * np.abs(weight).max(), case.label
        y = np.einsum("...k,nk->...n", inputs.exact("x"), found)
        assert np.abs(y - expected.value).max(initial=0.0) <= 2.0**-40 * max(np.abs(y).max(initial=0.0), 1e-6)
        if case.probe == ONES:
            assert (found == 1.0).all()


@pytest.mark.clause("PA-SCHEME-1")
def test_every_kind_that_the_reference_takes_is_drawn() -> None:
    drawn = {kind for operation in PACKED for kind in operation.scheme.kinds}
    assert drawn | {"q4_0", "q8_0"} == set(KINDS)
    met = {operation.scheme.kind_of(case.sizes) for operation in PACKED for case in operation.cases if case.small}
    assert met >= drawn
    everything = {operation.name for operation, *_ in Selection(every_scheme=True).items()}
    assert {operation.name for operation in PACKED} <= everything
    assert not {operation.name for operation in PACKED} & {operation.name for operation, *_ in Selection().items()}


class _Refusing(LinearOps):
    def linear(self, input: Any, weight: Any) -> Any:
        raise UnsupportedError("no linear")


class _Kernels(KernelOps):
    def backend_name(self) -> str:
        return "refusing"

    def linear_ops(self) -> LinearOps:
        return _Refusing()


def refusing(kinds: list[str]) -> ComputeBackend:
    """The numpy backend with these kinds in its list and a quantized_linear that refuses all of them."""
    backend = make_backend()
    capabilities = backend.capabilities()
    listed = replace(capabilities, extra_capabilities={"quantized_linear": kinds} if kinds else {})
    backend.capabilities = lambda: listed  # type: ignore[method-assign]
    backend.kernel_ops = _Kernels  # type: ignore[method-assign]
    return backend


@pytest.mark.clause("PA-SCHEME-4")
@pytest.mark.parametrize("operation", PACKED, ids=lambda one: one.name)
def test_what_is_not_listed_is_unsupported_and_what_is_listed_and_refused_fails(operation: PackedLinear) -> None:
    silent = run_case(BackendSubject(refusing([]), "silent"), operation, FP32, 0, 0)
    assert silent.status == UNSUPPORTED
    assert operation.scheme.kinds[0] in silent.message
    boasting = run_case(BackendSubject(refusing(list(operation.scheme.kinds)), "boasting"), operation, FP32, 0, 0)
    assert boasting.status == FAILED
    assert "and refuses it" in boasting.message
    assert run_case(BackendSubject(make_backend(), "numpy"), operation, FP32, 0, 0).status == PASSED


@pytest.mark.clause("PA-QLINEAR-3", "PA-QLINEAR-2")
def test_the_bound_of_a_form_with_offsets_is_written_out_again() -> None:
    """gamma_{K-1+r} sum M |x|; folded offsets count by themselves, and one addition more."""
    operation = next(one for one in PACKED if one.name == "quantized_linear_q4_k")
    inputs = draw_case(operation, FP32, 0, 0)
    x, sizes = inputs.exact("x"), inputs.case.sizes
    weight = independent(operation, inputs)
    blocks = inputs.arrays["packed"].reshape(-1, 144).copy()
    blocks[:, 16:] = 0
    floor = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_K).reshape(weight.shape).astype(np.float64)
    assert (operation.scheme.offsets(packed_arrays(inputs), sizes) == floor).all()
    for algorithm, magnitudes, count in (
        (Algorithm(), np.abs(weight), 255 + 3),
        (Algorithm(folds_zero_point=True), np.abs(weight - floor) + np.abs(floor), 255 + 4),
    ):
        unit = 2.0**-24
        error = count * unit / (1 - count * unit) * (np.abs(x) @ magnitudes.T)
        bound = ErrorModel(algorithm, FP32).stored(error, x @ weight.T)
        (expected,) = operation.expect(inputs, algorithm)
        assert expected.det is not None
        np.testing.assert_allclose(expected.det, bound, rtol=1e-6)
