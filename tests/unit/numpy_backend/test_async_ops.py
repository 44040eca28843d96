"""Awaited operations run one after another, in the order in which they were started."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from ferrum_ref.errors import BackendError
from ferrum_ref.interfaces.tensor import AsyncTensorOps
from ferrum_ref.numpy_backend.async_ops import NumpyAsyncTensorOps
from ferrum_ref.numpy_backend.factory import NumpyTensorFactory

FACTORY = NumpyTensorFactory()


def tensor(values):
    return FACTORY.from_numpy(np.array(values, np.float32))


class Recorded(NumpyAsyncTensorOps):
    """Notes when operations begin and end; the first waits for a signal."""

    def __init__(self):
        super().__init__()
        self.notes, self.go = [], threading.Event()

    def matmul(self, a, b):
        self.notes.append(("begin", a.shape()[0]))
        if a.shape()[0] == 1:
            self.go.wait(10)
        result = super().matmul(a, b)
        self.notes.append(("end", a.shape()[0]))
        return result


@pytest.mark.clause("TN-ASYNC-1")
def test_values_and_errors():
    a = tensor([[1, 2], [3, 4]])
    with NumpyAsyncTensorOps() as ops:
        assert isinstance(ops, AsyncTensorOps)

        async def main():
            product, p = await asyncio.gather(ops.matmul_async(a, a), ops.softmax_async(tensor([0, np.log(3)]), -1))
            assert product.to_numpy().tolist() == [[7, 10], [15, 22]]
            assert p.to_vec_f32().tolist() == pytest.approx([0.25, 0.75], rel=4 * 2**-24)
            with pytest.raises(BackendError, match="inner dimensions"):
                await ops.matmul_async(a, tensor([[1, 2, 3]]))
            with pytest.raises(BackendError, match="axis 5"):
                await ops.softmax_async(a, 5)

        asyncio.run(main())
        asyncio.run(main())  # another event loop
        assert ops.matmul(a, a).to_numpy().tolist() == [[7, 10], [15, 22]]


@pytest.mark.clause("TN-ASYNC-1", "TN-ASYNC-2", "TN-ASYNC-3")
def test_order():
    async def main():
        with Recorded() as ops:
            finished = []
            tasks = []
            for rows in (1, 2, 3, 4):
                one = tensor(np.ones((rows, 1)))
                task = asyncio.create_task(ops.matmul_async(one, tensor([[1]])))
                task.add_done_callback(lambda task, rows=rows: finished.append(rows))
                tasks.append(task)
            waiting = asyncio.create_task(ops.synchronize())
            while not ops.notes:
                await asyncio.sleep(0)  # the loop goes on while the first one computes
            assert ops.notes == [("begin", 1)]
            assert not waiting.done()
            tasks[2].cancel()
            await asyncio.sleep(0)
            ops.go.set()
            await waiting
            assert ops.notes == [(note, rows) for rows in (1, 2, 4) for note in ("begin", "end")]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(results[2], asyncio.CancelledError)
            assert [result.shape()[0] for result in (results[0], results[1], results[3])] == [1, 2, 4]
            assert [rows for rows in finished if rows != 3] == [1, 2, 4]

    asyncio.run(main())


@pytest.mark.clause("TN-ASYNC-3")
def test_synchronize_raises_nothing_of_theirs():
    async def main():
        with NumpyAsyncTensorOps() as ops:
            await ops.synchronize()
            bad = asyncio.create_task(ops.softmax_async(tensor([1]), 7))
            await asyncio.sleep(0)
            await ops.synchronize()
            await asyncio.sleep(0)
            assert bad.done()
            with pytest.raises(BackendError):
                await bad

    asyncio.run(main())


@pytest.mark.clause("TN-ASYNC-4")
def test_closing():
    before = set(threading.enumerate())  # one that an earlier test left may end at any time
    ops = NumpyAsyncTensorOps()
    assert not set(threading.enumerate()) - before
    asyncio.run(ops.synchronize())
    assert len(set(threading.enumerate()) - before) == 1
    ops.close()
    ops.close()
    assert not set(threading.enumerate()) - before
    with pytest.raises(BackendError, match="synchronize: these operations have been closed"):
        asyncio.run(ops.synchronize())
    never = NumpyAsyncTensorOps()
    never.close()
    with pytest.raises(BackendError, match="matmul_async"):
        asyncio.run(never.matmul_async(tensor([[1]]), tensor([[1]])))
