"""Tensors: bits kept, views shared, types converted."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ferrum_ref.errors import BackendError, DeviceError, InvalidParameterError, ShapeError, UnsupportedError
from ferrum_ref.types.devices import DataType, Device

BF16 = ml_dtypes.bfloat16
TYPES = (np.float32, np.float16, BF16, np.int32, np.int16, np.int8, np.uint32, np.uint16, np.uint8, np.bool_)


@pytest.mark.clause("BK-NCUDA-4", "BK-NCUDA-12")
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_every_bit_comes_back_through_views_and_copies(factory: Any, ops: Any, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    size = np.dtype(dtype).itemsize
    raw = rng.integers(0, 2 if dtype is np.bool_ else 256, 24 * size, dtype=np.uint8)
    array = raw.view(dtype).reshape(2, 3, 4)
    tensor = factory.from_numpy(array)
    assert tensor.to_numpy().dtype == np.dtype(dtype)
    assert tensor.to_numpy().tobytes() == array.tobytes()
    swapped = ops.permute(tensor, [2, 0, 1])
    assert not swapped.is_contiguous()
    assert swapped.to_numpy().tobytes() == np.ascontiguousarray(array.transpose(2, 0, 1)).tobytes()
    box = swapped.view((1, 0, 1), (4, 2, 3))
    assert box.to_numpy().tobytes() == np.ascontiguousarray(array.transpose(2, 0, 1)[1:4, 0:2, 1:3]).tobytes()
    joined = ops.concat([tensor, ops.transpose(tensor, 0, 1).reshape((2, 3, 4))], 1)
    both = np.concatenate([array, array.swapaxes(0, 1).reshape(2, 3, 4)], 1)
    assert joined.to_numpy().tobytes() == both.tobytes()


@pytest.mark.clause("BK-NCUDA-4")
def test_views_share_storage_and_copies_do_not(factory: Any, ops: Any, kernels: Any) -> None:
    host = np.zeros((4, 1, 2), np.float32)
    cache = factory.from_numpy(host)
    seen = cache.view((1, 0, 0), (3, 1, 2)).reshape((2, 2))
    first, second = ops.split(cache, [1, 3], 0)
    narrowed = factory.narrow(cache, 0, 2, 1)
    rows = factory.from_numpy(np.array([[[5.0, 6.0]]], np.float32))
    kernels.attention_ops().write_kv(cache, rows, [2])
    assert seen.to_numpy().tolist() == [[0.0, 0.0], [5.0, 6.0]]
    assert second.to_numpy()[1].tolist() == [[5.0, 6.0]]
    assert narrowed.to_numpy().tolist() == [[[5.0, 6.0]]]
    assert not first.to_numpy().any()
    assert not host.any()


@pytest.mark.clause("BK-NCUDA-4")
def test_from_numpy_takes_any_layout_and_refuses_other_types(factory: Any) -> None:
    array = np.arange(12, dtype=">f4").reshape(3, 4)[::-1, ::2]
    assert factory.from_numpy(array).to_numpy().tolist() == array.tolist()
    assert factory.from_numpy(np.float32(3.0)).shape() == ()
    assert factory.from_numpy(np.zeros((0, 3), np.float32)).to_numpy().shape == (0, 3)
    for bad in (np.zeros(2), np.zeros(2, np.int64)):
        with pytest.raises(DeviceError, match="from_numpy: array: got element type"):
            factory.from_numpy(bad)
    with pytest.raises(DeviceError, match="keep packed data as uint8"):
        factory.zeros((2,), DataType.INT4, Device.CPU)


@pytest.mark.clause("BK-NCUDA-7", "BK-NCUDA-10")
def test_rounding_to_sixteen_bits_is_ieees_on_every_kind_of_value(factory: Any) -> None:
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, 300, dtype=np.uint64).astype(np.uint32)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 65504.0, 65519.9, 65520.0, 3.4e38, 1e-40, 6e-8, 2.9e-8, 2.0**-133]
    ties = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8 + 2.0**-20]
    values = np.concatenate([bits.view(np.float32), np.array(special + ties, np.float32)])
    tensor = factory.from_numpy(values)
    for data_type, host in ((DataType.FP16, np.float16), (DataType.BF16, BF16)):
        got = tensor.to_dtype(data_type).to_numpy()
        with np.errstate(all="ignore"):
            expected = values.astype(host)
        nan = np.isnan(values)
        assert np.isnan(got[nan].astype(np.float32)).all()
        assert got[~nan].tobytes() == expected[~nan].tobytes()
        back = tensor.to_dtype(data_type).to_dtype(DataType.FP32).to_numpy()
        assert back[~nan].tobytes() == expected[~nan].astype(np.float32).tobytes()


@pytest.mark.clause("BK-NCUDA-4", "BK-NCUDA-10")
def test_fp8_is_stored_and_converted_with_saturation_and_not_computed_with(factory: Any, ops: Any) -> None:
    signalling = np.array([0x7F800001], np.uint32).view(np.float32)
    x = factory.from_numpy(np.concatenate([np.array([1.0625, 1.1875, 500.0, -np.inf], np.float32), signalling]))
    eight = x.to_dtype(DataType.FP8)
    assert eight.to_numpy().dtype == np.dtype(ml_dtypes.float8_e4m3fn)
    back = eight.to_dtype(DataType.BF16).to_numpy().astype(np.float64)
    assert back[:4].tolist() == [1.0, 1.25, 448.0, -448.0]
    assert np.isnan(back[4])
    with pytest.raises(BackendError, match="expected fp32, fp16 or bf16"):
        ops.silu(eight)


@pytest.mark.clause("BK-NCUDA-10")
def test_integers_convert_as_the_contract_says(factory: Any) -> None:
    big = factory.from_numpy(np.array([2**25 + 2**17 + 1, -7], np.int32))
    assert big.to_dtype(DataType.BF16).to_numpy().astype(np.float64).tolist() == [33816576.0, -7.0]
    assert big.to_dtype(DataType.INT8).to_numpy().tolist() == [127, -7]
    floats = factory.from_numpy(np.array([2.5, 3.5, -1e9, 300.0], np.float32))
    assert floats.to_dtype(DataType.UINT8).to_numpy().tolist() == [2, 4, 0, 255]
    assert floats.to_dtype(DataType.BOOL).to_numpy().tolist() == [True] * 4
    assert floats.to_dtype(DataType.BOOL).to_dtype(DataType.FP16).to_numpy().tolist() == [1.0] * 4
    with pytest.raises(DeviceError, match="NaN has no value in int32"):
        factory.from_numpy(np.array([np.nan], np.float32)).to_dtype(DataType.INT32)


@pytest.mark.clause("BK-NCUDA-4")
def test_fills_ids_and_random_numbers(factory: Any) -> None:
    for data_type in (DataType.FP32, DataType.FP16, DataType.BF16, DataType.INT8, DataType.BOOL):
        assert factory.ones((2, 3), data_type, Device.CPU).to_numpy().astype(np.float64).tolist() == [[1.0] * 3] * 2
        assert not factory.empty((5,), data_type, Device.CPU).to_numpy().astype(np.float64).any()
    assert factory.from_ids([0, 16777217, 2**32 - 1]).to_numpy().tolist() == [0, 16777217, 2**32 - 1]
    with pytest.raises(InvalidParameterError, match="from_ids"):
        factory.from_ids([-1])
    drawn = factory.normal((50,), 1.0, 2.0, DataType.BF16, Device.CPU, rng=np.random.default_rng(7)).to_numpy()
    expected = np.random.default_rng(7).normal(1.0, 2.0, 50)
    assert drawn.tobytes() == expected.astype(np.float32).astype(BF16).tobytes()
    assert factory.from_slice([1.0, 2.0], (2, 1), DataType.FP16, Device.CPU).to_numpy().tolist() == [[1.0], [2.0]]


@pytest.mark.clause("BK-NCUDA-4")
def test_shapes_that_do_not_fit_are_errors(factory: Any, ops: Any, tensor: Any) -> None:
    x = tensor(np.zeros((2, 3)))
    for call in (
        lambda: x.reshape((4, 2)),
        lambda: factory.narrow(x, 1, 2, 2),
        lambda: ops.split(x, [1, 1], 1),
        lambda: ops.permute(x, [0, 0]),
        lambda: ops.transpose(x, 0, 2),
        lambda: ops.concat([x, tensor(np.zeros((3, 3)))], 1),
    ):
        with pytest.raises(ShapeError, match="expected"):
            call()
    with pytest.raises(InvalidParameterError, match="view"):
        x.view((0, 2), (2, 1))
    with pytest.raises(BackendError, match="expected at least one"):
        ops.concat([], 0)


@pytest.mark.clause("BK-NCUDA-4")
def test_memory_is_handed_to_other_libraries_on_a_gpu_only(tensor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = tensor(np.zeros((2, 3)))
    assert not hasattr(x, "__cuda_array_interface__")
    assert x.to_cpu() is x

    class Memory:
        size, dtype = 6, np.dtype(np.float32)

        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            return {"data": (4096, False), "typestr": "<f4", "version": 3}

    monkeypatch.setattr(x, "array", Memory())
    seen = x.view((0, 1), (2, 3)).__cuda_array_interface__
    assert (seen["data"], seen["shape"], seen["strides"]) == ((4100, False), (2, 2), (12, 4))
    monkeypatch.setattr(x.runtime.machine, "device", Device.CUDA(0))
    with pytest.raises(UnsupportedError, match="to_numpy"):
        x.to_cpu()
