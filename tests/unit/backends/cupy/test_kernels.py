"""The kernels' own branches, on the host: short and long rows, streamed weights, subnormal numbers, NaN."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ferrum_ref.interfaces.kernel_ops import AttentionParams, QuantScheme
from ferrum_ref.types.devices import DataType

UNIT = 2.0**-24
TYPES = {DataType.FP32: np.dtype(np.float32), DataType.BF16: np.dtype(ml_dtypes.bfloat16)}
STORED_UNIT = {DataType.FP32: 2.0**-24, DataType.BF16: 2.0**-8}


def stored(backend: Any, values: Any, kind: DataType) -> tuple[Any, Any]:
    """A tensor of the values in that type, and what it holds as float64."""
    held = np.asarray(values).astype(TYPES[kind])
    return backend.tensor_factory().from_numpy(held), held.astype(np.float64)


def within(found: Any, exact: Any, kind: DataType, num_roundings: float) -> bool:
    error = np.abs(found.to_numpy().astype(np.float64) - exact)
    return bool(np.all(error <= np.abs(exact) * (STORED_UNIT[kind] + 2 * num_roundings * UNIT) + 2.0**-140))


@pytest.mark.clause("BK-CUPY-40", "BK-CUPY-8")
@pytest.mark.parametrize("kind", list(TYPES))
@pytest.mark.parametrize("length", [8, 520, 1024, 1032, 4096, 40960, 7])
def test_norms_of_rows_of_every_length(host: Any, kind: DataType, length: int) -> None:
    rng = np.random.default_rng(length)
    num_rows = 11 if length < 4096 else 2
    x, wide = stored(host, rng.standard_normal((num_rows, length)), kind)
    r, other = stored(host, rng.standard_normal((num_rows, length)), kind)
    gain, gains = stored(host, 1.0 + 0.1 * rng.standard_normal(length), kind)
    norm = host.kernel_ops().norm_ops()
    root = np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    assert within(norm.rms_norm(x, gain, 1e-5), wide / root * gains, kind, length + 8)
    total = wide + other
    normed, added = norm.rms_norm_residual(x, r, gain, 1e-5)
    root = np.sqrt((total**2).mean(-1, keepdims=True) + 1e-5)
    scale = np.abs(wide) + np.abs(other)  # the sum may cancel
    error = np.abs(normed.to_numpy().astype(np.float64) - total / root * gains)
    bound = STORED_UNIT[kind] * np.abs(total / root * gains) + 2 * (length + 8) * UNIT * scale / root * np.abs(gains)
    assert np.all(error <= bound)
    assert np.all(np.abs(added.to_numpy().astype(np.float64) - total) <= STORED_UNIT[kind] * scale)


@pytest.mark.clause("BK-CUPY-40")
@pytest.mark.parametrize("length", [64, 4096, 100])
def test_layer_norm_of_packed_and_other_rows(host: Any, length: int) -> None:
    rng = np.random.default_rng(length)
    x, gain, shift = (rng.standard_normal(size).astype(np.float32) for size in ((3, length), length, length))
    tensors = [host.tensor_factory().from_numpy(array) for array in (x, gain, shift)]
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * gain
    bound = 4 * (length + 8) * UNIT * (np.abs(y) + np.abs(gain) + np.abs(shift))
    for bias, exact in ((tensors[2], y + shift), (None, y)):
        found = host.tensor_ops().layer_norm(tensors[0], tensors[1], bias, 1e-5).to_numpy()
        assert np.all(np.abs(found - exact) <= bound)


def unpacked(packed: Any, block_bytes: int) -> Any:
    """ggml's blocks as float64, from their description alone."""
    blocks = packed.reshape(packed.shape[0], -1, block_bytes)
    scales = blocks[:, :, :2].copy().view(np.float16).astype(np.float64)
    if block_bytes == 18:
        codes = np.concatenate((blocks[:, :, 2:] & 15, blocks[:, :, 2:] >> 4), -1).astype(np.float64) - 8.0
    else:
        codes = blocks[:, :, 2:].view(np.int8).astype(np.float64)
    return (scales * codes).reshape(packed.shape[0], -1)


