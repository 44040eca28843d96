"""Matrix products, ggml weights and the embedding table."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ferrum_ref.errors import BackendError, InvalidParameterError, UnsupportedError
from ferrum_ref.interfaces.kernel_ops import KernelOpsDispatch, QuantScheme
from ferrum_ref.types.devices import DataType

gguf = pytest.importorskip("gguf")
RNG = np.random.default_rng(13)
Q4_0 = QuantScheme.Q4_0(32)


@pytest.mark.clause("BK-TORCH-10")
def test_linear_transposes_and_matmul_does_not(kernels: Any, ops: Any, tensor: Any) -> None:
    x, w = tensor([[1.0, 0.0]]), tensor([[1.0, 2.0], [3.0, 4.0]])  # D-01: square and not symmetric
    assert kernels.linear_ops().linear(x, w).to_vec_f32().tolist() == [1.0, 3.0]
    assert ops.matmul(x, w).to_vec_f32().tolist() == [1.0, 2.0]
    assert KernelOpsDispatch(None, ops).linear(x, w).to_vec_f32().tolist() == [1.0, 3.0]


@pytest.mark.clause("BK-TORCH-15")
@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("sizes", [(7, 5), (64, 33), (1, 1), (0, 3), (4, 0)])
def test_linear_takes_any_leading_axes(
    kernels: Any, tensor: Any, close: Any, leading: tuple[int, ...], sizes: tuple[int, int]
) -> None:
    x = RNG.normal(size=(*leading, sizes[0])).astype(np.float32)
    w = RNG.normal(size=(sizes[1], sizes[0])).astype(np.float32)
    want = x.astype(np.float64) @ w.T.astype(np.float64)
    magnitude = np.abs(x).astype(np.float64) @ np.abs(w).T
    close(kernels.linear_ops().linear(tensor(x), tensor(w)), want, sizes[0] + 1, magnitude)
    narrow = kernels.linear_ops().linear(tensor(x).to_dtype(DataType.BF16), tensor(w).to_dtype(DataType.BF16))
    assert narrow.shape() == (*leading, sizes[1])
    assert narrow.dtype() == DataType.BF16


@pytest.mark.clause("BK-TORCH-8", "BK-TORCH-15")
@pytest.mark.parametrize("name", ["FP16", "BF16", "FP8"])
def test_narrow_products_are_float32_rounded_once(kernels: Any, ops: Any, tensor: Any, close: Any, name: str) -> None:
    dtype = DataType[name]
    x, w = (tensor(RNG.normal(size=size)).to_dtype(dtype) for size in ((3, 80), (7000, 80)))
    x32, w32 = x.to_dtype(DataType.FP32), w.to_dtype(DataType.FP32)
    want = x32.to_numpy().astype(np.float64) @ w32.to_numpy().astype(np.float64).T
    magnitude = np.abs(x32.to_numpy()).astype(np.float64) @ np.abs(w32.to_numpy()).astype(np.float64).T
    mixed = kernels.linear_ops().linear(x32, w)  # several blocks of the narrow weight
    close(mixed, want, 81, magnitude)
    got = kernels.linear_ops().linear(x, w)
    assert got.dtype() == dtype
    assert np.array_equal(got.to_numpy(), mixed.to_dtype(dtype).to_numpy())
    product = ops.matmul(x, ops.transpose(w, 0, 1))
    unit = float({"FP16": 2.0**-11, "BF16": 2.0**-8, "FP8": 2.0**-4}[name])
    slack = (np.abs(want) + 81 * 2.0**-23 * magnitude) * unit + 81 * 2.0**-23 * magnitude
    assert np.all(np.abs(product.to_numpy().astype(np.float64) - want) <= slack + 2.0**-10)


@pytest.mark.clause("BK-TORCH-10")
def test_matmul_broadcasts_leading_axes(ops: Any, tensor: Any, close: Any) -> None:
    a = RNG.normal(size=(4, 1, 2, 3)).astype(np.float32)
    b = RNG.normal(size=(5, 3, 6)).astype(np.float32)
    want = a.astype(np.float64) @ b.astype(np.float64)
    close(ops.matmul(tensor(a), tensor(b)), want, 4, np.abs(a).astype(np.float64) @ np.abs(b))
    assert ops.matmul(tensor(np.ones((2, 0))), tensor(np.ones((0, 3)))).to_numpy().tolist() == [[0.0] * 3] * 2
    for left, right in (((2, 3), (2, 3)), ((3,), (3, 2)), ((2, 2, 3), (3, 3, 1))):
        with pytest.raises(BackendError, match="matmul"):
            ops.matmul(tensor(np.ones(left)), tensor(np.ones(right)))


def packed_and_values(name: str, out: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    kind = gguf.GGMLQuantizationType[name]
    packed = gguf.quants.quantize(RNG.normal(size=(out, size)).astype(np.float32), kind)
    return packed, gguf.quants.dequantize(packed, kind)


@pytest.mark.clause("BK-TORCH-16")
@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize(("out", "size"), [(5, 32), (7, 96), (700, 576)])
def test_quantized_linear_reads_ggml_blocks(
    kernels: Any, tensor: Any, close: Any, name: str, out: int, size: int
) -> None:
    packed, values = packed_and_values(name, out, size)
    scheme = getattr(QuantScheme, name)(32)
    unit = kernels.linear_ops().quantized_linear(tensor(np.eye(size)), tensor(packed, np.uint8), scheme)
    assert np.array_equal(unit.to_numpy(), values.T)  # exact, weight for weight
    x = RNG.normal(size=(2, 3, size)).astype(np.float32)
    want = x.astype(np.float64) @ values.T.astype(np.float64)
    got = kernels.linear_ops().quantized_linear(tensor(x), tensor(packed, np.uint8), scheme)
    close(got, want, size + 1, np.abs(x).astype(np.float64) @ np.abs(values).T)
    low = tensor(x).to_dtype(DataType.BF16)
    narrow = kernels.linear_ops().quantized_linear(low, tensor(packed, np.uint8), scheme)
    wide = kernels.linear_ops().quantized_linear(low.to_dtype(DataType.FP32), tensor(packed, np.uint8), scheme)
    assert np.array_equal(narrow.to_numpy(), wide.to_dtype(DataType.BF16).to_numpy())


@pytest.mark.clause("BK-TORCH-16")
def test_quantized_linear_by_hand(kernels: Any, tensor: Any) -> None:
    empty = kernels.linear_ops().quantized_linear(tensor(np.ones((2, 0))), tensor(np.ones((3, 0)), np.uint8), Q4_0)
    assert empty.to_numpy().tolist() == [[0.0] * 3] * 2
    # one q4_0 block, scale 0.5: byte 0 = 0x9F holds weight 0 (low nibble 15) and weight 16 (high nibble 9)
    block = np.concatenate([np.array([0.5], np.float16).view(np.uint8), [0x9F], np.full(15, 0x88)]).astype(np.uint8)
    x = np.zeros((2, 32))
    x[0, 0] = x[1, 16] = 1
    got = kernels.linear_ops().quantized_linear(tensor(x), tensor(block[None], np.uint8), Q4_0)
    assert got.to_vec_f32().tolist() == [3.5, 0.5]


@pytest.mark.clause("BK-TORCH-16")
def test_quantized_linear_refuses_what_it_cannot_read(kernels: Any, tensor: Any) -> None:
    multiply = kernels.linear_ops().quantized_linear
    x, packed = tensor(np.ones((1, 64))), tensor(np.zeros((3, 36)), np.uint8)
    with pytest.raises(UnsupportedError, match="group_size=32"):
        multiply(x, packed, QuantScheme.Q4_0(64))
    with pytest.raises(UnsupportedError, match="expected one of q4_0, q4_1"):
        multiply(x, packed, QuantScheme())
    for bad in (
        lambda: multiply(x, packed, QuantScheme.Q8_0(32)),
        lambda: multiply(tensor(np.ones((1, 33))), packed, QuantScheme.Q4_0(32)),
        lambda: multiply(x, tensor(np.zeros((3, 36)), np.int8), QuantScheme.Q4_0(32)),
        lambda: multiply(x, tensor(np.zeros(36), np.uint8), QuantScheme.Q4_0(32)),
    ):
        with pytest.raises(BackendError, match="packed_weight"):
            bad()


@pytest.mark.clause("BK-TORCH-15")
def test_embedding_copies_rows(kernels: Any, tensor: Any) -> None:
    for dtype in (np.float32, ml_dtypes.bfloat16, np.uint32):
        table = tensor(np.arange(12).reshape(4, 3), dtype)
        for ids in ([3, 0, 3], np.array([3, 0, 3], np.uint32), np.array([9, 3, 9, 0, 9, 3])[1::2]):
            got = kernels.linear_ops().embedding(table, ids).to_numpy()
            assert np.array_equal(got, table.to_numpy()[[3, 0, 3]])
    assert kernels.linear_ops().embedding(table, []).shape() == (0, 3)
    for ids in ([4], [-1], [0.5], ["a"]):
        with pytest.raises(InvalidParameterError, match="embedding: ids"):
            kernels.linear_ops().embedding(table, ids)
    for call in (
        lambda: kernels.linear_ops().embedding(tensor([1.0]), [0]),
        lambda: kernels.linear_ops().embedding(table, [[0]]),
        lambda: kernels.linear_ops().linear(tensor(np.ones((2, 3))), tensor(np.ones((3, 2)))),
        lambda: kernels.linear_ops().linear(tensor(1.0), tensor(np.ones((3, 1)))),
        lambda: kernels.linear_ops().linear(tensor(np.ones(3), np.int32), tensor(np.ones((2, 3)))),
    ):
        with pytest.raises(BackendError, match="expected"):
            call()
