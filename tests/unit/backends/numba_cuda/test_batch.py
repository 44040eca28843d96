"""Lists of tensors in few launches, and operations that are awaited."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.types.devices import DataType

BF16 = ml_dtypes.bfloat16
A, B = np.arange(6.0).reshape(2, 3), np.arange(6.0, 12.0).reshape(2, 3)


@pytest.fixture
def batch(backend: Any) -> Any:
    return backend.tensor_batch_ops()


@pytest.fixture
def launched(backend: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched from now on."""
    machine, names = backend._runtime.machine, []
    launch = machine.launch

    def noted(kernel: Any, *arguments: Any, **named: Any) -> None:
        names.append(kernel.name)
        launch(kernel, *arguments, **named)

    monkeypatch.setattr(machine, "launch", noted)
    return names


@pytest.mark.clause("BK-NCUDA-45", "TN-BATCH-1")
def test_pairs_of_one_shape_are_one_product(batch: Any, ops: Any, tensor: Any, launched: list[str]) -> None:
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    left = [draw(2, 3), draw(4, 5), draw(2, 3), draw(2, 1, 3), draw(2, 3)]
    right = [draw(3, 4), draw(5, 1), draw(3, 4), draw(3, 3, 2), draw(3, 4)]
    firsts = [tensor(x) for x in left]
    firsts[4] = ops.transpose(tensor(left[4].T), 0, 1)
    seconds = [tensor(x) for x in right]
    seconds[3] = tensor(right[3][:1])
    right[3] = right[3][:1]
    alone = [ops.matmul(a, b).to_numpy() for a, b in zip(firsts, seconds, strict=True)]
    launched.clear()
    products = batch.batch_matmul(firsts, seconds)
    assert launched.count("gemm") == 3
    for one, expected, a, b in zip(products, alone, left, right, strict=True):
        assert one.to_numpy().tobytes() == expected.tobytes()
        assert np.allclose(one.to_numpy(), a.astype(np.float64) @ b, rtol=1e-5, atol=1e-6)
    assert batch.batch_matmul([], []) == []
    mixed = batch.batch_matmul([tensor(A, BF16), tensor(A)], [tensor(B.T, BF16), tensor(B.T, BF16)])
    assert [one.dtype() for one in mixed] == [DataType.BF16, DataType.FP32]
    assert mixed[1].to_numpy().tolist() == (A @ B.T).tolist()


@pytest.mark.clause("BK-NCUDA-45", "TN-BATCH-1")
def test_every_pair_is_checked_before_the_first_is_multiplied(batch: Any, tensor: Any, launched: list[str]) -> None:
    with pytest.raises(InvalidParameterError, match="expected as many"):
        batch.batch_matmul([tensor(A)], [])
    launched.clear()
    with pytest.raises(BackendError, match="batch_matmul: pair 1: "):
        batch.batch_matmul([tensor(A), tensor(A)], [tensor(B.T), tensor(A)])
    with pytest.raises(BackendError, match=r"batch_matmul: pair 0: .*int32"):
        batch.batch_matmul([tensor(A, np.int32)], [tensor(B.T, np.int32)])
    with pytest.raises(BackendError, match=r"pair 1: .*convert it with"):
        batch.batch_matmul([tensor(A), A], [tensor(B.T), tensor(B.T)])
    assert launched == []


@pytest.mark.clause("BK-NCUDA-20", "BK-NCUDA-45", "TN-BATCH-2", "TN-BATCH-3")
def test_stack_and_unstack_are_each_others_inverse(batch: Any, tensor: Any) -> None:
    stacked = batch.stack([tensor(A), tensor(B, BF16)], 1)
    assert stacked.dtype() is DataType.FP32
    assert stacked.to_numpy().tolist() == np.stack([A, B], 1).tolist()
    pieces = batch.unstack(stacked, 1)
    assert [piece.to_numpy().tolist() for piece in pieces] == [A.tolist(), B.tolist()]
    assert all(piece.array is stacked.array for piece in pieces)
    for call in (
        lambda: batch.stack([tensor(A), tensor(B.T)], 0),
        lambda: batch.stack([tensor(A)], 3),
        lambda: batch.stack([tensor(A)], -1),
        lambda: batch.unstack(tensor(A), 2),
        lambda: batch.unstack(tensor(A), -1),
    ):
        with pytest.raises(ShapeError, match="expected"):
            call()
    with pytest.raises(BackendError, match="expected at least one"):
        batch.stack([], 0)


@pytest.mark.clause("BK-NCUDA-45", "TN-BATCH-4")
def test_padding_clears_once_and_copies_each(batch: Any, ops: Any, tensor: Any, launched: list[str]) -> None:
    turned = ops.transpose(tensor(A.T), 0, 1)
    sources = [tensor(A), turned, tensor(B > 8, np.bool_), tensor(np.zeros((0, 5)))]
    launched.clear()
    padded = batch.pad_batch(sources, (3, 5))
    assert launched.count("fill") == 2
    assert launched.count("scatter_strided") == 3
    expected = np.pad(A, ((0, 1), (0, 2)))
    assert [one.to_numpy().tolist() for one in padded[:2]] == [expected.tolist()] * 2
    assert padded[2].dtype() is DataType.BOOL
    assert padded[2].to_numpy().tolist() == np.pad(B > 8, ((0, 1), (0, 2))).tolist()
    assert padded[3].to_numpy().tolist() == np.zeros((3, 5)).tolist()
    assert batch.pad_batch([], (3,)) == []
    for target in ((2, 2), (2, 3, 1)):
        with pytest.raises(ShapeError, match="tensor 1 has shape"):
            batch.pad_batch([tensor(np.zeros((1,) * len(target))), tensor(A)], target)


