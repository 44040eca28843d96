"""Attention by torch's fused kernels: what they mean, where they are used, and that the judge believes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ferrum_torch import attention as module
from ferrum_torch import fused_attention, make_backend, make_sdpa_backend

from ferrum_ref.interfaces.kernel_ops import AttentionParams
from ferrum_ref.parity.runner import FAILED, PASSED, Selection, run
from ferrum_ref.parity.subject import BackendSubject
from ferrum_ref.types.algorithm import Algorithm

RNG = np.random.default_rng(36)
HEADS, GROUPS, SIZE = 6, 2, 16


def params(causal: bool = True, window: int = 0, cap: float = 0.0, scale: float = 0.3) -> AttentionParams:
    return AttentionParams(HEADS, GROUPS, SIZE, scale, causal, window, cap)


def operands(rows: int, keys: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> Any:
    shapes = ((batch, rows, HEADS, SIZE), (batch, keys, GROUPS, SIZE), (batch, keys, GROUPS, SIZE))
    return [torch.from_numpy(RNG.normal(size=shape).astype(np.float32)).to(dtype) for shape in shapes]


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, wanted: AttentionParams) -> torch.Tensor:
    """The formula in float64, key by key visible or not."""
    rows, keys = q.shape[1], k.shape[1]
    k, v = (data.double().repeat_interleave(HEADS // GROUPS, 2) for data in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k) * wanted.softmax_scale
    own = torch.arange(keys - rows, keys)[:, None]
    column = torch.arange(keys)
    if wanted.causal:
        visible = column <= own
        if wanted.sliding_window:
            visible &= column > own - wanted.sliding_window
        scores = scores.masked_fill(~visible, -torch.inf)
    return torch.einsum("bhts,bshd->bthd", torch.softmax(scores, -1), v)


@pytest.mark.clause("BK-TORCH-36")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 9), (5, 5), (3, 9), (33, 33)])
@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, 2), (True, 40), (False, 0)])
def test_it_means_what_attention_means(rows: int, keys: int, causal: bool, window: int, dtype: torch.dtype) -> None:
    q, k, v = operands(rows, keys, dtype)
    wanted = params(causal, window)
    assert fused_attention.is_covered(q, k, v, wanted, None)
    got = module.attention(q, k, v, wanted, sdpa=True)
    assert got.shape == q.shape
    assert got.dtype is dtype
    # a mask that is one key off moves some output by much more than 16-bit probabilities do
    error = (got.double() - exact(q, k, v, wanted)).abs().max()
    assert error <= {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-6}[dtype] * v.abs().max()


@pytest.mark.clause("BK-TORCH-36")
def test_the_head_axis_need_not_be_a_run() -> None:
    q, k, v = (data.transpose(1, 3).contiguous().transpose(1, 3) for data in operands(5, 5))
    assert q.stride(3) != 1
    error = (module.attention(q, k, v, params(), sdpa=True).double() - exact(q, k, v, params())).abs().max()
    assert error <= 2.0**-20 * v.abs().max()


@pytest.mark.clause("BK-TORCH-36")
def test_what_is_left_to_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = operands(5, 9)
    sinks, half = torch.zeros(HEADS), torch.float16
    uncovered = {
        "sinks": (q, k, v, params(), sinks),
        "cap": (q, k, v, params(cap=30.0), None),
        "mixed types": (q, k.to(half), v.to(half), params(), None),
        "fp8": (*(data.to(torch.float8_e4m3fn) for data in (q, k, v)), params(), None),
        "wider values": (q, k, torch.cat((v, v), 3), params(), None),
        "rows that see nothing": (k.repeat(1, 1, 3, 1), q[:, :, :GROUPS], q[:, :, :GROUPS], params(), None),
        "no keys": (q, k[:, :0], v[:, :0], params(causal=False), None),
        "no rows": (q[:, :0], k, v, params(), None),
    }
    for name, case in uncovered.items():
        assert not fused_attention.is_covered(*case), name
        plain = module.attention(*case)
        assert torch.equal(module.attention(*case, sdpa=True), plain), name
    monkeypatch.setattr(fused_attention, "MOST_MASK_ELEMENTS", 44)
    assert not fused_attention.is_covered(q, k, v, params(), None)
    assert fused_attention.is_covered(q, k, v, params(causal=False), None)
    assert fused_attention.is_covered(q[:, :1], k, v, params(window=3), None)


@pytest.mark.clause("BK-TORCH-36")
def test_the_default_backend_uses_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise AssertionError("fused attention was called")

    monkeypatch.setattr(module, "fused_attention", refused)
    for backend, calls in ((make_backend(), False), (make_sdpa_backend(), True)):
        factory = backend.tensor_factory()
        q, k, v = (factory.from_numpy(data.numpy()) for data in operands(2, 4, batch=1))
        ops = backend.kernel_ops().attention_ops()  # type: ignore[union-attr]
        cache = [factory.from_numpy(data.to_numpy().reshape(2, 2, GROUPS, SIZE)) for data in (k, v)]
        for call in (
            lambda ops=ops, q=q, k=k, v=v: ops.attention(q, k, v, params()),
            lambda ops=ops, q=q, cache=cache: ops.paged_attention(q, *cache, [0, 1], params()),
        ):
            if calls:
                with pytest.raises(AssertionError, match="was called"):
                    call()
            else:
                call()


@pytest.mark.clause("BK-TORCH-36")
def test_paged_attention_is_attention_over_the_gathered_rows() -> None:
    backend = make_sdpa_backend()
    factory, ops = backend.tensor_factory(), backend.kernel_ops().attention_ops()  # type: ignore[union-attr]
    q, k, v = (data.numpy() for data in operands(2, 7, batch=1))
    caches = [np.full((4, 4, GROUPS, SIZE), np.nan, np.float32) for _ in range(2)]
    for cache, rows in zip(caches, (k, v), strict=True):
        cache[2], cache[0, :3] = rows[0, :4], rows[0, 4:]
    got = ops.paged_attention(
        factory.from_numpy(q), *map(factory.from_numpy, caches), [2, 0], params(), context_lens=[7]
    )
    want = ops.attention(*map(factory.from_numpy, (q, k, v)), params())
    assert np.array_equal(got.to_numpy(), want.to_numpy())


@pytest.mark.clause("BK-TORCH-37")
def test_what_is_declared() -> None:
    kernels = make_sdpa_backend().kernel_ops()
    assert kernels is not None
    for name in ("attention", "paged_attention"):
        assert kernels.declared_algorithm(name) == Algorithm(rounds_probabilities=True, key_block=512, exp_ulp=20.0)
    assert kernels.declared_algorithm("linear") == kernels.declared_algorithm("softmax") == Algorithm()
    on_gpu = fused_attention.declared(Algorithm(truncates=True), on_gpu=True)
    assert on_gpu == Algorithm(truncates=True, rounds_probabilities=True, key_block=32, exponent_roundings=3)


@pytest.mark.clause("BK-TORCH-37")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_judge_believes_it(dtype: str) -> None:
    backend = make_sdpa_backend()
    assert backend.capabilities().supports_flash_attention
    assert backend.version().endswith(", sdpa")
    subject = BackendSubject(backend, "ferrum_torch:make_sdpa_backend")
    wanted = Selection(operations=("attention", "paged_attention"), dtypes=(dtype,), only_small=True)
    results = run(subject, wanted)
    assert {result.status for result in results} == {PASSED}


@pytest.mark.clause("BK-TORCH-37")
def test_without_the_declaration_the_judge_sees_the_roundings() -> None:
    class Undeclared(BackendSubject):
        def declared(self, operation: Any) -> Algorithm:
            return Algorithm()

    subject = Undeclared(make_sdpa_backend(), "ferrum_torch:make_sdpa_backend")
    results = run(subject, Selection(operations=("attention",), dtypes=("bf16",), only_small=True))
    assert FAILED in {result.status for result in results}
