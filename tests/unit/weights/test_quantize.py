"""Quantize against ONNX's own operator, ggml's codec, torch's fake quantisation and llm-awq's formula."""

from __future__ import annotations

from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import helper
from onnx.reference import ReferenceEvaluator

from ferrum_ref.errors import InvalidParameterError, ModelError, UnsupportedError
from ferrum_ref.interfaces.weights import QuantizationConfig
from ferrum_ref.types.devices import DataType
from ferrum_ref.weights.quantize import quantized

Config = QuantizationConfig
WEIGHTS = (np.random.default_rng(5).standard_normal((8, 256)) * 3).astype(np.float32)
FLOATS = hnp.arrays(np.float32, (2, 32), elements=st.floats(-1e4, 1e4, width=32))


def run(values: Any, config: Any, wanted: DataType | None = None) -> np.ndarray:
    return quantized(np.asarray(values, np.float32), config, wanted, "load x: tensor w: step 0")


@pytest.mark.clause("WL-QUANT-1")
@given(FLOATS)
def test_int8_symmetric(values: np.ndarray) -> None:
    scale = np.float32(np.abs(values).max()) / np.float32(127)
    codes = run(values, Config.INT8(True), DataType.INT8)
    found = run(values, Config.INT8(True))
    np.testing.assert_array_equal(found, codes.astype(np.float32) * scale)
    if scale > np.finfo(np.float32).tiny:
        zero = torch.zeros((), dtype=torch.int32)
        expected = torch.fake_quantize_per_tensor_affine(torch.from_numpy(values), torch.tensor(scale), zero, -127, 127)
        assert (
            np.abs(found - expected.numpy()).max() <= scale
        )  # torch multiplies by 1/s: ties may fall to the neighbour
        assert np.abs(found - values).max() <= scale * np.float32(0.5001)