@pytest.mark.clause("BK-NCUDA-46", "TN-ASYNC-1")
def test_awaited_operations_give_the_same_while_the_loop_goes_on(backend: Any, ops: Any, tensor: Any) -> None:
    awaited, marked, go_on = backend.async_tensor_ops(), threading.Event(), threading.Event()
    mark = backend._runtime.machine.mark

    def held() -> Any:
        wait = mark()
        marked.set()
        return lambda: wait() if go_on.wait(20) else None

    backend._runtime.machine.mark = held
    x = tensor([[0.0, 1.0]])

    async def run() -> Any:
        product = asyncio.create_task(awaited.matmul_async(tensor(A), tensor(B.T)))
        weights = asyncio.create_task(awaited.softmax_async(x, -1))
        assert await asyncio.to_thread(marked.wait, 20)
        await asyncio.sleep(0.02)
        assert not product.done()
        go_on.set()
        await awaited.synchronize()
        assert product.done()
        assert weights.done()
        return await product, await weights

    product, weights = asyncio.run(run())
    assert product.to_numpy().tolist() == (A @ B.T).tolist()
    assert weights.to_numpy().tobytes() == ops.softmax(x, -1).to_numpy().tobytes()


@pytest.mark.clause("BK-NCUDA-46", "TN-ASYNC-2")
def test_awaited_operations_run_in_the_order_in_which_they_were_started(backend: Any, tensor: Any) -> None:
    awaited, order = backend.async_tensor_ops(), []
    softmax = awaited.softmax
    awaited.softmax = lambda x, dim: order.append(x.shape()[1]) or softmax(x, dim)

    async def run() -> None:
        tasks = [asyncio.create_task(awaited.softmax_async(tensor(np.zeros((1, n))), 1)) for n in (5, 1, 4, 2, 3)]
        await asyncio.gather(*reversed(tasks))

    asyncio.run(run())
    assert order == [5, 1, 4, 2, 3]


@pytest.mark.clause("BK-NCUDA-46", "TN-ASYNC-3")
def test_an_error_belongs_to_who_awaits_it_and_what_waits_can_be_cancelled(backend: Any, tensor: Any) -> None:
    awaited, started, go_on = backend.async_tensor_ops(), threading.Event(), threading.Event()
    softmax, seen = awaited.softmax, []

    def held(x: Any, dim: int) -> Any:
        started.set()
        assert go_on.wait(20)
        seen.append(x.shape()[0])
        return softmax(x, dim)

    awaited.softmax = held

    async def run() -> None:
        first = asyncio.create_task(awaited.softmax_async(tensor(np.zeros((1, 2))), 1))
        wrong = asyncio.create_task(awaited.matmul_async(tensor(A), tensor(A)))
        second = asyncio.create_task(awaited.softmax_async(tensor(np.zeros((2, 2))), 1))
        third = asyncio.create_task(awaited.softmax_async(tensor(np.zeros((3, 2))), 1))
        await asyncio.to_thread(started.wait, 20)
        second.cancel()
        await asyncio.sleep(0)
        go_on.set()
        await awaited.synchronize()
        assert (await first).shape() == (1, 2)
        assert (await third).shape() == (3, 2)
        with pytest.raises(asyncio.CancelledError):
            await second
        with pytest.raises(BackendError, match="matmul"):
            await wrong

    asyncio.run(run())
    assert seen == [1, 3]


@pytest.mark.clause("BK-NCUDA-46", "TN-ASYNC-4")
def test_threads_are_made_late_and_ended(backend: Any, tensor: Any) -> None:
    awaited = backend.async_tensor_ops()
    assert awaited is backend.async_tensor_ops()

    x, y = tensor(A), tensor(B.T)
    coroutine = awaited.matmul_async(x, y)
    assert (awaited._launcher, awaited._waiter) == (None, None)
    asyncio.run(coroutine)
    threads = [*awaited._launcher._threads, *awaited._waiter._threads]
    assert [thread.is_alive() for thread in threads] == [True, True]
    with awaited:
        pass
    awaited.close()
    assert [thread.is_alive() for thread in threads] == [False, False]
    with pytest.raises(BackendError, match="matmul_async: these operations have been closed"):
        asyncio.run(awaited.matmul_async(x, y))


@pytest.mark.clause("BK-NCUDA-46", "BK-NCUDA-18")
def test_shutdown_ends_them(backend: Any, tensor: Any) -> None:
    awaited, batch, x = backend.async_tensor_ops(), backend.tensor_batch_ops(), tensor(A)
    asyncio.run(backend.shutdown())
    with pytest.raises(BackendError, match="closed"):
        asyncio.run(awaited.softmax_async(x, 0))
    with pytest.raises(BackendError, match="shut down"):
        batch.stack([x], 0)
    for give in (backend.tensor_batch_ops, backend.async_tensor_ops):
        with pytest.raises(BackendError, match="shut down"):
            give()
