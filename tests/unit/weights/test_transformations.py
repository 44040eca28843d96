"""The steps after reading: numpy's result on random lists, order, shape checks, rounding once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from ferrum_ref.errors import InvalidParameterError, ModelError, UnsupportedError
from ferrum_ref.interfaces.weights import TensorSpec, TensorTransformation, WeightFormat, WeightSource
from ferrum_ref.numpy_backend.factory import NumpyTensorFactory
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.weights.placement import place
from ferrum_ref.weights.transformations import transformed

Step = TensorTransformation
FACTORY = NumpyTensorFactory()


def apply(values: Any, shape: tuple[int, ...], *steps: Any, dtype: DataType = DataType.FP32) -> np.ndarray:
    source = WeightSource.Memory(b"", WeightFormat.Raw)
    spec = TensorSpec("w", list(shape), dtype, Device.CPU, source, list(steps))
    return transformed(np.asarray(values), spec, FACTORY, "load x: tensor w")


@pytest.mark.clause("WL-STEP-1", "WL-STEP-2", "WL-STEP-3", "WL-STEP-6")
@given(st.data())
def test_moves_are_numpys(data: st.DataObject) -> None:
    """Random lists of Transpose, Reshape and Slice, each fitting the shape it meets."""
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    values = np.arange(np.prod(sizes), dtype=np.float32).reshape(sizes)
    expected, steps = values, []
    for _ in range(data.draw(st.integers(0, 6))):
        kind = data.draw(st.sampled_from("trs"))
        axis = st.integers(0, expected.ndim - 1)
        if kind == "t":
            first, second = data.draw(axis), data.draw(axis)
            steps.append(Step.Transpose(first, second))
            expected = np.swapaxes(expected, first, second)
        elif kind == "r":
            shape = data.draw(st.sampled_from([(expected.size,), (1, expected.size), expected.shape[::-1]]))
            steps.append(Step.Reshape(list(shape)))
            expected = np.reshape(expected, shape)
        else:
            dim = data.draw(axis)
            start, end = sorted(
                (data.draw(st.integers(0, expected.shape[dim])), data.draw(st.integers(0, expected.shape[dim])))
            )
            open_start, open_end = (
                start == 0 and data.draw(st.booleans()),
                end == expected.shape[dim] and data.draw(st.booleans()),
            )
            steps.append(Step.Slice(dim, None if open_start else start, None if open_end else end))
            expected = np.take(expected, range(start, end), axis=dim)
    np.testing.assert_array_equal(apply(values, expected.shape, *steps), expected)


@pytest.mark.clause("WL-STEP-1")
def test_order_matters() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    first = apply(values, (3, 2), Step.Transpose(0, 1), Step.Reshape([3, 2]))
    second = apply(values, (2, 3), Step.Reshape([3, 2]), Step.Transpose(0, 1))
    assert first.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert second.tolist() == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.clause("WL-STEP-2", "WL-STEP-3", "WL-STEP-6", "WL-STEP-8")
@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Step.Transpose(0, 2)], r"step 0: Transpose: got axes 0 and 2 of 2, expected axes from 0 to 1"),
        ([Step.Scale(1.0), Step.Reshape([5])], r"step 1: Reshape: got \[2, 3\] to \[5\], expected 6 elements"),
        ([Step.Reshape([-1])], r"Reshape: got \[2, 3\] to \[-1\]"),
        ([Step.Reshape([2**62, 0])], "Reshape"),
        ([Step.Slice(2, None, None)], "Slice: got axis 2 of 2"),
        ([Step.Slice(1, 0, 4)], r"Slice: got 0:4 of 3, expected start <= end <= 3"),
        ([Step.Slice(1, 2, 1)], "Slice: got 2:1 of 3"),
        ([Step.Slice(1, 4, None)], "Slice: got 4:3 of 3"),
        ([Step.Transpose(0, 1)], r"shape: got \[3, 2\] after the transformations, expected \[2, 3\]"),
    ],
)
def test_steps_that_do_not_fit(steps: list[Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        apply(np.zeros((2, 3), np.float32), (2, 3), *steps)


@pytest.mark.clause("WL-STEP-4")
def test_cast_rounds_where_it_stands() -> None:
    """1 + 2**-8 is a tie in bfloat16: rounded to 1 at the Cast, whatever comes later."""
    values = np.array([1 + 2**-8, 3.0], np.float32)
    cast = apply(values, (2,), Step.Cast(DataType.BF16), Step.Scale(256.0))
    assert cast.tolist() == [256.0, 768.0]
    assert apply(values, (2,), Step.Scale(256.0), Step.Cast(DataType.BF16)).astype(np.float32).tolist() == [
        256.0,
        768.0,
    ]
    assert apply(values, (2,), Step.Scale(256.0)).tolist() == [257.0, 768.0]
    integers = apply([1.5, 2.5, -300.0, 1e9], (4,), Step.Cast(DataType.INT8))
    assert (integers.dtype, integers.tolist()) == (np.int8, [2, 2, -128, 127])
    with pytest.raises(ModelError, match=r"step 0: Cast: .*NaN"):
        apply([np.nan], (1,), Step.Cast(DataType.INT8))


@pytest.mark.clause("WL-STEP-5")
def test_scale_computes_in_float32() -> None:
    """The factor is a float32, the product a float32 even of bfloat16 values; float64 stays float64."""
    tenth = float(np.float32(0.1))
    values = np.array([3, 7, 1.5], ml_dtypes.bfloat16)
    found = apply(values, (3,), Step.Scale(0.1))
    assert found.dtype == np.float32
    assert found.tolist() == [float(np.float32(value * tenth)) for value in (3.0, 7.0, 1.5)]
    assert apply(np.array([3], np.int8), (1,), Step.Scale(0.5)).tolist() == [1.5]
    double = apply(np.array([1 / 3]), (1,), Step.Scale(0.1))
    assert (double.dtype, double.tolist()) == (np.float64, [1 / 3 * tenth])
    assert apply([1e38], (1,), Step.Scale(1e3), dtype=DataType.FP32).tolist() == [1e41]  # a float64 list
    assert np.isinf(apply(np.array([1e38], np.float32), (1,), Step.Scale(1e3))).all()


@pytest.mark.clause("WL-STEP-7")
def test_unknown_steps() -> None:
    with pytest.raises(UnsupportedError):
        apply(np.zeros(1), (1,), Step())
    with pytest.raises(InvalidParameterError):
        Step.Slice(-1, None, None)


@pytest.mark.clause("WL-PLACE-1", "WL-PLACE-2")
def test_doubles_are_rounded_once() -> None:
    """1 + 2**-8 + 2**-40: through float32 it becomes a tie and then 1 in bfloat16; rounded once it is 1 + 2**-7."""
    above = 1 + 2.0**-8 + 2.0**-40
    expected = {DataType.BF16: 1 + 2**-7, DataType.FP32: 1 + 2**-8, DataType.FP16: 1 + 2**-8, DataType.FP8: 1.0}
    for dtype, value in expected.items():
        found = np.asarray(place(np.array([above, -above]), dtype, Device.CPU, FACTORY, "x").to_numpy())
        assert found.astype(np.float64).tolist() == [value, -value]
    assert np.float64(np.float64(above).astype(np.float32).astype(ml_dtypes.bfloat16)) == 1.0  # rounding twice


@pytest.mark.clause("WL-PLACE-2")
@given(st.lists(st.floats(width=64), min_size=1, max_size=20))
def test_doubles_to_half_as_torch_rounds_them(values: list[float]) -> None:
    array = np.array(values)
    found = np.asarray(place(array, DataType.FP16, Device.CPU, FACTORY, "x").to_numpy())
    with np.errstate(all="ignore"):
        expected = array.astype(np.float16)  # numpy rounds float64 to float16 directly
    np.testing.assert_array_equal(found, expected)


@pytest.mark.clause("WL-PLACE-2")
def test_doubles_to_float32() -> None:
    values = np.random.default_rng(0).standard_normal(1000) * np.logspace(-50, 45, 1000)
    found = np.asarray(place(values, DataType.FP32, Device.CPU, FACTORY, "x").to_numpy())
    np.testing.assert_array_equal(found, torch.from_numpy(values).float().numpy())


@pytest.mark.clause("WL-PLACE-3")
def test_wide_integers_saturate() -> None:
    signed = np.array([-(2**63), -1, 0, 200, 2**63 - 1])
    unsigned = np.array([0, 200, 2**64 - 1], np.uint64)

    def placed(values: Any, dtype: DataType) -> list[Any]:
        return np.asarray(place(values, dtype, Device.CPU, FACTORY, "x").to_numpy()).astype(object).tolist()

    assert placed(signed, DataType.INT32) == [-(2**31), -1, 0, 200, 2**31 - 1]
    assert placed(signed, DataType.UINT32) == [0, 0, 0, 200, 2**32 - 1]
    assert placed(signed, DataType.INT8) == [-128, -1, 0, 127, 127]
    assert placed(unsigned, DataType.UINT8) == [0, 200, 255]
    assert placed(unsigned, DataType.INT32) == [0, 200, 2**31 - 1]
    assert placed(signed, DataType.BOOL) == [True, True, False, True, True]
    assert placed(signed, DataType.FP32) == [-(2.0**63), -1, 0, 200, 2.0**63]
    assert placed(np.array([2.6, -np.inf, 1e300]), DataType.INT16) == [3, -(2**15), 2**15 - 1]
    assert placed(np.array([0.0, 0.1]), DataType.BOOL) == [False, True]
    e5m2 = np.array([57344, 2.0**-16, np.inf], ml_dtypes.float8_e5m2)
    assert placed(e5m2, DataType.FP32) == [57344, 2.0**-16, np.inf]
    for bad in (np.array([np.nan]),):
        with pytest.raises(ModelError, match="NaN"):
            placed(bad, DataType.INT32)
    with pytest.raises(ModelError, match="complex64"):
        placed(np.array([1j], np.complex64), DataType.FP32)


@pytest.mark.clause("WL-LOAD-1", "WL-STEP-1")
def test_through_the_loader(loader: Any, spec: Callable[..., Any]) -> None:
    values = np.random.default_rng(3).standard_normal((4, 6)).astype(np.float32)
    source = WeightSource.Memory(save({"w": values}), WeightFormat.SafeTensors)
    steps = [Step.Transpose(0, 1), Step.Slice(0, 2, None), Step.Scale(2.0), Step.Reshape([2, 8])]
    tensor = asyncio.run(loader.load_tensor(spec(source, (2, 8), dtype=DataType.BF16, steps=steps)))
    expected = torch.from_numpy(values).T[2:].mul(2).reshape(2, 8).bfloat16()
    np.testing.assert_array_equal(np.asarray(tensor.to_numpy()).astype(np.float32), expected.float().numpy())
