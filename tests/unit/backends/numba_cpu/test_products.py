"""Matrix products, dense and packed, and the embedding table."""

from __future__ import annotations

from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from ferrum_ref.errors import InvalidParameterError, ShapeError, UnsupportedError
from ferrum_ref.interfaces.kernel_ops import QuantScheme

RNG = np.random.default_rng(31)
SCHEMES = {
    "q4_0": (QuantScheme.Q4_0(32), gguf.GGMLQuantizationType.Q4_0),
    "q8_0": (QuantScheme.Q8_0(32), gguf.GGMLQuantizationType.Q8_0),
}


def product(x: Any, weight: Any) -> tuple[np.ndarray, np.ndarray]:
    """x @ weight.T in float64, and the sums of absolute products that its rounding errors grow with."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    return x @ weight.T, np.abs(x) @ np.abs(weight).T


@pytest.mark.clause("BK-NCPU-12")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("rows", "size", "outputs"), [(1, 576, 37), (3, 77, 9), (9, 200, 2000), (1, 15, 3), (2, 0, 4)])
def test_linear(kernels: Any, tensor: Any, close: Any, dtype: Any, rows: int, size: int, outputs: int) -> None:
    x, w = RNG.normal(size=(rows, size)).astype(np.float32), RNG.normal(size=(outputs, size)).astype(dtype)
    want, magnitude = product(x, w)
    close(kernels.linear_ops().linear(tensor(x), tensor(w, dtype)), want, size + 1, magnitude)
    narrow = kernels.linear_ops().linear(tensor(x, np.float16), tensor(w, dtype)).to_numpy()
    exact = kernels.linear_ops().linear(tensor(x.astype(np.float16)), tensor(w, dtype)).to_numpy()
    assert np.array_equal(narrow, exact.astype(np.float16))


@pytest.mark.clause("BK-NCPU-12")
def test_shapes_of_products(kernels: Any, ops: Any, tensor: Any) -> None:
    linear = kernels.linear_ops().linear
    w = tensor([[1, 2], [3, 4]])
    assert linear(tensor([1, 0]), w).to_numpy().tolist() == [1.0, 3.0]
    assert ops.matmul(tensor([[1, 0]]), w).to_numpy().tolist() == [[1.0, 2.0]]
    assert linear(tensor(np.ones((2, 3, 4, 2))), w).shape() == (2, 3, 4, 2)
    assert ops.matmul(tensor(np.ones((5, 1, 2, 3))), tensor(np.ones((4, 3, 2)))).shape() == (5, 4, 2, 2)
    with pytest.raises(ShapeError, match="output first"):
        linear(tensor([1, 2, 3]), w)


@pytest.mark.clause("BK-NCPU-13")
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_packed_weights_mean_what_gguf_says(kernels: Any, tensor: Any, close: Any, name: str, rows: int) -> None:
    scheme, ggml_type = SCHEMES[name]
    x = RNG.normal(size=(rows, 160)).astype(np.float32)
    packed = gguf.quants.quantize(RNG.normal(size=(41, 160)).astype(np.float32), ggml_type)
    want, magnitude = product(x, gguf.quants.dequantize(packed, ggml_type))
    found = kernels.linear_ops().quantized_linear(tensor(x), tensor(packed, np.uint8), scheme)
    close(found, want, 162, magnitude)


@pytest.mark.clause("BK-NCPU-13")
@pytest.mark.parametrize("name", SCHEMES)
def test_every_scale_and_every_quantum(kernels: Any, tensor: Any, name: str) -> None:
    """A unit vector picks one weight, so the product is exact: all scales, subnormal and infinite, and all quanta."""
    scheme, ggml_type = SCHEMES[name]
    block = 18 if name == "q4_0" else 34
    scales = np.array([0x0001, 0x03FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0x8000], np.uint16)
    packed = np.zeros((len(scales) * 8, block), np.uint8)
    packed[:, :2] = np.repeat(scales, 8).view(np.uint8).reshape(-1, 2)
    packed[:, 2:] = RNG.integers(0, 256, (len(packed), block - 2))
    want = gguf.quants.dequantize(packed, ggml_type)
    for row in (1, 6):  # few rows of x, and many
        x = np.tile(np.eye(32, dtype=np.float32)[:row], (1, 1))
        found = kernels.linear_ops().quantized_linear(tensor(x), tensor(packed, np.uint8), scheme).to_numpy()
        assert np.array_equal(found, want[:, :row].T)
    infinite = packed[:1].copy()
    infinite[0, :2] = np.array([0x7C00], np.uint16).view(np.uint8)
    found = kernels.linear_ops().quantized_linear(tensor(np.ones((1, 32))), tensor(infinite, np.uint8), scheme)
    assert not np.isfinite(found.to_numpy()).any()


@pytest.mark.clause("BK-NCPU-12")
def test_sums_over_many_rows_are_taken_in_order(kernels: Any, tensor: Any) -> None:
    """Products that are exact and sums that round: 512 columns one after another, then these sums one after another."""
    x = RNG.integers(-4000, 4000, (9, 1100)).astype(np.float32)
    w = RNG.integers(-4000, 4000, (37, 1100)).astype(np.float32)
    want = np.zeros((9, 37), np.float32)
    for start in range(0, 1100, 512):
        part = np.zeros_like(want)
        for i in range(start, min(1100, start + 512)):
            part += np.outer(x[:, i], w[:, i])
        want += part
    assert np.array_equal(kernels.linear_ops().linear(tensor(x), tensor(w)).to_numpy(), want)


@pytest.mark.clause("BK-NCPU-12", "BK-NCPU-13")
@pytest.mark.parametrize("rows", [5, 6, 7, 8, 11, 12, 13, 31, 60])
@pytest.mark.parametrize(("size", "outputs"), [(1, 1), (3, 33), (64, 32), (516, 100), (640, 203), (1030, 7)])
def test_many_rows_of_every_count(
    kernels: Any, tensor: Any, close: Any, threads: Any, rows: int, size: int, outputs: int
) -> None:
    """Tiles of every height, ragged panels, rests of columns; a row and an output alone, with one thread and two."""
    x, weight = RNG.normal(size=(60, size)).astype(np.float32), RNG.normal(size=(outputs, size)).astype(np.float32)
    quanta, scales = np.rint(weight * 20).astype(np.int8), RNG.uniform(0.01, 0.1, outputs).astype(np.float32)
    linear, row_scaled = kernels.linear_ops().linear, kernels.linear_ops().row_scaled_linear
    want, magnitude = product(x[:rows], weight)
    for count in (1, 2):
        threads(count)
        found = linear(tensor(x[:rows]), tensor(weight))
        close(found, want, size + 1, magnitude)
        assert np.array_equal(found.to_numpy(), linear(tensor(x), tensor(weight)).to_numpy()[:rows])
        some = linear(tensor(x[:rows]), tensor(weight[outputs // 2 :])).to_numpy()
        assert np.array_equal(found.to_numpy()[:, outputs // 2 :], some)
        scaled = row_scaled(tensor(x[:rows]), tensor(quanta, np.int8), tensor(scales)).to_numpy()
        unscaled = linear(tensor(x[:rows]), tensor(quanta.astype(np.float32))).to_numpy()
        assert np.array_equal(scaled, unscaled * scales)


@pytest.mark.clause("BK-NCPU-12")
def test_what_is_not_finite_stays_in_its_row_and_output(kernels: Any, tensor: Any) -> None:
    x, w = np.ones((14, 40), np.float32), np.ones((35, 40), np.float32)
    x[13, 39], w[34, 0] = np.nan, np.inf
    found = kernels.linear_ops().linear(tensor(x), tensor(w)).to_numpy()
    assert np.isnan(found[13]).all()
    assert np.isinf(found[:13, 34]).all()
    assert (found[:13, :34] == 40.0).all()


@pytest.mark.clause("BK-NCPU-13")
@pytest.mark.parametrize("rows", [2, 9])
def test_an_output_does_not_depend_on_its_neighbours(kernels: Any, tensor: Any, threads: Any, rows: int) -> None:
    linear = kernels.linear_ops()
    x = tensor(RNG.normal(size=(rows, 640)))
    weight = RNG.normal(size=(203, 640)).astype(np.float32)
    packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_0)
    quanta, scales = np.rint(weight * 20).astype(np.int8), np.full(203, 0.05, np.float32)
    calls = {
        "packed": lambda a, b: linear.quantized_linear(x, tensor(packed[a:b], np.uint8), QuantScheme.Q4_0(32)),
        "rows": lambda a, b: linear.row_scaled_linear(x, tensor(quanta[a:b], np.int8), tensor(scales[a:b])),
        "half": lambda a, b: linear.linear(x, tensor(weight[a:b], np.float16)),
    }
    for call in calls.values():
        threads(1)
        whole = call(0, 203).to_numpy()
        threads(2)
        assert np.array_equal(whole, call(0, 203).to_numpy())
        for start, stop in ((0, 1), (5, 12), (201, 203)):
            assert np.array_equal(whole[:, start:stop], call(start, stop).to_numpy())


@pytest.mark.clause("BK-NCPU-13")
@pytest.mark.parametrize("rows", [2, 8])
def test_row_scaled_weights(kernels: Any, tensor: Any, close: Any, rows: int) -> None:
    x, quanta = RNG.normal(size=(rows, 100)).astype(np.float32), RNG.integers(-128, 128, (13, 100)).astype(np.int8)
    scales = RNG.uniform(0.001, 0.1, 13).astype(np.float32)
    want, magnitude = product(x, quanta * scales.astype(np.float64)[:, None])
    found = kernels.linear_ops().row_scaled_linear(tensor(x), tensor(quanta, np.int8), tensor(scales))
    close(found, want, 102, magnitude)
    with pytest.raises(ShapeError, match="int8"):
        kernels.linear_ops().row_scaled_linear(tensor(x), tensor(quanta), tensor(scales))


@pytest.mark.clause("BK-NCPU-13")
def test_other_packings_are_refused(kernels: Any, tensor: Any) -> None:
    linear, packed = kernels.linear_ops(), tensor(np.zeros((2, 34)), np.uint8)
    with pytest.raises(UnsupportedError, match="group_size=32"):
        linear.quantized_linear(tensor(np.ones(64)), packed, QuantScheme.Q8_0(64))
    with pytest.raises(ShapeError, match="uint8"):
        linear.quantized_linear(tensor(np.ones(33)), packed, QuantScheme.Q8_0(32))
    assert linear.quantized_linear(tensor(np.ones((2, 0))), tensor(np.zeros((3, 0)), np.uint8), QuantScheme.Q4_0(32))


@pytest.mark.clause("BK-NCPU-12")
def test_embedding(kernels: Any, tensor: Any) -> None:
    table = RNG.integers(0, 65536, (9, 5)).astype(np.uint16).view(ml_dtypes.bfloat16)
    found = kernels.linear_ops().embedding(type(tensor([0]))(table), [8, 0, 8]).to_numpy()
    assert np.array_equal(found.view(np.uint16), table[[8, 0, 8]].view(np.uint16))
    assert not np.shares_memory(found, table)
    for bad in ([9], [-1]):
        with pytest.raises(InvalidParameterError, match="0 <= id < 9"):
            kernels.linear_ops().embedding(type(tensor([0]))(table), bad)