@pytest.mark.clause("WL-QUANT-2")
@given(FLOATS)
def test_int8_affine_is_onnx_dynamic_quantize_linear(values: np.ndarray) -> None:
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])
    infos = [helper.make_tensor_value_info(name, 1, None) for name in ("x", "y", "s", "z")]
    graph = helper.make_graph([node], "g", infos[:1], infos[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    if not np.abs(values).max() > 1e-30:
        return  # ONNX's reference divides by a zero scale there
    codes, scale, zero = ReferenceEvaluator(model).run(None, {"x": values})
    np.testing.assert_array_equal(run(values, Config.INT8(False), DataType.UINT8), codes)
    expected = (codes.astype(np.float32) - np.float32(zero)) * np.float32(scale)
    np.testing.assert_array_equal(run(values, Config.INT8(False)), expected)


@pytest.mark.clause("WL-QUANT-3")
@given(FLOATS)
def test_int4_in_groups_of_32_is_ggmls_q4_0(values: np.ndarray) -> None:
    kind = gguf.GGMLQuantizationType.Q4_0
    packed = run(values, Config.INT4(32), DataType.UINT8)
    np.testing.assert_array_equal(packed, gguf.quantize(values, kind))
    np.testing.assert_array_equal(run(values, Config.INT4(32)), gguf.dequantize(packed, kind))


@pytest.mark.clause("WL-QUANT-3")
def test_int4_of_other_groups() -> None:
    for group in (1, 8, 64, 256):
        found = run(WEIGHTS, Config.INT4(group))
        codes = run(WEIGHTS, Config.INT4(group), DataType.INT4)
        assert codes.dtype == ml_dtypes.int4
        groups = WEIGHTS.reshape(8, -1, group)
        extreme = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)
        scale = (extreme / np.float32(-8)).astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(
            found.reshape(groups.shape), codes.astype(np.float32).reshape(groups.shape) * scale
        )
        assert (np.abs(found.reshape(groups.shape) - groups) <= np.abs(scale) * 1.01).all()
    assert np.array_equal(run(np.zeros((2, 8)), Config.INT4(8)), np.zeros((2, 8)))


@pytest.mark.clause("WL-QUANT-4")
def test_fp8_saturates() -> None:
    values = np.array([1.05, -447, 449, 1e9, -np.inf, 2**-9, 2**-20], np.float32)
    found = run(values, Config.FP8(True))
    expected = torch.from_numpy(values.clip(-448, 448)).to(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(found, expected)
    assert found[3] == 448
    wide = run(values, Config.FP8(False))
    np.testing.assert_array_equal(
        wide, torch.from_numpy(values.clip(-57344, 57344)).to(torch.float8_e5m2).float().numpy()
    )
    assert (wide[3], wide[4]) == (57344, -57344)
    assert np.isnan(run([np.nan], Config.FP8(True))).all()


def awq_pseudo_quantize(weights: np.ndarray, bits: int, group: int, zero_point: bool) -> np.ndarray:
    """pseudo_quantize_tensor of llm-awq (Lin et al. 2023), in torch."""
    w = torch.from_numpy(weights).reshape(-1, group)
    if zero_point:
        high, low = w.amax(1, keepdim=True), w.amin(1, keepdim=True)
        scales = (high - low).clamp(min=1e-5) / (2**bits - 1)
        zeros = (-torch.round(low / scales)).clamp(0, 2**bits - 1)
        w = (torch.clamp(torch.round(w / scales) + zeros, 0, 2**bits - 1) - zeros) * scales
    else:
        scales = w.abs().amax(1, keepdim=True).clamp(min=1e-5) / (2 ** (bits - 1) - 1)
        w = torch.clamp(torch.round(w / scales), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scales
    return w.reshape(weights.shape).numpy()


@pytest.mark.clause("WL-QUANT-5")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_point", [True, False])
def test_awq_grid(bits: int, zero_point: bool) -> None:
    np.testing.assert_array_equal(
        run(WEIGHTS, Config.AWQ(bits, zero_point)), awq_pseudo_quantize(WEIGHTS, bits, 128, zero_point)
    )


@pytest.mark.clause("WL-QUANT-5")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_grid(bits: int) -> None:
    """Every group takes at most 2**bits values, a constant one included: zero lies on the grid."""
    for desc_act in (False, True):
        found = run(WEIGHTS, Config.GPTQ(bits, 64, desc_act))
        np.testing.assert_array_equal(found, awq_pseudo_quantize(WEIGHTS, bits, 64, True))
    ones = run(np.full((1, 8), 3.0), Config.GPTQ(bits, 8, False))
    np.testing.assert_array_equal(ones, np.full((1, 8), 3.0, np.float32))


@pytest.mark.clause("WL-QUANT-6")
def test_what_cannot_be_quantised() -> None:
    for config in (Config.INT8(True), Config.INT8(False), Config.INT4(2), Config.GPTQ(4, 2, False)):
        for bad in (np.nan, np.inf):
            with pytest.raises(ModelError, match="NaN or infinity"):
                run([[1.0, bad]], config)
    with pytest.raises(ModelError, match="multiple of 3"):
        run(np.zeros((2, 4)), Config.INT4(3))
    with pytest.raises(ModelError, match="multiple of 128"):
        run(np.zeros((2, 64)), Config.AWQ(4, True))
    with pytest.raises(ModelError, match=r"shape \[\]"):
        run(np.float32(1), Config.GPTQ(4, 1, False))
    for config in (Config.INT4(0), Config.GPTQ(5, 8, False), Config.AWQ(0, True)):
        with pytest.raises(InvalidParameterError):
            run(np.zeros((2, 128)), config)
    with pytest.raises(ModelError, match="at most 65504"):
        run(np.full((1, 2), 3e38), Config.INT4(2))
    with pytest.raises(UnsupportedError):
        run(np.zeros(2), QuantizationConfig())


@pytest.mark.clause("WL-QUANT-7")
def test_edges() -> None:
    for config in (Config.INT8(True), Config.INT8(False), Config.INT4(4), Config.GPTQ(4, 4, False)):
        np.testing.assert_array_equal(run(np.zeros((3, 4)), config), np.zeros((3, 4)))
        assert run(np.zeros((0, 4)), config).shape == (0, 4)
        assert run(np.zeros((2, 0)), config).shape == (2, 0)
        tiny = run(np.full((1, 4), 1e-45), config)
        assert np.isfinite(tiny).all()
