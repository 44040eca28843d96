"""What the parity cases do not reach: special values, mixed types, wrong arguments, larger matrices."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError, UnsupportedError
from ferrum_ref.interfaces.kernel_ops import QuantScheme
from ferrum_ref.types.devices import DataType

BF16 = ml_dtypes.bfloat16
U32 = 2.0**-24


def gamma(count: float) -> float:
    return count * U32 / (1 - count * U32)


@pytest.mark.clause("BK-NCUDA-9")
def test_activations_at_the_ends_of_the_range(ops: Any, kernels: Any, tensor: Any) -> None:
    x = tensor([-np.inf, -90.0, -0.0, np.inf, np.nan])
    for name, call in (
        ("silu", ops.silu),
        ("gelu", kernels.activation_ops().gelu),
        ("tanh", lambda t: ops.gelu(t, approximate="tanh")),
    ):
        y = call(x).to_numpy()
        assert y[0] == 0.0
        assert math.copysign(1.0, y[0]) == -1.0, name
        assert y[3] == math.inf
        assert math.isnan(y[4])
    exact = -90.0 * math.exp(-90.0)
    assert abs(float(ops.silu(x).to_numpy()[1]) - exact) <= 8 * U32 * abs(exact) + 2.0**-149
    assert ops.relu(x).to_numpy()[:4].tolist() == [0.0, 0.0, 0.0, math.inf]
    assert math.isnan(ops.relu(x).to_numpy()[4])


@pytest.mark.clause("BK-NCUDA-9")
def test_gelu_keeps_its_relative_accuracy_for_negative_x(kernels: Any, tensor: Any) -> None:
    x = -np.linspace(0.5, 5.0, 19).astype(np.float32)
    y = kernels.activation_ops().gelu(tensor(x)).to_numpy().astype(np.float64)
    exact = np.array([0.5 * v * math.erfc(-v / math.sqrt(2.0)) for v in x.astype(np.float64)])
    slope = 2.0 * x.astype(np.float64) ** 2 + 12.0  # erfc(z) moves by 2 z**2 times the rounding of z
    assert (np.abs(y - exact) <= slope * U32 * np.abs(exact)).all()


@pytest.mark.clause("BK-NCUDA-9")
def test_arithmetic_broadcasts_in_the_common_type(ops: Any, tensor: Any) -> None:
    a, b = np.arange(24.0).reshape(2, 3, 4), np.arange(1.0, 5.0)
    for operation, function in ((ops.add, np.add), (ops.sub, np.subtract), (ops.mul, np.multiply)):
        assert operation(tensor(a), tensor(b)).to_numpy().tolist() == function(a, b).tolist()
        assert operation(tensor(b), tensor(a)).to_numpy().tolist() == function(b, a).tolist()
        column = np.array([[1.0], [2.0], [3.0]])
        assert operation(tensor(a), tensor(column)).to_numpy().tolist() == function(a, column).tolist()
    mixed = ops.add(tensor([1.0], np.float16), tensor([2.0**-8], BF16))
    assert mixed.dtype() is DataType.FP32
    assert mixed.to_numpy().tolist() == [1.00390625]
    quotient = ops.div(tensor([1.0, -1.0, 0.0, 1.0]), tensor([0.0, 0.0, 0.0, -0.0])).to_numpy()
    assert quotient[[0, 1, 3]].tolist() == [math.inf, -math.inf, -math.inf]
    assert math.isnan(quotient[2])
    with pytest.raises(ShapeError, match="do not broadcast"):
        ops.add(tensor(a), tensor([1.0, 2.0]))
    with pytest.raises(BackendError, match="expected fp32, fp16 or bf16"):
        ops.add(tensor([1], np.int32), tensor([1], np.int32))


@pytest.mark.clause("BK-NCUDA-8")
def test_softmax_lanes_that_are_no_distribution(ops: Any, tensor: Any) -> None:
    rows = [[-np.inf, -np.inf, -np.inf], [0.0, np.nan, 1.0], [np.inf, 0.0, 0.0], [-np.inf, 0.0, 0.0]]
    p = ops.softmax(tensor(rows), 1).to_numpy()
    assert np.isnan(p[:3]).all()
    assert p[3].tolist() == [0.0, 0.5, 0.5]


@pytest.mark.clause("BK-NCUDA-7", "BK-NCUDA-8")
def test_a_weight_of_another_type_is_read_as_float32(ops: Any, kernels: Any, tensor: Any) -> None:
    x, weight = tensor([[3.0, 4.0]], BF16), tensor([1.0 + 2.0**-12, 1.0])
    y = kernels.norm_ops().rms_norm(x, weight, 0.0)
    assert y.dtype() is DataType.BF16
    expected = np.array([3.0 * (1.0 + 2.0**-12), 4.0]) / math.sqrt(12.5)
    assert y.to_numpy()[0].astype(np.float64).tolist() == expected.astype(BF16).astype(np.float64).tolist()
    bias = tensor([1.0, 2.0], np.float16)
    z = ops.layer_norm(tensor([[1.0, 3.0]]), tensor([1.0, 1.0]), bias, 0.0)
    assert z.to_numpy().tolist() == [[0.0, 3.0]]


@pytest.mark.clause("BK-NCUDA-8")
def test_the_norm_reads_the_sum_before_it_is_rounded(kernels: Any, tensor: Any) -> None:
    x, residual, weight = tensor([256.0, 1.0], BF16), tensor([1.0, 0.0], BF16), tensor([1.0, 1.0], BF16)
    y, total = kernels.norm_ops().rms_norm_residual(x, residual, weight, 0.0)
    assert total.to_numpy().astype(np.float64).tolist() == [256.0, 1.0]
    root = math.sqrt((257.0**2 + 1.0) / 2.0)
    assert float(y.to_numpy()[1]) == float(np.float32(1.0 / root).astype(BF16))
    with pytest.raises(BackendError, match="one element type"):
        kernels.norm_ops().rms_norm_residual(x, tensor([1.0, 0.0]), weight, 0.0)


@pytest.mark.clause("BK-NCUDA-11")
def test_positions_repeat_and_come_in_any_order(kernels: Any, tensor: Any) -> None:
    cos, sin = np.cos(np.arange(6.0))[:, None], np.sin(np.arange(6.0))[:, None]
    x = np.tile([1.0, 0.0], (1, 3, 1, 1))
    y = kernels.position_ops().rotary_embedding(tensor(x), tensor(cos), tensor(sin), [5, 0, 5]).to_numpy()
    expected = np.stack([np.cos([5.0, 0.0, 5.0]), np.sin([5.0, 0.0, 5.0])], -1)[None, :, None]
    assert y.tolist() == expected.astype(np.float32).tolist()
    with pytest.raises(InvalidParameterError, match="position_ids: got 6, expected 0 <= value < 6"):
        kernels.position_ops().rotary_embedding(tensor(x), tensor(cos), tensor(sin), [0, 6, 1])


@pytest.mark.clause("BK-NCUDA-13")
def test_rows_are_written_once_each_and_wrong_ones_not_at_all(kernels: Any, tensor: Any) -> None:
    cache, attention = tensor(np.zeros((2, 2, 1, 2))), kernels.attention_ops()
    rows = tensor(np.arange(8.0).reshape(4, 1, 2))
    attention.write_kv(cache, rows, [3, -1, 3, 0])
    assert cache.to_numpy().reshape(4, 2).tolist() == [[6.0, 7.0], [0.0, 0.0], [0.0, 0.0], [4.0, 5.0]]
    before = cache.to_numpy()
    for slots, error in (
        ([0, 1, 2, 4], BackendError),
        ([0, 1], ShapeError),
        ([0.0, 1.0, 2.0, 3.0], InvalidParameterError),
    ):
        with pytest.raises(error, match="write_kv"):
            attention.write_kv(cache, rows, slots)
    with pytest.raises(ShapeError, match="contiguous cache"):
        attention.write_kv(cache.view((0, 0, 0, 0), (2, 1, 1, 2)), rows, [0, 0, 0, 0])
    assert cache.to_numpy().tobytes() == before.tobytes()


@pytest.mark.clause("BK-NCUDA-13")
def test_embedding_refuses_ids_outside_the_table(kernels: Any, tensor: Any) -> None:
    table = tensor(np.arange(6.0).reshape(3, 2), BF16)
    assert kernels.linear_ops().embedding(table, [2, 0]).to_numpy().astype(float).tolist() == [[4.0, 5.0], [0.0, 1.0]]
    with pytest.raises(InvalidParameterError, match="ids: got -1, expected 0 <= value < 3"):
        kernels.linear_ops().embedding(table, [-1])


@pytest.mark.clause("BK-NCUDA-14")
@pytest.mark.parametrize(
    ("num_rows", "num_columns", "depth"),
    [(65, 66, 17), (9, 130, 3), (64, 64, 16), (17, 1, 33), (21, 16, 2), (37, 32, 2), (53, 48, 2)],
)
def test_tiles_cover_every_edge(kernels: Any, tensor: Any, num_rows: int, num_columns: int, depth: int) -> None:
    rng = np.random.default_rng(num_rows)
    x = rng.standard_normal((num_rows, depth)).astype(np.float32)
    w = rng.standard_normal((num_columns, depth)).astype(np.float32)
    y = kernels.linear_ops().linear(tensor(x), tensor(w)).to_numpy()
    exact, magnitude = x.astype(np.float64) @ w.T.astype(np.float64), np.abs(x).astype(np.float64) @ np.abs(w.T)
    assert (np.abs(y - exact) <= gamma(depth) * magnitude).all()


def packed_rows(scheme: str, num_rows: int, num_blocks: int) -> tuple[Any, Any]:
    """(bytes, float64 values) of random ggml blocks, unpacked by the gguf package."""
    import gguf

    kind = gguf.GGMLQuantizationType[scheme]
    size = gguf.GGML_QUANT_SIZES[kind][1]
    rng = np.random.default_rng(num_rows)
    blocks = rng.integers(0, 256, (num_rows, num_blocks, size), dtype=np.uint8)
    blocks[..., :2] = rng.standard_normal((num_rows, num_blocks, 1)).astype(np.float16).view(np.uint8)
    packed = blocks.reshape(num_rows, -1)
    return packed, gguf.dequantize(packed, kind).astype(np.float64)


@pytest.mark.clause("BK-NCUDA-14")
@pytest.mark.parametrize(("scheme", "made"), [("Q4_0", QuantScheme.Q4_0(32)), ("Q8_0", QuantScheme.Q8_0(32))])
@pytest.mark.parametrize("num_rows", [1, 5, 9])
def test_packed_weights_are_read_as_gguf_reads_them(
    kernels: Any, tensor: Any, scheme: str, made: Any, num_rows: int
) -> None:
    packed, weights = packed_rows(scheme, 6, 3)
    x = np.random.default_rng(3).standard_normal((num_rows, 96)).astype(np.float32)
    y = kernels.linear_ops().quantized_linear(tensor(x), tensor(packed, np.uint8), made).to_numpy()
    exact, magnitude = x.astype(np.float64) @ weights.T, np.abs(x).astype(np.float64) @ np.abs(weights.T)
    assert (np.abs(y - exact) <= gamma(98) * magnitude).all()


@pytest.mark.clause("BK-NCUDA-14")
def test_packed_weights_of_other_shapes_are_refused(kernels: Any, tensor: Any) -> None:
    linear, x = kernels.linear_ops(), tensor(np.zeros((1, 64)))
    with pytest.raises(UnsupportedError, match="group_size=32"):
        linear.quantized_linear(x, tensor(np.zeros((2, 36)), np.uint8), QuantScheme.Q4_0(64))
    with pytest.raises(ShapeError, match=r"in/32\*18"):
        linear.quantized_linear(x, tensor(np.zeros((2, 35)), np.uint8), QuantScheme.Q4_0(32))
    assert (
        linear.quantized_linear(tensor(np.zeros((2, 0))), tensor(np.zeros((3, 0)), np.uint8), QuantScheme.Q8_0(32))
        .to_numpy()
        .tolist()
        == [[0.0] * 3] * 2
    )


@pytest.mark.clause("BK-NCUDA-14")
def test_matmul_broadcasts_batches_and_multiplies_as_it_stands(ops: Any, kernels: Any, tensor: Any) -> None:
    a, b = np.arange(12.0).reshape(2, 1, 2, 3), np.arange(18.0).reshape(3, 3, 2)
    assert ops.matmul(tensor(a), tensor(b)).to_numpy().tolist() == (a @ b).tolist()
    w = [[1.0, 2.0], [3.0, 4.0]]
    assert kernels.linear_ops().linear(tensor([1.0, 0.0]), tensor(w)).to_numpy().tolist() == [1.0, 3.0]
    assert ops.matmul(tensor([[1.0, 0.0]]), tensor(w)).to_numpy().tolist() == [[1.0, 2.0]]