@pytest.mark.clause("BK-CUPY-42", "BK-CUPY-11")
@pytest.mark.parametrize("layout", ["q4_0", "q8_0"])
@pytest.mark.parametrize(
    ("rows", "columns", "outputs"), [(1, 64, 1), (2, 2112, 19), (8, 128, 17), (9, 128, 5), (3, 96, 6), (1, 4096, 3)]
)
def test_streamed_and_other_weights(
    host: Any, monkeypatch: pytest.MonkeyPatch, layout: str, rows: int, columns: int, outputs: int
) -> None:
    rng = np.random.default_rng(columns)
    block_bytes = {"q4_0": 18, "q8_0": 34}[layout]
    scheme = {"q4_0": QuantScheme.Q4_0, "q8_0": QuantScheme.Q8_0}[layout](group_size=32)
    packed = rng.integers(0, 256, (outputs, columns // 32 * block_bytes), np.uint8)
    scales = rng.standard_normal((outputs, columns // 32)).astype(np.float16)
    packed.reshape(outputs, -1, block_bytes)[:, :, :2] = scales.view(np.uint8).reshape(outputs, -1, 2)
    launched: list[str] = []
    machine = host.tensor_factory().from_numpy(packed).machine
    launch = machine.launch
    monkeypatch.setattr(machine, "launch", lambda *given: (launched.append(given[1]), launch(*given)))
    weights = unpacked(packed, block_bytes)
    for kind in TYPES:
        x, wide = stored(host, rng.standard_normal((rows, columns)), kind)
        y = host.kernel_ops().linear_ops().quantized_linear(x, host.tensor_factory().from_numpy(packed), scheme)
        exact = wide @ weights.T
        bound = STORED_UNIT[kind] * np.abs(exact) + 2 * (columns + 4) * UNIT * (np.abs(wide) @ np.abs(weights).T)
        assert np.all(np.abs(y.to_numpy().astype(np.float64) - exact) <= bound)
    is_streamed = rows <= 8 and columns % 64 == 0
    assert set(launched) == {f"stream_{layout}" if is_streamed else f"linear_{layout}"}


@pytest.mark.clause("BK-CUPY-41")
def test_subnormal_numbers_are_numbers(host: Any) -> None:
    least = np.float32(2.0**-149)
    values = np.array([least, -least, 3 * least, np.float32(2.0**-126), 0.0], np.float32)
    tensor = host.tensor_factory().from_numpy(values)
    ops = host.tensor_ops()
    assert ops.add(tensor, tensor).to_numpy().tolist() == (values + values).tolist()
    assert ops.sub(tensor, host.tensor_factory().from_numpy(values[::-1].copy())).to_numpy()[0] == least
    assert (
        ops.mul(tensor, host.tensor_factory().from_numpy(np.float32([2.0]))).to_numpy().tolist()
        == (2 * values).tolist()
    )
    assert ops.div(tensor, host.tensor_factory().from_numpy(np.float32([1.0]))).to_numpy().tolist() == values.tolist()
    assert ops.relu(tensor).to_numpy().tolist() == np.maximum(values, 0).tolist()
    assert tensor.to_dtype(DataType.BOOL).to_numpy().tolist() == [True, True, True, True, False]
    half = host.tensor_factory().from_numpy(np.array([2.0**-130], ml_dtypes.bfloat16))
    assert float(ops.add(half, half).to_numpy()[0]) == 2.0**-129
    zeros = host.tensor_factory().from_numpy(np.float32([0.0, -0.0]))
    assert zeros.to_dtype(DataType.BOOL).to_numpy().tolist() == [False, False]


@pytest.mark.clause("BK-CUPY-41", "BK-CUPY-16", "BK-CUPY-46")
def test_no_kernel_takes_subnormals_for_zero() -> None:
    compiling = pytest.importorskip("ferrum_cupy.compiling", exc_type=ImportError)
    from ferrum_cupy.machine import SOURCES, source_of

    from ferrum_ref.errors import BackendError

    for path in SOURCES.glob("*.cu"):
        defines = {"STORAGE": 2, "HEAD_DIM": 64}
        text = compiling.machine_code(source_of(path.stem), path.stem, defines, "91").decode()  # a GPU yet to come
        assert ".target sm_90" in text
        assert re.search(r"\b(add|sub|mul|fma|div|setp|cvt)\.[\w.]*ftz", text) is None  # expf's own steps apart
    assert compiling.machine_code(source_of("decode"), "decode", {"STORAGE": 2}, "90").startswith(b"\x7fELF")
    with pytest.raises(BackendError, match=r"NVRTC refuses broken\.cu for sm_90: .*error"):
        compiling.machine_code("nonsense", "broken", {}, "90")
    with pytest.raises(BackendError, match="no GPU as old as sm_10"):
        compiling.machine_code("", "old", {}, "10")


@pytest.mark.clause("BK-CUPY-43")
def test_the_number_of_splits() -> None:
    from ferrum_cupy.attention import num_splits

    assert num_splits(4096, 64 * 8) == 8
    assert num_splits(4096, 8) == 16
    assert num_splits(131072, 8) == 64
    assert num_splits(256, 1) == num_splits(0, 1) == 1
    assert num_splits(257, 1) == 2
    assert num_splits(131072, 100_000) == 1


@pytest.mark.clause("BK-CUPY-44", "BK-CUPY-9")
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("size", [64, 20])
@pytest.mark.parametrize("place", [0, 5, 299, slice(None)])
def test_a_nan_that_is_seen_stays_one(host: Any, num_queries: int, size: int, place: Any) -> None:
    rng = np.random.default_rng(size)
    params = AttentionParams(2, 1, size, size**-0.5, True)
    k, v = (rng.standard_normal((1, 300, 1, size)).astype(np.float32) for _ in range(2))
    q = rng.standard_normal((1, num_queries, 2, size)).astype(np.float32)
    k[0, place] = np.nan
    tensors = [host.tensor_factory().from_numpy(array) for array in (q, k, v)]
    found = np.isnan(host.kernel_ops().attention_ops().attention(*tensors, params).to_numpy()).all((0, 2, 3))
    first = 0 if isinstance(place, slice) else place
    seen = [first <= 300 - num_queries + query for query in range(num_queries)]
    assert found.tolist() == seen


@pytest.mark.clause("BK-CUPY-41")
def test_silu_keeps_its_digits_where_the_exponential_is_subnormal(host: Any) -> None:
    x = -np.linspace(79.0, 91.5, 801, dtype=np.float32)
    wide = x.astype(np.float64)
    found = host.tensor_ops().silu(host.tensor_factory().from_numpy(x)).to_numpy()
    exact = wide / (1.0 + np.exp(-wide))
    assert np.all(np.abs(found - exact) <= 5.0 * 2 * UNIT * np.abs(exact))


@pytest.mark.clause("BK-CUPY-53")
def test_equal_integers_are_sent_once() -> None:
    """Lately sent ones, in the same stream; a list that is changed afterwards is another one."""
    from ferrum_cupy.host import make_backend
    from ferrum_cupy.runtime import Runtime

    machine: Any = make_backend()._machine  # type: ignore[attr-defined]
    sent: list[Any] = []
    really, streams = machine.to_device, [0]
    machine.to_device = lambda array: sent.append(array.tolist()) or really(array)
    machine.stream_key = lambda: streams[0]
    runtime = Runtime(machine)
    given = np.arange(6)
    first = runtime.indices(given)
    assert runtime.indices(np.arange(6)) is first
    given[2] = 7
    assert runtime.indices(given).tolist() == [0, 1, 7, 3, 4, 5]
    assert first.tolist() == [0, 1, 2, 3, 4, 5]
    assert runtime.indices(np.arange(6).reshape(2, 3)).shape == (2, 3)
    assert len(sent) == 3
    streams[0] = 5
    assert runtime.indices(np.arange(6)) is not first
    streams[0] = 0
    assert runtime.indices(np.arange(6)) is first
    for number in range(20):
        runtime.indices(np.array([number]))
    assert len(sent) == 24
    assert runtime.indices(np.arange(6)) is not first  # memory is not kept for ever


@pytest.mark.clause("BK-CUPY-53")
def test_a_step_sends_positions_and_tables_once(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of a step: what is asked of each is the same."""
    sent: list[tuple[int, ...]] = []
    really = host._machine.to_device
    monkeypatch.setattr(host._machine, "to_device", lambda array: sent.append(array.shape) or really(array))
    factory, kernels = host.tensor_factory(), host.kernel_ops()
    q, cache = (
        factory.from_numpy(np.ones((3, 4, 64), np.float32)),
        factory.from_numpy(np.ones((9, 4, 2, 64), np.float32)),
    )
    rows, tables = (
        factory.from_numpy(np.ones((3, 2, 64), np.float32)),
        factory.from_numpy(np.ones((40, 32), np.float32)),
    )
    params = AttentionParams(4, 2, 64, 0.125, True)
    positions, blocks, lengths = [30, 31, 33], [[0, 1, -1], [2, 3, 4], [5, 99, 99]], [7, 12, 4]
    for _ in range(2):
        kernels.position_ops().rotary_embedding(q.reshape((1, 3, 4, 64)), tables, tables, positions)
        for each in (cache, cache):
            kernels.attention_ops().write_kv(each, rows, [6, 19, 23])
        kernels.attention_ops().paged_attention(q, cache, cache, blocks, params, context_lens=lengths)
    assert sorted(sent) == [(3,), (3,), (3,), (3, 3)]
