"""TorchTensor and its factory: sharing, crossing to numpy and back, conversions."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from ferrum_torch.tensor import TorchTensor
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ferrum_ref.errors import BackendError, DeviceError, InvalidParameterError
from ferrum_ref.types.devices import DataType, Device

STORED = {
    DataType.FP32: np.float32,
    DataType.FP16: np.float16,
    DataType.BF16: ml_dtypes.bfloat16,
    DataType.FP8: ml_dtypes.float8_e4m3fn,
    DataType.INT32: np.int32,
    DataType.INT16: np.int16,
    DataType.INT8: np.int8,
    DataType.UINT32: np.uint32,
    DataType.UINT16: np.uint16,
    DataType.UINT8: np.uint8,
    DataType.BOOL: np.bool_,
}


@pytest.mark.clause("BK-TORCH-4")
def test_wrapping_leaves_autograd_behind_and_shares_storage() -> None:
    weight = torch.ones(3, requires_grad=True)
    wrapped = TorchTensor.wrap(weight)
    assert not wrapped.data.requires_grad
    assert wrapped.data.data_ptr() == weight.data_ptr()
    with pytest.raises(DeviceError, match=r"element type torch\.float64"):
        TorchTensor.wrap(torch.ones(1, dtype=torch.float64))
    with pytest.raises(DeviceError, match="expected cpu or cuda"):
        TorchTensor.wrap(torch.ones(1, device="meta"))


@pytest.mark.clause("BK-TORCH-4")
def test_views_share_storage(tensor: Any, ops: Any, factory: Any) -> None:
    x = tensor(np.arange(24).reshape(2, 3, 4))
    views = [
        x.view((0, 1, 0), (2, 3, 2)),
        x.reshape((4, 6)),
        factory.narrow(x, 1, 1, 2),
        ops.transpose(x, 0, 2),
        ops.permute(x, (2, 0, 1)),
        *ops.split(x, (1, 2), 1),
    ]
    values = x.to_numpy().copy()
    expected = [
        values[:, 1:3, :2],
        values.reshape(4, 6),
        values[:, 1:3],
        values.swapaxes(0, 2),
        values.transpose(2, 0, 1),
        values[:, :1],
        values[:, 1:],
    ]
    for view, want in zip(views, expected, strict=True):
        assert np.array_equal(view.to_numpy(), want)
        assert np.shares_memory(view.to_numpy(), x.to_numpy())
    assert not views[3].is_contiguous()
    assert np.array_equal(views[3].reshape((24,)).to_numpy(), expected[3].ravel())


@pytest.mark.clause("BK-TORCH-4")
def test_bad_views_and_shapes(tensor: Any, factory: Any) -> None:
    x = tensor(np.zeros((2, 3)))
    for start, end in (((0,), (2,)), ((0, 2), (2, 1)), ((0, 0), (3, 3)), ((-1, 0), (2, 3))):
        with pytest.raises(InvalidParameterError, match="view"):
            x.view(start, end)
    for shape in ((5,), (-1, 6), (7, 0)):
        with pytest.raises(BackendError, match="reshape"):
            x.reshape(shape)
    for dim, start, length in ((2, 0, 1), (1, 2, 2), (0, -1, 1), (0, 0, -1)):
        with pytest.raises(BackendError, match="narrow"):
            factory.narrow(x, dim, start, length)


@pytest.mark.clause("BK-TORCH-5")
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("writeable", [True, False])
def test_arrays_cross_both_ways_without_a_copy(factory: Any, dtype: DataType, writeable: bool) -> None:
    array = np.arange(12).reshape(3, 4).astype(STORED[dtype])
    array.flags.writeable = writeable
    for view in (array, array.T, array[1:, ::2]):
        made = factory.from_numpy(view)
        back = made.to_numpy()
        assert made.dtype() == dtype
        assert made.shape() == view.shape
        assert back.dtype == array.dtype
        assert np.shares_memory(back, array)
        assert back.flags.writeable == writeable
        assert np.array_equal(back, view)
    assert factory.from_numpy(array.reshape(12)[3]).shape() == ()


@pytest.mark.clause("BK-TORCH-5")
def test_arrays_that_torch_cannot_address_are_copied(factory: Any) -> None:
    record = np.zeros(3, dtype=[("a", "u1"), ("b", "<f4")])
    record["b"] = [1, 2, 3]
    misaligned = np.frombuffer(b"\0" + np.array([1, 2, 3], np.float32).tobytes(), np.float32, offset=1)
    for array in (np.array([3, 2, 1], np.float32)[::-1], np.array([1, 2, 3], ">f4"), record["b"], misaligned):
        assert factory.from_numpy(array).to_vec_f32().tolist() == [1.0, 2.0, 3.0]


@pytest.mark.clause("BK-TORCH-5")
@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.complex64, object, "U3"])
def test_types_without_a_name_here_are_refused(factory: Any, dtype: Any) -> None:
    with pytest.raises(DeviceError, match="from_numpy: array: got element type"):
        factory.from_numpy(np.zeros(2, dtype))


@pytest.mark.clause("BK-TORCH-5")
def test_read_only_memory_stays_read_only(factory: Any, ops: Any, kernels: Any, tensor: Any) -> None:
    array = np.zeros((4, 1, 2), np.float32)
    array.flags.writeable = False
    cache, rows = factory.from_numpy(array), tensor(np.ones((1, 1, 2)))
    views = (cache, cache.reshape((2, 2, 1, 2)), ops.split(cache, (4,), 0)[0], factory.narrow(cache, 0, 0, 2))
    for view in views:
        with pytest.raises(BackendError, match="read-only"):
            kernels.attention_ops().write_kv(view, rows, [0])
    kernels.attention_ops().write_kv(factory.from_tensor(cache, Device.CPU), rows, [0])
    assert not array.any()


@pytest.mark.clause("BK-TORCH-5")
def test_flattening_gives_every_element(tensor: Any, factory: Any) -> None:
    assert tensor([[1, 2], [3, 4]]).to_vec_f32().tolist() == [1.0, 2.0, 3.0, 4.0]  # D-12: upstream [1, 2]
    assert tensor([[1, 2], [3, 4]], np.float16).to_vec_f32().tolist() == [1.0, 2.0, 3.0, 4.0]
    x = tensor([1.0])
    x.to_vec_f32()[0] = 5
    assert x.to_vec_f32().tolist() == [1.0]
    assert tensor([3, 2**32 - 1], np.uint32).to_vec_u32() == [3, 2**32 - 1]
    with pytest.raises(InvalidParameterError, match="to_vec_u32"):
        tensor([1.5]).to_vec_u32()
    assert tensor([[[1, 3, 3], [0, 9, 9]], [[8, 8, 8], [8, 8, 8]]]).argmax_last_dim_u32() == 1


@pytest.mark.clause("BK-TORCH-5")
def test_ids_stay_exact(factory: Any) -> None:
    ids = factory.from_ids([16777217, 0, 2**32 - 1])  # D-13: through float32 the first is 16777216
    assert ids.dtype() == DataType.UINT32
    assert ids.to_vec_u32() == [16777217, 0, 2**32 - 1]
    assert factory.from_ids([]).shape() == (0,)
    for bad in ([-1], [2**32], [1.5], [[1]], ["a"]):
        with pytest.raises(InvalidParameterError, match="from_ids"):
            factory.from_ids(bad)


@pytest.mark.clause("BK-TORCH-5")
@pytest.mark.parametrize("dtype", [DataType.INT4, DataType.UINT4])
def test_four_bit_types_are_refused(factory: Any, tensor: Any, dtype: DataType) -> None:
    with pytest.raises(DeviceError, match="expected one of fp32"):
        factory.zeros((2,), dtype, Device.CPU)
    with pytest.raises(DeviceError, match="expected one of fp32"):
        tensor([1.0]).to_dtype(dtype)


@pytest.mark.clause("BK-TORCH-6")
def test_random_tensors_repeat_and_equal_numpys(factory: Any) -> None:
    for dtype in (DataType.FP32, DataType.BF16):
        drawn = factory.uniform((50,), -2.0, 3.0, dtype, Device.CPU, rng=np.random.default_rng(7))
        assert np.array_equal(drawn.to_numpy(), np.random.default_rng(7).uniform(-2, 3, 50).astype(STORED[dtype]))
        drawn = factory.normal((5, 4), 1.0, 2.0, dtype, Device.CPU, rng=np.random.default_rng(8))
        assert np.array_equal(drawn.to_numpy(), np.random.default_rng(8).normal(1, 2, (5, 4)).astype(STORED[dtype]))
    first, second = (factory.normal((4,), 0, 1, DataType.FP32, Device.CPU).to_vec_f32() for _ in range(2))
    assert first.tolist() != second.tolist()
    for bad in (
        lambda: factory.normal((1,), 0, -1, DataType.FP32, Device.CPU),
        lambda: factory.uniform((1,), 2, 1, DataType.FP32, Device.CPU),
    ):
        with pytest.raises(BackendError):
            bad()


@pytest.mark.clause("BK-TORCH-5", "BK-TORCH-7")
def test_filled_and_sliced(factory: Any) -> None:
    for dtype, numpy_type in STORED.items():
        assert factory.zeros((2, 0), dtype, Device.CPU).shape() == (2, 0)
        ones = factory.ones((2, 3), dtype, Device.CPU)
        assert np.array_equal(ones.to_numpy(), np.ones((2, 3), numpy_type))
        assert not factory.zeros_like(ones).to_numpy().astype(np.float32).any()
        assert not factory.empty((3,), dtype, Device.CPU).to_numpy().astype(np.float32).any()
        data = factory.from_slice([0, 1, 2, 100.4], (2, 2), dtype, Device.CPU)
        assert data.to_numpy().astype(np.float64)[1, 1] == np.float64(
            1 if dtype is DataType.BOOL else 100 if dtype.is_integer() else np.float32(100.4).astype(numpy_type)
        )
    with pytest.raises(BackendError, match="from_slice"):
        factory.from_slice([1, 2, 3], (2, 2), DataType.FP32, Device.CPU)
    with pytest.raises(BackendError, match="expected dimensions"):
        factory.zeros((2, -1), DataType.FP32, Device.CPU)


@pytest.mark.clause("BK-TORCH-5")
def test_a_copy_from_another_backend(factory: Any) -> None:
    from ferrum_ref.numpy_backend.tensor import NumpyTensor

    array = np.array([1.5, 2.5], ml_dtypes.bfloat16)
    copy = factory.from_tensor(NumpyTensor(array), Device.CPU)
    assert np.array_equal(copy.to_numpy(), array)
    assert not np.shares_memory(copy.to_numpy(), array)
    assert factory.to_device(copy, Device.CPU) is copy
    assert copy.to_cpu() is copy


@pytest.mark.clause("BK-TORCH-7")
@given(values=hnp.arrays(np.float32, 8, elements=st.floats(width=32)), name=st.sampled_from(["FP16", "BF16", "FP8"]))
def test_float_conversions_round_as_ml_dtypes(values: np.ndarray, name: str) -> None:
    dtype = DataType[name]
    with np.errstate(all="ignore"):
        want = (np.clip(values, -448, 448) if name == "FP8" else values).astype(STORED[dtype])
    got = TorchTensor(torch.from_numpy(values)).to_dtype(dtype).to_numpy()
    assert np.array_equal(got.astype(np.float32), want.astype(np.float32), equal_nan=True)


@pytest.mark.clause("BK-TORCH-7")
def test_conversions_that_are_easily_wrong(tensor: Any) -> None:
    big = tensor([2**25 + 2**17 + 1, -(2**25 + 2**17 + 1)], np.int32).to_dtype(DataType.BF16)
    assert big.to_vec_f32().tolist() == [33816576.0, -33816576.0]  # two roundings would give 2**25
    assert tensor([0.5, 1.5, 2.5, -0.5, 300, -np.inf]).to_dtype(DataType.UINT8).to_vec_u32() == [0, 2, 2, 0, 255, 0]
    assert tensor([2**32 - 1, 5], np.uint32).to_dtype(DataType.INT32).to_numpy().tolist() == [2**31 - 1, 5]
    assert tensor([-1, 5], np.int8).to_dtype(DataType.UINT32).to_vec_u32() == [0, 5]
    assert tensor([0.0, -0.0, 1e-30, np.nan]).to_dtype(DataType.BOOL).to_numpy().tolist() == [False, False, True, True]
    assert tensor([True, False], np.bool_).to_dtype(DataType.FP16).to_vec_f32().tolist() == [1.0, 0.0]
    assert tensor([2**24 + 1, 2**24 + 3], np.uint32).to_dtype(DataType.FP32).to_vec_f32().tolist() == [
        2.0**24,
        2.0**24 + 4,
    ]
    with pytest.raises(DeviceError, match="NaN has no value in int8"):
        tensor([np.nan]).to_dtype(DataType.INT8)
    x = tensor([1.0])
    assert x.to_dtype(DataType.FP32) is x


@pytest.mark.clause("BK-TORCH-7")
@pytest.mark.parametrize("source", STORED)
@pytest.mark.parametrize("target", STORED)
def test_every_conversion_equals_the_numpy_backends(factory: Any, source: DataType, target: DataType) -> None:
    from ferrum_ref.kernels.rounding import cast

    values = np.array([0, 1, 2, 3, 17, 100, 120.5, 255, 447, 1000, 65504, 2**24 + 1, 2**31 - 1, -1, -2.5, -130])
    with np.errstate(all="ignore"):
        array = cast(values, np.dtype(STORED[source]))
        want = cast(array, np.dtype(STORED[target]))
    got = factory.from_numpy(array).to_dtype(target).to_numpy()
    assert got.dtype == want.dtype
    assert np.array_equal(got.astype(np.float64), want.astype(np.float64))
