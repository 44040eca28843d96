"""Tensors: what they share, and how values go from one element type to another."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import BackendError, DeviceError, InvalidParameterError, ResourceExhaustedError, ShapeError
from ferrum_ref.types.devices import DataType, Device

HALVES = [(np.float16, DataType.FP16), (ml_dtypes.bfloat16, DataType.BF16)]
FLOAT8 = ml_dtypes.float8_e4m3fn


@pytest.mark.clause("BK-NCPU-7")
@pytest.mark.parametrize(("scalar", "dtype"), HALVES)
def test_every_16_bit_pattern_widens_exactly(factory: Any, scalar: Any, dtype: DataType) -> None:
    patterns = np.arange(65536, dtype=np.uint16).view(scalar)
    wide = factory.from_numpy(patterns).to_dtype(DataType.FP32).to_numpy()
    with np.errstate(invalid="ignore"):
        want = patterns.astype(np.float32)
    assert np.array_equal(wide, want, equal_nan=True)
    assert np.array_equal(np.signbit(wide)[~np.isnan(want)], np.signbit(want)[~np.isnan(want)])
    back = factory.from_numpy(wide).to_dtype(dtype).to_numpy()
    numbers = ~np.isnan(want)
    assert np.array_equal(back.view(np.uint16)[numbers], patterns.view(np.uint16)[numbers])
    assert np.isnan(back[~numbers].astype(np.float32)).all()


@pytest.mark.clause("BK-NCPU-7")
@pytest.mark.parametrize(("scalar", "dtype"), HALVES)
def test_rounding_is_to_nearest_even(factory: Any, scalar: Any, dtype: DataType) -> None:
    rng = np.random.default_rng(3)
    any_bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    stored = np.arange(65536, dtype=np.uint16).view(scalar)
    with np.errstate(all="ignore"):
        steps = stored.astype(np.float64)
        steps = np.sort(steps[np.isfinite(steps)])
        middles = ((steps[1:] + steps[:-1]) / 2).astype(np.float32)
        close_by = np.concatenate([np.nextafter(middles, np.float32(x)) for x in (-np.inf, np.inf)])
        values = np.concatenate([any_bits, middles, close_by])
        want = values.astype(scalar)
    got = factory.from_numpy(values).to_dtype(dtype).to_numpy()
    numbers = ~np.isnan(values)
    assert np.array_equal(got.view(np.uint16)[numbers], want.view(np.uint16)[numbers])
    assert np.isnan(got[~numbers].astype(np.float32)).all()


@pytest.mark.clause("BK-NCPU-7")
def test_wide_integers_round_once(tensor: Any) -> None:
    value = 2**25 + 2**17 + 1
    assert float(tensor([value], np.int32).to_dtype(DataType.BF16).to_numpy()[0]) == 33816576.0
    assert tensor([2.5, 300.0, -np.inf]).to_dtype(DataType.INT8).to_numpy().tolist() == [2, 127, -128]
    assert tensor([0.0, np.nan]).to_dtype(DataType.BOOL).to_numpy().tolist() == [False, True]
    assert tensor([1e9, -np.inf, 1.0625]).to_dtype(DataType.FP8).to_vec_f32().tolist() == [448.0, -448.0, 1.0]
    with pytest.raises(DeviceError, match="NaN has no value"):
        tensor([np.nan]).to_dtype(DataType.INT32)


@pytest.mark.clause("BK-NCPU-6")
@given(data=st.data())
def test_memory_is_shared_both_ways(data: Any) -> None:
    from ferrum_numba.cpu import make_backend

    factory = make_backend().tensor_factory()
    dtype = data.draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, FLOAT8, np.int8, np.uint32, bool]))
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3)))
    array = np.zeros(shape, dtype)
    tensor = factory.from_numpy(array)
    assert tensor.to_numpy() is array
    assert tensor.shape() == shape
    assert tensor.numel() == array.size
    if array.size:
        array[...] = 1
        assert tensor.to_vec_f32().tolist() == [1.0] * array.size


@pytest.mark.clause("BK-NCPU-6")
def test_what_cannot_be_shared_is_copied_or_refused(factory: Any, kernels: Any, tensor: Any) -> None:
    foreign = np.arange(4, dtype=">f4")
    assert factory.from_numpy(foreign).to_vec_f32().tolist() == [0.0, 1.0, 2.0, 3.0]
    unaligned = np.frombuffer(b"\0" + np.arange(3, dtype=np.float32).tobytes(), np.float32, offset=1)
    assert factory.from_numpy(unaligned).to_vec_f32().tolist() == [0.0, 1.0, 2.0]
    for bad in (np.float64, np.int64):
        with pytest.raises(DeviceError, match="no 64-bit types"):
            factory.from_numpy(np.ones(2, bad))
    frozen = np.zeros((2, 1, 2), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(BackendError, match="may not be written"):
        kernels.attention_ops().write_kv(factory.from_numpy(frozen), tensor(np.ones((1, 1, 2))), [0])
    assert factory.from_numpy(frozen).to_numpy().sum() == 0.0


@pytest.mark.clause("BK-NCPU-6")
def test_views(factory: Any, ops: Any, tensor: Any) -> None:
    x = tensor(np.arange(24).reshape(2, 3, 4))
    array = x.to_numpy()
    for view in (
        x.view((0, 1, 0), (2, 3, 2)),
        factory.narrow(x, 2, 1, 2),
        ops.transpose(x, 0, 2),
        ops.permute(x, [1, 2, 0]),
        x.reshape((6, 4)),
        *ops.split(x, [1, 2], 1),
    ):
        assert np.shares_memory(view.to_numpy(), array)
    assert x.view((0, 1, 0), (2, 3, 2)).to_numpy().tolist() == array[:, 1:, :2].tolist()
    assert [piece.shape() for piece in ops.split(x, [1, 2], 1)] == [(2, 1, 4), (2, 2, 4)]
    assert ops.transpose(x, 0, 2).reshape((24,)).to_numpy().tolist() == array.transpose(2, 1, 0).ravel().tolist()
    with pytest.raises(InvalidParameterError, match="0 <= start <= end"):
        x.view((0, 0, 0), (3, 3, 4))
    for call in (lambda: x.reshape((5, 5)), lambda: factory.narrow(x, 0, 1, 2), lambda: ops.split(x, [1, 1], 1)):
        with pytest.raises(ShapeError):
            call()


@pytest.mark.clause("BK-NCPU-6")
def test_factory(factory: Any) -> None:
    assert factory.zeros((2, 2), DataType.BF16, Device.CPU).to_vec_f32().tolist() == [0.0] * 4
    assert factory.ones((2,), DataType.FP16, Device.CPU).to_vec_f32().tolist() == [1.0] * 2
    assert factory.from_slice([1.0, 2.5], (2, 1), DataType.INT8, Device.CPU).to_numpy().tolist() == [[1], [2]]
    assert factory.from_ids([2**24 + 1]).to_numpy().tolist() == [16777217]
    from_numpys = np.random.default_rng(5).normal(0.0, 1.0, (3,)).astype(np.float32)
    drawn = factory.normal((3,), 0.0, 1.0, DataType.FP32, Device.CPU, rng=np.random.default_rng(5))
    assert np.array_equal(drawn.to_numpy(), from_numpys)
    with pytest.raises(ShapeError, match="expected 3 in one row"):
        factory.from_slice([1.0], (3,), DataType.FP32, Device.CPU)
    with pytest.raises(InvalidParameterError, match="from_ids"):
        factory.from_ids([-1])
    with pytest.raises(BackendError, match="low <= high"):
        factory.uniform((1,), 1.0, 0.0, DataType.FP32, Device.CPU)
    with pytest.raises(ResourceExhaustedError, match="free"):
        factory.zeros((2**40, 2**40), DataType.FP32, Device.CPU)
