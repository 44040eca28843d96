"""Same bits twice, and alone as in a batch: told apart from merely within the bounds, and from wrong."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.parity.honest.linear import linear
from ferrum_ref.parity.honest.sums import dot_pairwise, dot_sequential
from ferrum_ref.parity.invariance import CLOSE, DIFFERENT, SAME, UNSUPPORTED, check_invariance
from ferrum_ref.parity.ops.bridge import async_ops
from ferrum_ref.parity.ops.catalogue import operation_named
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.runner import FAILED, PASSED, run_case
from ferrum_ref.parity.subject import BackendSubject, FunctionSubject
from ferrum_ref.parity.units import STORAGES

LINEAR, FP32 = operation_named("linear"), STORAGES["fp32"]


def checked(kernel: Any) -> Any:
    return check_invariance(FunctionSubject("mine", {"linear": kernel}), LINEAR, FP32, 0)


@pytest.mark.clause("PA-INVARIANT-1", "PA-INVARIANT-2")
def test_a_kernel_of_one_order_is_invariant() -> None:
    found = checked(linear(dot_sequential))
    assert (found.repeated, found.alone, found.passed) == (SAME, SAME, True)


@pytest.mark.clause("PA-INVARIANT-2")
def test_another_order_for_single_rows_is_close_and_passes() -> None:
    def kernel(inputs: Inputs) -> tuple[Any, ...]:
        rows = inputs.arrays["x"].shape[0] if inputs.arrays["x"].ndim > 1 else 1
        return linear(dot_sequential if rows > 1 else dot_pairwise)(inputs)

    found = checked(kernel)
    assert (found.repeated, found.alone, found.passed) == (SAME, CLOSE, True)
    assert "case" in found.detail


@pytest.mark.clause("PA-INVARIANT-2")
def test_rows_that_leak_into_each_other_fail() -> None:
    def kernel(inputs: Inputs) -> tuple[Any, ...]:
        (y,) = linear(dot_sequential)(inputs)
        if y.ndim > 1 and y.shape[0] == 1:
            y = y + np.float32(0.5)
        return (y,)

    found = checked(kernel)
    assert (found.alone, found.passed) == (DIFFERENT, False)


@pytest.mark.clause("PA-INVARIANT-1")
def test_another_result_the_second_time_fails() -> None:
    calls = iter(range(10_000))

    def kernel(inputs: Inputs) -> tuple[Any, ...]:
        return linear(dot_sequential if next(calls) % 2 else dot_pairwise)(inputs)

    found = checked(kernel)
    assert (found.repeated, found.passed) == (DIFFERENT, False)
    assert "second time" in found.detail


@pytest.mark.clause("PA-INVARIANT-4")
def test_a_result_that_the_next_call_overwrites_fails() -> None:
    buffers: dict[tuple[int, ...], Any] = {}

    def kernel(inputs: Inputs) -> tuple[Any, ...]:
        (y,) = linear(dot_sequential)(inputs)
        workspace = buffers.setdefault(y.shape, np.zeros_like(y))
        workspace[...] = y
        return (workspace,)

    found = checked(kernel)
    assert (found.repeated, found.passed) == (DIFFERENT, False)
    assert "a later call overwrites the result" in found.detail


@pytest.mark.clause("PA-CASE-5")
def test_two_awaited_calls_that_share_a_workspace_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make_backend()
    operation, part = operation_named("matmul_async"), type(async_ops(backend))
    assert run_case(BackendSubject(backend, "numpy"), operation, FP32, 0, 0).status == PASSED
    shared: dict[str, Any] = {}

    async def matmul_async(self: Any, a: Any, b: Any) -> Any:
        shared["y"] = self.matmul(a, b)
        await asyncio.sleep(0)
        return shared["y"]

    monkeypatch.setattr(part, "matmul_async", matmul_async)
    assert run_case(BackendSubject(backend, "numpy"), operation, FP32, 0, 0).status == FAILED


def test_what_is_not_offered_is_unsupported() -> None:
    def kernel(inputs: Inputs) -> tuple[Any, ...]:
        raise UnsupportedError("linear: not here")

    found = checked(kernel)
    assert (found.repeated, found.alone, found.passed) == (UNSUPPORTED, UNSUPPORTED, True)
