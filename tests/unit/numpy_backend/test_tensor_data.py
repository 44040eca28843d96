"""The bytes of tensors on the host."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from ferrum_ref.errors import BackendError, DeviceError, InvalidParameterError
from ferrum_ref.interfaces.tensor import Fp8Format
from ferrum_ref.numpy_backend.factory import NumpyTensorFactory
from ferrum_ref.numpy_backend.tensor_ops import NumpyTensorOps
from ferrum_ref.types.devices import DataType, Device

FACTORY, OPS = NumpyTensorFactory(), NumpyTensorOps()


@pytest.mark.clause("TN-DATA-1")
def test_floats_without_a_copy():
    t = FACTORY.from_slice([1, 2, 3, 4], (2, 2), DataType.FP32, Device.CPU)
    data = t.data_f32()
    assert data.tolist() == [1, 2, 3, 4]
    assert np.shares_memory(data, t.to_numpy())
    assert not data.flags.writeable
    assert t.to_numpy().flags.writeable
    assert OPS.transpose(t, 0, 1).data_f32() is None
    assert t.to_dtype(DataType.FP16).data_f32() is None
    assert FACTORY.from_slice([7], (), DataType.FP32, Device.CPU).data_f32().tolist() == [7]


@pytest.mark.clause("TN-DATA-2", "TN-DATA-3")
def test_bytes():
    t = FACTORY.from_slice([1, -2, 3, 0.5], (2, 2), DataType.FP32, Device.CPU)
    expected = struct.pack("<4f", 1, -2, 3, 0.5)
    view = t.data_bytes()
    assert view == expected
    assert view.readonly
    assert np.shares_memory(np.frombuffer(view, np.uint8), t.to_numpy())
    assert t.to_vec_u8() == expected
    turned = OPS.transpose(t, 0, 1)
    assert turned.data_bytes() is None
    assert turned.to_vec_u8() == struct.pack("<4f", 1, 3, -2, 0.5)
    flags = FACTORY.from_slice([0, 3], (2,), DataType.BOOL, Device.CPU)
    assert flags.to_vec_u8() == b"\x00\x01" == flags.data_bytes()
    assert FACTORY.from_ids([2**31 + 1]).to_vec_u8() == struct.pack("<I", 2**31 + 1)
    assert FACTORY.zeros((0, 2), DataType.BF16, Device.CPU).data_bytes() == b""


@pytest.mark.clause("TN-DATA-4", "TN-DTYPE-3")
@pytest.mark.parametrize("dtype", DataType)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (3, 5), (2, 2)])
def test_from_bytes_inverts(dtype, shape):
    rng = np.random.default_rng(1)
    t = FACTORY.uniform(shape, -9.0, 9.0, dtype, Device.CPU, rng=rng)
    data = t.to_vec_u8()
    assert len(data) == dtype.packed_bytes(t.numel())
    for given in (data, bytearray(data), memoryview(data)):
        back = FACTORY.from_bytes(given, shape, dtype)
        assert (back.shape(), back.dtype(), back.to_vec_u8()) == (shape, dtype, data)
    with pytest.raises(BackendError, match="bytes for shape"):
        FACTORY.from_bytes(data + b"\x00", shape, dtype)
    with pytest.raises(DeviceError, match="expected cpu"):
        FACTORY.from_bytes(data, shape, dtype, Device.cuda(0))


@pytest.mark.clause("TN-DATA-4")
def test_bytes_that_no_tensor_has():
    with pytest.raises(InvalidParameterError, match="byte 2 for bool"):
        FACTORY.from_bytes(b"\x01\x02", (2,), DataType.BOOL)
    with pytest.raises(InvalidParameterError, match="padding 1"):
        FACTORY.from_bytes(b"\x21\x13", (3,), DataType.INT4)
    source = bytearray(b"\x01")
    t = FACTORY.from_bytes(source, (1,), DataType.UINT8)
    source[0] = 9
    assert t.to_vec_u8() == b"\x01"
    wide = NumpyTensorFactory(fp8=Fp8Format.E5M2)
    assert wide.from_bytes(b"\x7b", (1,), DataType.FP8).to_vec_f32().tolist() == [57344]
