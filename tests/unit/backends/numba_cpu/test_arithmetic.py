"""Norms, activations, softmax and rotary embedding against float64 formulas, and in every type and layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from scipy.special import erfc

from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.types.devices import DataType

RNG = np.random.default_rng(11)
NARROW = [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


def norm64(x: Any, weight: Any, eps: float) -> np.ndarray:
    wide = np.asarray(x, np.float64)
    return wide / np.sqrt((wide**2).mean(-1, keepdims=True) + np.float32(eps)) * np.asarray(weight, np.float64)


@pytest.mark.clause("BK-NCPU-8")
@pytest.mark.parametrize("shape", [(1, 576), (3, 5, 7), (4, 1), (2, 4096), (0, 8)])
def test_rms_norm(kernels: Any, tensor: Any, close: Any, shape: tuple[int, ...]) -> None:
    for scale in (1.0, 1e-3, 1e4):
        x, w = (RNG.normal(size=shape) * scale).astype(np.float32), RNG.normal(size=shape[-1]).astype(np.float32)
        roundings = (shape[-1] + 4) / 2 + 6  # the mean under a root counts half; then add, root, division, products
        close(kernels.norm_ops().rms_norm(tensor(x), tensor(w), 1e-5), norm64(x, w, 1e-5), roundings)


@pytest.mark.clause("BK-NCPU-8")
def test_the_norm_reads_the_sum_before_it_is_rounded(kernels: Any, tensor: Any, close: Any) -> None:
    low = ml_dtypes.bfloat16
    a, b = tensor([[1.0, 1.0]], low), tensor([[2.0**-9, -(2.0**-7)]], low)  # 1 + 2**-9 rounds to 1
    normed, total = kernels.norm_ops().rms_norm_residual(a, b, tensor([1.0, 1.0], low), 0.0)
    assert total.to_vec_f32().tolist() == [1.0, float(low(1 - 2**-7))]
    want = norm64(np.array([[1 + 2**-9, 1 - 2**-7]]), np.ones(2), 0.0).astype(low)
    assert np.array_equal(normed.to_numpy(), want)
    x, r = (RNG.normal(size=(6, 96)).astype(np.float32) for _ in range(2))
    normed, total = kernels.norm_ops().rms_norm_residual(tensor(x), tensor(r), tensor(np.ones(96)), 1e-5)
    assert np.array_equal(total.to_numpy(), x + r)
    close(normed, norm64(x + r, np.ones(96), 1e-5), 60)


@pytest.mark.clause("BK-NCPU-8")
def test_layer_norm_is_two_pass(ops: Any, tensor: Any, close: Any) -> None:
    x = (RNG.normal(size=(3, 64)) + 1000).astype(np.float32)  # E[x**2] - mean**2 would lose every digit
    w, b = RNG.normal(size=(2, 64)).astype(np.float32)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    r = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(1e-5))
    magnitude = np.abs(w) * r * np.abs(wide).mean(-1, keepdims=True) * 3 + np.abs(centred * r * w) + np.abs(b)
    close(ops.layer_norm(tensor(x), tensor(w), tensor(b), 1e-5), centred * r * w + b, 80, magnitude)
    close(ops.layer_norm(tensor(x), tensor(w), None, 1e-5), centred * r * w, 80, magnitude)


@pytest.mark.clause("BK-NCPU-9")
def test_exponential_within_its_claim(ops: Any, tensor: Any) -> None:
    """Softmax of [0, x] shows exp(x): p1 / p0, where p0 is 1 within rounding for x below -20."""
    from ferrum_numba.cpu.compiled import ordered
    from ferrum_numba.cpu.floats import exp32

    @ordered
    def fill(x: Any, out: Any) -> None:
        for i in range(len(x)):
            out[i] = exp32(x[i])

    x = np.concatenate([np.linspace(-110, 95, 400_001), np.linspace(-1, 1, 100_001)]).astype(np.float32)
    out = np.empty_like(x)
    fill(x, out)
    with np.errstate(over="ignore", under="ignore"):
        want = np.exp(x.astype(np.float64))
        spacing = np.spacing(want.astype(np.float32)).astype(np.float64)
    finite = want < np.finfo(np.float32).max
    assert np.all(np.abs(out[finite] - want[finite]) <= 1.5 * spacing[finite])
    assert np.isinf(out[~finite]).all()
    special = np.array([np.nan, np.inf, -np.inf, 0.0], np.float32)
    fill(special, special)
    assert np.isnan(special[0])
    assert special[1:].tolist() == [np.inf, 0.0, 1.0]


@pytest.mark.clause("BK-NCPU-9")
def test_silu_and_gelu_where_they_are_delicate(kernels: Any, ops: Any, tensor: Any, close: Any) -> None:
    x = np.array([-90.0, -100.0, -20.0, -1e-3, 0.0, 1e-3, 3.0, 50.0])
    stored = x.astype(np.float32).astype(np.float64)
    close(ops.silu(tensor(x)), stored * np.exp(-np.logaddexp(0.0, -stored)), 12)
    close(ops.gelu(tensor(x)), stored / 2 * erfc(-stored * math.sqrt(0.5)), 1.5)
    inner = np.sqrt(2 / np.pi) * (stored + 0.044715 * stored**3)
    close(ops.gelu(tensor(x), approximate="tanh"), stored * np.exp(-np.logaddexp(0.0, -2 * inner)), 1.5)
    for call in (ops.silu, ops.gelu, kernels.activation_ops().gelu):
        found = call(tensor([-np.inf, np.inf, np.nan])).to_numpy()
        assert found[0] == 0.0
        assert np.signbit(found[0])
        assert found[1] == np.inf
        assert np.isnan(found[2])
    with pytest.raises(InvalidParameterError, match="approximate"):
        ops.gelu(tensor(x), approximate="sigmoid")


@pytest.mark.clause("BK-NCPU-8")
def test_softmax(ops: Any, tensor: Any, close: Any) -> None:
    x = (RNG.normal(size=(3, 5, 129)) * 8).astype(np.float32)
    wide = x.astype(np.float64)
    for dim in (-1, 1, 0):
        spread = np.abs(wide - wide.max(dim, keepdims=True))
        e = np.exp(-spread)
        p = e / e.sum(dim, keepdims=True)
        close(ops.softmax(tensor(x), dim), p, 1, p * (x.shape[dim] + 12 + 2 * spread.max(dim, keepdims=True)))
    inf = np.inf
    rows = ops.softmax(tensor([[0, -inf, 0], [-inf, -inf, -inf], [inf, 0, 0], [np.nan, 0, 0]]), -1).to_numpy()
    assert rows[0].tolist() == [0.5, 0.0, 0.5]
    assert np.isnan(rows[1:]).all()
    assert ops.softmax(tensor(np.zeros((2, 0))), 1).shape() == (2, 0)
    with pytest.raises(ShapeError):
        ops.softmax(tensor([1.0]), 1)


@pytest.mark.clause("BK-NCPU-8")
def test_rotary_embedding(kernels: Any, tensor: Any, close: Any) -> None:
    rotate = kernels.position_ops().rotary_embedding
    cos, sin = tensor([[1.0, 1.0], [0.0, 1.0]]), tensor([[0.0, 0.0], [1.0, 0.0]])
    assert rotate(tensor([[[[1, 2, 3, 4]]]]), cos, sin, [1]).to_numpy().tolist() == [[[[-3, 2, 1, 4]]]]
    x, angles = RNG.normal(size=(2, 3, 4, 80)).astype(np.float32), RNG.normal(size=(9, 40))
    c, s = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    a, b = x[..., :40].astype(np.float64), x[..., 40:].astype(np.float64)
    places = [7, 0, 7]
    pc, ps = c[places][:, None].astype(np.float64), s[places][:, None].astype(np.float64)
    want = np.concatenate([a * pc - b * ps, b * pc + a * ps], -1)
    magnitude = np.concatenate([np.abs(a * pc) + np.abs(b * ps), np.abs(b * pc) + np.abs(a * ps)], -1)
    close(rotate(tensor(x), tensor(c), tensor(s), places), want, 2, magnitude)
    packed = tensor(np.concatenate([x, np.full_like(x, np.nan)], 2)).view((0, 0, 0, 0), (2, 3, 4, 80))
    close(rotate(packed, tensor(c), tensor(s), places), want, 2, magnitude)
    with pytest.raises(InvalidParameterError, match="got 9, expected 0 <= position < 9"):
        rotate(tensor(x), tensor(c), tensor(s), [0, 9, 1])
    with pytest.raises(ShapeError, match="expected one for each"):
        rotate(tensor(x), tensor(c), tensor(s), [0])


def operations(ops: Any, kernels: Any) -> dict[str, Callable[..., Any]]:
    """Each takes x (4, 32), y (4, 32) and w (32,) of one type."""
    norm, activation, turn = kernels.norm_ops(), kernels.activation_ops(), kernels.position_ops().rotary_embedding

    def rotated(x: Any, y: Any, w: Any) -> Any:
        table = y.view((0, 0), (4, 16))
        return turn(x.reshape((1, 4, 1, 32)), table, table, [3, 0, 1, 2])

    return {
        "rms_norm": lambda x, y, w: norm.rms_norm(x, w, 1e-5),
        "layer_norm": lambda x, y, w: ops.layer_norm(x, w, w, 1e-5),
        "softmax": lambda x, y, w: ops.softmax(x, 0),
        "silu": lambda x, y, w: ops.silu(x),
        "silu_mul": lambda x, y, w: activation.silu_mul(x, y),
        "gelu": lambda x, y, w: ops.gelu(x),
        "relu": lambda x, y, w: ops.relu(x),
        "rotary": rotated,
        "add": lambda x, y, w: ops.add(x, y),
        "sub": lambda x, y, w: ops.sub(x, y),
        "mul": lambda x, y, w: ops.mul(x, y),
        "div": lambda x, y, w: ops.div(x, y),
    }


@pytest.mark.clause("BK-NCPU-8")
@pytest.mark.parametrize("narrow", NARROW)
def test_narrow_types_are_widened_computed_and_rounded_once(ops: Any, kernels: Any, tensor: Any, narrow: Any) -> None:
    stored = [RNG.normal(size=shape).astype(narrow) for shape in ((4, 32), (4, 32), (32,))]
    small = [tensor(array, narrow) for array in stored]
    wide = [tensor(array.astype(np.float32)) for array in stored]
    for name, operation in operations(ops, kernels).items():
        got, want = operation(*small), operation(*wide).to_dtype(small[0].dtype())
        if name == "gelu":  # from float64 to 16 bits at once
            exact = stored[0].astype(np.float64) / 2 * erfc(-stored[0].astype(np.float64) * math.sqrt(0.5))
            assert np.array_equal(got.to_vec_f32().reshape(4, 32), exact.astype(narrow).astype(np.float32))
        else:
            assert np.array_equal(got.to_vec_f32(), want.to_vec_f32()), name


@pytest.mark.clause("BK-NCPU-8")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_strides_change_nothing(ops: Any, kernels: Any, tensor: Any, dtype: Any) -> None:
    stored = [RNG.normal(size=shape).astype(dtype) for shape in ((4, 32), (4, 32), (32,))]
    plain = [tensor(array, dtype) for array in stored]
    apart = []
    for array in stored:
        holder = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, dtype)
        holder[..., ::2] = array
        apart.append(type(plain[0])(holder[..., ::2]))
    for name, operation in operations(ops, kernels).items():
        assert np.array_equal(operation(*plain).to_vec_f32(), operation(*apart).to_vec_f32()), name
    both = tensor(np.concatenate(stored[:2], 1), dtype)  # the halves of a fused projection
    gate, up = both.view((0, 0), (4, 32)), both.view((0, 32), (4, 64))
    want = kernels.activation_ops().silu_mul(*plain[:2])
    assert np.array_equal(kernels.activation_ops().silu_mul(gate, up).to_numpy(), want.to_numpy())


@pytest.mark.clause("BK-NCPU-4")
def test_no_result_depends_on_the_number_of_threads(ops: Any, kernels: Any, tensor: Any, threads: Any) -> None:
    x, y, w = (tensor(RNG.normal(size=shape)) for shape in ((600, 128), (600, 128), (128,)))
    found = []
    for count in (1, 2):
        threads(count)
        normed, total = kernels.norm_ops().rms_norm_residual(x, y, w, 1e-5)
        results = (normed, total, ops.softmax(x, 1), ops.gelu(x), kernels.activation_ops().silu_mul(x, y))
        found.append([result.to_numpy() for result in (*results, ops.layer_norm(x, w, w, 1e-5))])
    assert all(np.array_equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.clause("BK-NCPU-4")
def test_calls_from_several_python_threads_take_turns(ops: Any, tensor: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    inputs = [tensor(RNG.normal(size=(50, 300))) for _ in range(8)]
    alone = [ops.softmax(x, 1).to_numpy() for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            together = list(pool.map(lambda x: ops.softmax(x, 1).to_numpy(), inputs))
            assert all(np.array_equal(one, two) for one, two in zip(alone, together, strict=True))


@pytest.mark.clause("BK-NCPU-8")
def test_arithmetic_broadcasts_and_names_what_does_not_fit(ops: Any, kernels: Any, tensor: Any) -> None:
    assert ops.add(tensor([[1, 2], [3, 4]]), tensor([10, 20])).to_numpy().tolist() == [[11, 22], [13, 24]]
    assert ops.div(tensor([1], np.int32), tensor([3], np.int32)).dtype() is DataType.FP32
    assert ops.add(tensor([1.5], np.float16), tensor([1.5], ml_dtypes.bfloat16)).dtype() is DataType.FP32
    assert ops.mul(tensor([2**31 - 1], np.int32), tensor([2], np.int32)).to_numpy().tolist() == [-2]
    assert np.isnan(ops.div(tensor([0.0]), tensor([0.0])).to_numpy()[0])
    with pytest.raises(ShapeError, match="do not broadcast"):
        ops.add(tensor([1, 2]), tensor([1, 2, 3]))
    with pytest.raises(BackendError, match="no common element type"):
        ops.add(tensor([True], bool), tensor([True], bool))
    with pytest.raises(BackendError, match="expected fp32, fp16, bf16 or fp8"):
        ops.silu(tensor([1], np.int32))
    with pytest.raises(ShapeError, match=r"weight \(2,\)"):
        kernels.norm_ops().rms_norm(tensor(np.ones((2, 3))), tensor(np.ones(2)), 1e-5)


@pytest.mark.clause("BK-NCPU-21", "TN-ASYNC-4")
def test_closed_operations_start_nothing(backend: Any, tensor: Any) -> None:
    import asyncio

    x = tensor(np.ones((2, 2)))
    with backend.async_tensor_ops() as ops:
        assert asyncio.run(ops.matmul_async(x, x)).to_numpy().tolist() == [[2.0, 2.0], [2.0, 2.0]]
    ops.close()
    for start, words in (
        (lambda: ops.softmax_async(x, 1), "softmax_async"),
        (lambda: ops.matmul_async(x, x), "matmul_async"),
        (lambda: ops.synchronize(), "synchronize"),
    ):
        with pytest.raises(BackendError, match=f"{words}: .*have been closed"):
            asyncio.run(start())
    assert ops.matmul(x, x).to_numpy().tolist() == [[2.0, 2.0], [2.0, 2.0]]


@pytest.mark.clause("BK-NCPU-21")
def test_lists_and_awaited_operations(backend: Any, tensor: Any) -> None:
    import asyncio

    batch, x = backend.tensor_batch_ops(), tensor(np.arange(6).reshape(2, 3))
    stacked = batch.stack([x, x], 1)
    assert stacked.shape() == (2, 2, 3)
    pieces = batch.unstack(stacked, 1)
    assert np.array_equal(pieces[1].to_numpy(), x.to_numpy())
    assert np.shares_memory(pieces[0].to_numpy(), stacked.to_numpy())
    assert batch.pad_batch([x], (2, 4))[0].to_numpy().tolist() == [[0, 1, 2, 0], [3, 4, 5, 0]]
    with pytest.raises(BackendError, match="pair 1"):
        batch.batch_matmul([x, x], [tensor(np.ones((3, 1))), x])
    with pytest.raises(InvalidParameterError, match="expected as many"):
        batch.batch_matmul([x], [])

    async def both() -> tuple[Any, Any]:
        ops = backend.async_tensor_ops()
        product, p = await asyncio.gather(ops.matmul_async(x, tensor(np.ones((3, 1)))), ops.softmax_async(x, 1))
        await ops.synchronize()
        return product, p

    product, p = asyncio.run(both())
    assert product.to_numpy().tolist() == [[3.0], [12.0]]
    assert np.array_equal(p.to_numpy(), backend.tensor_ops().softmax(x, 1).to_numpy())
