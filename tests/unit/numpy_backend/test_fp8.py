"""Choosing between the two kinds of FP8 (D-07)."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.tensor import Fp8Format
from ferrum_ref.numpy_backend.factory import NumpyTensorFactory
from ferrum_ref.numpy_backend.tensor_ops import NumpyTensorOps
from ferrum_ref.types.devices import DataType, Device

FP8, CPU = DataType.FP8, Device.CPU
OPS, FACTORY = NumpyTensorOps(), NumpyTensorFactory()


@pytest.mark.clause("TN-FP8-1", "TN-CAST-2")
def test_choosing():
    x = FACTORY.from_slice([61440.0, 1.125, 300.0], (3,), DataType.FP32, CPU)
    four, five = x.to_dtype(FP8), x.to_dtype(FP8, fp8=Fp8Format.E5M2)
    assert four.dtype() is five.dtype() is FP8
    assert (four.fp8_format(), five.fp8_format(), x.fp8_format()) == (Fp8Format.E4M3FN, Fp8Format.E5M2, None)
    assert four.to_vec_f32().tolist() == [448, 1.125, 288]
    assert five.to_vec_f32().tolist() == [np.inf, 1, 320]
    assert five.to_numpy().dtype == ml_dtypes.float8_e5m2
    assert five.to_dtype(FP8) is five
    assert five.to_dtype(FP8, fp8=Fp8Format.E5M2) is five
    assert five.to_dtype(FP8, fp8=Fp8Format.E4M3FN).to_vec_f32().tolist() == [448, 1, 320]
    assert FACTORY.zeros_like(five).fp8_format() is Fp8Format.E5M2
    assert five.view((0,), (2,)).fp8_format() is Fp8Format.E5M2
    with pytest.raises(InvalidParameterError, match="E5M2 with element type fp16"):
        x.to_dtype(DataType.FP16, fp8=Fp8Format.E5M2)


@pytest.mark.clause("TN-FP8-1")
def test_a_factory_of_the_other_format():
    factory = NumpyTensorFactory(fp8=Fp8Format.E5M2)
    made = [
        factory.zeros((2,), FP8, CPU),
        factory.ones((2,), FP8, CPU),
        factory.empty((2,), FP8, CPU),
        factory.from_slice([1, 2], (2,), FP8, CPU),
        factory.uniform((2,), 0.0, 1.0, FP8, CPU),
        factory.normal((2,), 0.0, 1.0, FP8, CPU),
        FACTORY.from_numpy(np.ones(2, ml_dtypes.float8_e5m2)),
    ]
    assert {t.fp8_format() for t in made} == {Fp8Format.E5M2}
    assert FACTORY.ones((2,), FP8, CPU).fp8_format() is Fp8Format.E4M3FN
    assert factory.ones((2,), DataType.FP16, CPU).fp8_format() is None


@pytest.mark.clause("TN-FP8-3", "TN-DTYPE-2")
def test_operations_on_both():
    four = FACTORY.ones((2, 2), FP8, CPU)
    five = four.to_dtype(FP8, fp8=Fp8Format.E5M2)
    for result in (OPS.add(four, five), OPS.matmul(five, four), OPS.concat([four, five], 0)):
        assert result.dtype() is DataType.FP32
    assert OPS.add(five, five).fp8_format() is Fp8Format.E5M2
    assert OPS.matmul(five, five).fp8_format() is Fp8Format.E5M2
    assert OPS.softmax(five, -1).to_vec_f32().tolist() == [0.5] * 4
