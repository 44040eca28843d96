"""Attention, paged attention and the cache write against a float64 loop over rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ferrum_torch import attention as module
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import BackendError, InvalidParameterError
from ferrum_ref.interfaces.kernel_ops import AttentionParams
from ferrum_ref.types.devices import DataType

RNG = np.random.default_rng(14)
U32 = 2.0**-24


def parameters(q: Any, k: Any, causal: bool = True, scale: float = 0.125, window: int = 0) -> AttentionParams:
    return AttentionParams(q.shape[-2], k.shape[-2], q.shape[-1], scale, causal, window)


def attention64(q: Any, k: Any, v: Any, params: AttentionParams) -> tuple[np.ndarray, np.ndarray]:
    """o and its error bound: q (T, H, D), k and v (S, G, D); one row and one head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    num_rows, num_heads, head_dim = q.shape
    out, bound = np.zeros((num_rows, num_heads, v.shape[2])), np.zeros((num_rows, num_heads, v.shape[2]))
    for t in range(num_rows):
        position = k.shape[0] - num_rows + t
        low, high = 0, k.shape[0]
        if params.causal:
            high = max(0, position + 1)
            low = max(0, high - params.sliding_window) if params.sliding_window else 0
        if high <= low:
            continue
        for h in range(num_heads):
            keys, values = k[low:high, h * k.shape[1] // num_heads], v[low:high, h * k.shape[1] // num_heads]
            scores = np.float32(params.softmax_scale) * (keys @ q[t, h])
            p = np.exp(scores - scores.max())
            p /= p.sum()
            out[t, h] = p @ values
            spread = np.abs(scores - scores.max())
            e = (head_dim + 2) * params.softmax_scale * (np.abs(keys) @ np.abs(q[t, h])) + 3 * np.abs(scores) + spread
            mass = p @ np.abs(values)
            bound[t, h] = U32 * (p @ (np.abs(values - out[t, h]) * (e + 8)[:, None]) + 2 * (len(p) + 8) * mass)
    return out, bound * 1.01 + 2.0**-140


def check(got: Any, want: np.ndarray, bound: np.ndarray) -> None:
    worst = np.max(np.abs(got.astype(np.float64) - want) / bound, initial=0.0)
    assert worst <= 1.0, f"error is {worst:.3g} of its bound"


def draw(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


CASES = [
    # rows, keys, heads, kv heads, head size
    (1, 1, 4, 4, 8),
    (1, 37, 8, 2, 64),
    (5, 5, 7, 7, 10),
    (4, 19, 8, 1, 80),
    (3, 64, 2, 2, 256),  # D-52: upstream stops at 128
    (6, 2, 4, 2, 16),  # more queries than keys: the first four see nothing when causal
    (2, 0, 4, 2, 16),
    (0, 5, 4, 2, 16),
]


@pytest.mark.clause("BK-TORCH-12")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [0.125, 1.7])  # D-52: upstream's kernel takes 1/sqrt(D) whatever it is told
def test_attention(kernels: Any, tensor: Any, case: tuple[int, ...], causal: bool, scale: float) -> None:
    rows, keys, heads, groups, size = case
    q, k, v = draw(2, rows, heads, size), draw(2, keys, groups, size), draw(2, keys, groups, size)
    params = parameters(q, k, causal, scale)
    got = kernels.attention_ops().attention(tensor(q), tensor(k), tensor(v), params)
    assert got.shape() == q.shape
    for b in range(2):
        check(got.to_numpy()[b], *attention64(q[b], k[b], v[b], params))
    none = kernels.attention_ops().attention(tensor(q[:0]), tensor(k[:0]), tensor(v[:0]), params)
    assert none.shape() == (0, *q.shape[1:])
    if causal and rows > keys:
        assert not got.to_numpy()[:, : rows - keys].any()


@pytest.mark.clause("BK-TORCH-12")
@pytest.mark.parametrize("window", [1, 3, 16, 100])
@pytest.mark.parametrize("rows", [1, 7, 20])
def test_sliding_window(kernels: Any, tensor: Any, window: int, rows: int) -> None:
    q, k, v = draw(1, rows, 4, 16), draw(1, 20, 2, 16), draw(1, 20, 2, 16)
    params = parameters(q, k, window=window)
    got = kernels.attention_ops().attention(tensor(q), tensor(k), tensor(v), params).to_numpy()
    check(got[0], *attention64(q[0], k[0], v[0], params))
    if window == 1:
        assert np.array_equal(got[0, :, 0], v[0, 20 - rows :, 0])


@pytest.mark.clause("BK-TORCH-12")
@pytest.mark.parametrize("window", [0, 5])
def test_rows_taken_a_few_at_a_time_change_nothing(
    kernels: Any, tensor: Any, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    q, k, v = draw(1, 33, 4, 16), draw(1, 40, 2, 16), draw(1, 40, 2, 16)
    params = parameters(q, k, window=window)
    monkeypatch.setattr(module, "SCORES_AT_A_TIME", 4 * 40 * 6)
    monkeypatch.setattr(module, "MOST_SCORES_AT_A_TIME", 4 * 40 * 6)
    assert module.rows_at_a_time(4 * 40, on_cpu=True) == 6
    got = kernels.attention_ops().attention(tensor(q), tensor(k), tensor(v), params).to_numpy()
    check(got[0], *attention64(q[0], k[0], v[0], params))


@pytest.mark.clause("BK-TORCH-12")
def test_a_needle_far_back_is_found(kernels: Any, tensor: Any) -> None:
    keys, values = np.zeros((1, 5000, 1, 8), np.float32), draw(1, 5000, 1, 8)
    for needle in (0, 2047, 2048, 4999):
        keys[:] = 0
        keys[0, needle] = 40
        q = np.full((1, 1, 3, 8), 2, np.float32)
        got = kernels.attention_ops().attention(tensor(q), tensor(keys), tensor(values), parameters(q, keys))
        want, bound = attention64(q[0], keys[0], values[0], parameters(q, keys))
        assert np.abs(want[0] - values[0, needle, 0]).max() < 1e-20  # exp(-80) on every other key
        check(got.to_numpy()[0], want, bound)


@pytest.mark.clause("BK-TORCH-8", "BK-TORCH-12")
@pytest.mark.parametrize("name", ["FP16", "BF16"])
def test_narrow_attention_is_float32_rounded_once(kernels: Any, tensor: Any, name: str) -> None:
    dtype = DataType[name]
    q, k, v = (tensor(draw(1, 9, heads, 16)).to_dtype(dtype) for heads in (4, 2, 2))
    params = AttentionParams(4, 2, 16, 0.25, True)
    wide = [x.to_dtype(DataType.FP32) for x in (q, k, v)]
    got = kernels.attention_ops().attention(q, k, v, params)
    assert got.dtype() == dtype
    want = kernels.attention_ops().attention(*wide, params).to_dtype(dtype)
    assert np.array_equal(got.to_numpy(), want.to_numpy())


@pytest.mark.clause("BK-TORCH-12", "BK-TORCH-4")
def test_views_with_gaps_serve_as_operands(kernels: Any, tensor: Any) -> None:
    qkv, cache = draw(3, 8, 16), draw(40, 4, 16)
    q, k, v = qkv[:, :4], cache[2:30, :2], cache[2:30, 2:]
    params = parameters(q, k)
    packed, stored = tensor(qkv), tensor(cache)
    got = kernels.attention_ops().attention(
        packed.view((0, 0, 0), (3, 4, 16)).reshape((1, 3, 4, 16)),
        stored.view((2, 0, 0), (30, 2, 16)).reshape((1, 28, 2, 16)),
        stored.view((2, 2, 0), (30, 4, 16)).reshape((1, 28, 2, 16)),
        params,
    )
    check(got.to_numpy()[0], *attention64(q, k, v, params))


@pytest.mark.clause("BK-TORCH-21")
def test_bad_operands(kernels: Any, tensor: Any) -> None:
    q, k = tensor(draw(1, 2, 4, 8)), tensor(draw(1, 3, 2, 8))
    good = AttentionParams(4, 2, 8, 1.0, True)
    attend = kernels.attention_ops().attention
    for call in (
        lambda: attend(q, k, tensor(draw(1, 4, 2, 8)), good),
        lambda: attend(q, k, tensor(draw(2, 3, 2, 8)), good),
        lambda: attend(tensor(draw(2, 4, 8)), k, k, good),
        lambda: attend(tensor(draw(2, 2, 4, 8)), k, k, good),
        lambda: attend(q, k, k, AttentionParams(4, 4, 8, 1.0, True)),
        lambda: attend(q, k, k, AttentionParams(8, 2, 8, 1.0, True)),
        lambda: attend(q, k, k, AttentionParams(4, 2, 16, 1.0, True)),
        lambda: attend(tensor(draw(1, 2, 4, 8)).to_dtype(DataType.INT32), k, k, good),
    ):
        with pytest.raises(BackendError, match=r"attention: .*expected"):
            call()


def blocks_of(sequences: list[np.ndarray], block_size: int, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """A cache whose unused slots are NaN, and the table of shuffled blocks that holds the sequences."""
    cache = np.full((num_blocks, block_size, *sequences[0].shape[1:]), np.nan, np.float32)
    free = list(np.random.default_rng(3).permutation(num_blocks))
    width = max(-(-len(s) // block_size) for s in sequences) + 1
    table = np.full((len(sequences), width), 10**9, np.int64)  # entries beyond the last needed one are nonsense
    for b, rows in enumerate(sequences):
        for i in range(-(-len(rows) // block_size)):
            part = rows[i * block_size : (i + 1) * block_size]
            table[b, i] = free.pop()
            cache[table[b, i], : len(part)] = part
    return cache, table


@pytest.mark.clause("BK-TORCH-13")
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_paged_equals_contiguous_to_the_bit(kernels: Any, tensor: Any, block_size: int, new: int, causal: bool) -> None:
    lens = [7, 33, 3, 16, 64]
    keys = [draw(n, 2, 16) for n in lens]
    values = [draw(n, 2, 16) for n in lens]
    k_cache, table = blocks_of(keys, block_size, 160)
    v_cache, _ = blocks_of(values, block_size, 160)
    q = draw(len(lens), new, 6, 16)
    params = parameters(q, k_cache, causal)
    attend = kernels.attention_ops()
    got = attend.paged_attention(tensor(q), tensor(k_cache), tensor(v_cache), table, params, context_lens=lens)
    for b, (k, v) in enumerate(zip(keys, values, strict=True)):
        alone = attend.attention(tensor(q[b : b + 1]), tensor(k[None]), tensor(v[None]), params).to_numpy()
        assert np.array_equal(got.to_numpy()[b], alone[0])
        check(got.to_numpy()[b], *attention64(q[b], k, v, params))
    if new == 1:
        flat = attend.paged_attention(
            tensor(q[:, 0]), tensor(k_cache), tensor(v_cache), table, params, context_lens=np.array(lens, np.int32)
        )
        assert flat.shape() == (len(lens), 6, 16)
        assert np.array_equal(flat.to_numpy(), got.to_numpy()[:, 0])


@pytest.mark.clause("BK-TORCH-13")
def test_the_five_argument_form_covers_every_slot_of_its_blocks(kernels: Any, tensor: Any) -> None:
    cache = draw(5, 4, 1, 8)
    q = draw(1, 2, 8)
    params = parameters(q, cache)
    for table in ([3, 0, 4], [1, 2, 3], np.array([[4, 1, 0]])):
        got = kernels.attention_ops().paged_attention(tensor(q), tensor(cache), tensor(cache), table, params)
        rows = cache[np.ravel(table)].reshape(12, 1, 8)
        check(got.to_numpy(), *attention64(q, rows, rows, params))


@pytest.mark.clause("BK-TORCH-13")
def test_rows_without_context_are_zero(kernels: Any, tensor: Any) -> None:
    cache, q = np.full((2, 4, 1, 8), np.nan), draw(2, 3, 2, 8)
    cache[1, :2] = 1
    params = AttentionParams(2, 1, 8, 1.0, True)
    attend = kernels.attention_ops().paged_attention
    got = attend(tensor(q), tensor(cache), tensor(cache), [[7], [1]], params, context_lens=[0, 2]).to_numpy()
    assert not got[0].any()
    assert not got[1, 0].any()
    assert np.array_equal(got[1, 1:], np.ones((2, 2, 8), np.float32))
    assert attend(tensor(q), tensor(cache), tensor(cache), np.zeros((2, 0), int), params).to_numpy().any() == 0


@pytest.mark.clause("BK-TORCH-13", "BK-TORCH-21")
def test_paged_refuses_bad_tables_and_lengths(kernels: Any, tensor: Any) -> None:
    q, cache = tensor(draw(2, 2, 8)), tensor(draw(3, 4, 1, 8))
    params = AttentionParams(2, 1, 8, 1.0, True)

    def call(table: Any, lens: Any = None, keys: Any = cache) -> None:
        kernels.attention_ops().paged_attention(q, keys, cache, table, params, context_lens=lens)

    for table, lens, complaint in (
        ([[0, 3], [0, 0]], None, "names block 3"),
        ([[0, -1], [0, 0]], [8, 8], "names block -1"),
        ([[0, 1], [0, 0]], [9, 1], "the covered slots"),
        ([[0, 1], [0, 0]], [-1, 1], "the covered slots"),
        ([[0, 1], [0, 0]], [1], "one row and one length"),
        ([0, 1], [1], "one row and one length"),
    ):
        with pytest.raises(BackendError, match=complaint):
            call(table, lens)
    with pytest.raises(InvalidParameterError, match="expected integers"):
        call([[0.0], [1.0]])
    with pytest.raises(BackendError, match="two equal caches"):
        call([[0], [1]], None, tensor(draw(2, 4, 1, 8)))


@pytest.mark.clause("BK-TORCH-14")
@pytest.mark.parametrize("slots", [[0], [5], [2, 3, 4], [7, 1, 3], [4, 4, 4], [-1, 6, -1], [-1, 0, 1], [3, 2, 1]])
def test_write_kv(kernels: Any, tensor: Any, slots: list[int]) -> None:
    for shape in ((8, 2, 3), (2, 4, 2, 3)):
        for dtype in (np.float32, np.float16):
            cache, rows = tensor(np.zeros(shape), dtype), tensor(draw(len(slots), 2, 3), dtype)
            want = np.zeros((8, 2, 3), dtype)
            for slot, row in zip(slots, rows.to_numpy(), strict=True):
                if slot >= 0:
                    want[slot] = row
            kernels.attention_ops().write_kv(cache, rows, np.array(slots))
            assert np.array_equal(cache.to_numpy().reshape(8, 2, 3), want)


@pytest.mark.clause("BK-TORCH-14")
@given(slots=st.lists(st.integers(-2, 9), max_size=14))
def test_the_last_of_equal_slots_stays(slots: list[int]) -> None:
    cache = torch.full((10, 1, 1), -1.0)
    module.write_kv(cache, torch.arange(len(slots), dtype=torch.float32).view(-1, 1, 1), slots)
    want = {slot: t for t, slot in enumerate(slots)}
    assert cache.flatten().tolist() == [want.get(slot, -1.0) for slot in range(10)]


@pytest.mark.clause("BK-TORCH-14", "BK-TORCH-21")
def test_a_refused_write_changes_nothing(kernels: Any, tensor: Any, ops: Any) -> None:
    cache, rows = tensor(np.zeros((4, 1, 2))), tensor(np.ones((2, 1, 2)))
    write = kernels.attention_ops().write_kv
    for target, data, slots in (
        (cache, rows, [0, 4]),
        (cache, rows, [0]),
        (cache, tensor(np.ones((2, 1, 2)), np.float16), [0, 1]),
        (cache, tensor(np.ones((2, 2, 2))), [0, 1]),
        (cache, tensor(np.ones((2, 2))), [0, 1]),
        (ops.transpose(tensor(np.zeros((4, 3, 1, 2))), 0, 1), rows, [0, 1]),
    ):
        with pytest.raises(BackendError, match=r"write_kv: .*(expected|contiguous)"):
            write(target, data, slots)
    with pytest.raises(InvalidParameterError, match="slots"):
        write(cache, rows, [0.0, 1.0])
    assert not cache.to_numpy().any()
    write(cache, tensor(np.ones((0, 1, 2))), [])
    assert not cache.to_numpy().any()
