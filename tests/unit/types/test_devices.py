"""Devices and element types against the contract's tables."""

from __future__ import annotations

import copy
import pickle

import pytest

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.types.devices import DataType, Device


@pytest.mark.clause("TY-DEVICE-1")
def test_device_text_index_and_kind() -> None:
    rows = [
        (Device.CPU, "cpu", None, False),
        (Device.CUDA(0), "cuda:0", 0, True),
        (Device.cuda(3), "cuda:3", 3, True),
        (Device.ROCm(1), "rocm:1", 1, True),
        (Device.Metal, "metal", None, True),
    ]
    for device, text, index, gpu in rows:
        assert (str(device), device.index(), device.is_gpu()) == (text, index, gpu)
    assert len({row[0] for row in rows}) == 5
    assert {Device.CUDA(1): "x"}[Device.cuda(1)] == "x"
    with pytest.raises(InvalidParameterError):
        Device.CUDA(-1)
    with pytest.raises(InvalidParameterError):
        Device("cpu", 0)
    with pytest.raises(InvalidParameterError):
        Device("tpu")  # type: ignore[arg-type]


@pytest.mark.clause("TY-DEVICE-2")
def test_parse_inverts_str() -> None:
    for device in (Device.CPU, Device.Metal, Device.CUDA(12), Device.ROCm(0)):
        assert Device.parse(f"  {str(device).upper()} ") == device
    assert Device.parse("cuda") == Device.CUDA(0)


@pytest.mark.clause("TY-DEVICE-2")
@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "metal:0", "cuda:1:2", "cuda: 1"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(InvalidParameterError, match="expected cpu"):
        Device.parse(text)


# name: (bytes as upstream counts, bits, float, integer, quantized)
DTYPES = {
    "FP32": (4, 32, 1, 0, 0), "FP16": (2, 16, 1, 0, 0), "BF16": (2, 16, 1, 0, 0), "FP8": (1, 8, 1, 0, 1),
    "INT32": (4, 32, 0, 1, 0), "INT16": (2, 16, 0, 1, 0), "INT8": (1, 8, 0, 1, 1), "INT4": (1, 4, 0, 1, 1),
    "UINT32": (4, 32, 0, 1, 0), "UINT16": (2, 16, 0, 1, 0), "UINT8": (1, 8, 0, 1, 0), "UINT4": (1, 4, 0, 1, 1),
    "BOOL": (1, 8, 0, 0, 0),
}  # fmt: skip


@pytest.mark.clause("TY-DTYPE-1", "TY-DTYPE-2", "TY-DTYPE-3")
def test_element_types() -> None:
    assert [d.name for d in DataType] == list(DTYPES)
    for dtype in DataType:
        size, bits, is_float, is_integer, is_quantized = DTYPES[dtype.name]
        assert (dtype.size_bytes(), dtype.size_bits()) == (size, bits)
        assert (dtype.is_float(), dtype.is_integer(), dtype.is_quantized()) == (is_float, is_integer, is_quantized)
        assert str(dtype) == dtype.name.lower()


@pytest.mark.clause("TY-DTYPE-2")
def test_packed_bytes_halve_what_upstream_counts_for_4_bits() -> None:
    assert [DataType.INT4.packed_bytes(n) for n in (0, 1, 2, 3, 32)] == [0, 1, 1, 2, 16]
    assert DataType.BF16.packed_bytes(3) == 6
    assert DataType.BOOL.packed_bytes(9) == 9
    with pytest.raises(InvalidParameterError):
        DataType.INT4.packed_bytes(-1)


@pytest.mark.clause("TY-DTYPE-3")
def test_element_types_are_found_by_name_copied_and_pickled_as_themselves() -> None:
    for dtype in DataType:
        assert DataType(dtype.name) is DataType[dtype.name] is dtype
        assert pickle.loads(pickle.dumps(dtype)) is copy.deepcopy(dtype) is dtype
        assert dtype.value == dtype.name
    with pytest.raises(ValueError, match="FP64"):
        DataType("FP64")
    assert len(set(DataType)) == 13
