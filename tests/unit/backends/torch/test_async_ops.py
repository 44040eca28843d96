"""Awaited operations run one after another, in the order in which they were started: here in a thread, on a GPU in a
stream (what of that can be seen without one is below; `test_cuda` does the rest)."""

from __future__ import annotations

import asyncio
import gc
import threading
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ferrum_torch import make_backend, operation_queue
from ferrum_torch.async_ops import TorchAsyncTensorOps
from ferrum_torch.operation_queue import OperationQueue
from ferrum_torch.runtime import Runtime

from ferrum_ref.errors import BackendError
from ferrum_ref.interfaces.tensor import AsyncTensorOps
from ferrum_ref.types.devices import Device


class Recorded(TorchAsyncTensorOps):
    """Notes when operations begin and end; the first waits for a signal."""

    def __init__(self) -> None:
        super().__init__(Runtime(Device.CPU))
        self.notes: list[tuple[str, int]] = []
        self.go = threading.Event()

    def matmul(self, a: Any, b: Any) -> Any:
        self.notes.append(("begin", a.shape()[0]))
        if a.shape()[0] == 1:
            self.go.wait(10)
        result = super().matmul(a, b)
        self.notes.append(("end", a.shape()[0]))
        return result


@pytest.mark.clause("BK-TORCH-26", "BK-TORCH-29", "BK-TORCH-31", "TN-ASYNC-1")
def test_values_and_errors(backend: Any, tensor: Any) -> None:
    a = tensor([[1, 2], [3, 4]])
    with backend.async_tensor_ops() as ops:
        assert isinstance(ops, AsyncTensorOps)

        async def main() -> None:
            product, p = await asyncio.gather(ops.matmul_async(a, a), ops.softmax_async(tensor([0, np.log(3)]), -1))
            assert product.to_numpy().tolist() == [[7, 10], [15, 22]]
            assert np.array_equal(p.to_numpy(), ops.softmax(tensor([0, np.log(3)]), -1).to_numpy())
            with pytest.raises(BackendError, match="inner dimensions"):
                await ops.matmul_async(a, tensor([[1, 2, 3]]))
            with pytest.raises(BackendError, match="dim 5"):
                await ops.softmax_async(a, 5)
            with pytest.raises(BackendError, match="matmul: b: got ndarray"):
                await ops.matmul_async(a, np.ones((2, 2)))

        asyncio.run(main())
        asyncio.run(main())  # another event loop
        with torch.inference_mode():  # another mode than the queue's thread
            asyncio.run(main())
        assert ops.matmul(a, a).to_numpy().tolist() == [[7, 10], [15, 22]]
        assert not asyncio.run(ops.matmul_async(a, a)).data.requires_grad


@pytest.mark.clause("BK-TORCH-29", "TN-ASYNC-1", "TN-ASYNC-2", "TN-ASYNC-3")
def test_order(tensor: Any) -> None:
    async def main() -> None:
        with Recorded() as ops:
            finished: list[int] = []
            tasks = []
            for rows in (1, 2, 3, 4):
                task = asyncio.create_task(ops.matmul_async(tensor(np.ones((rows, 1))), tensor([[1]])))
                task.add_done_callback(lambda task, rows=rows: finished.append(rows))  # type: ignore[misc]
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
            assert [result.shape()[0] for result in (results[0], results[1], results[3])] == [1, 2, 4]  # type: ignore[union-attr]
            assert [rows for rows in finished if rows != 3] == [1, 2, 4]

    asyncio.run(main())


@pytest.mark.clause("BK-TORCH-29", "TN-ASYNC-3")
def test_synchronize_raises_nothing_of_theirs(backend: Any, tensor: Any) -> None:
    async def main() -> None:
        with backend.async_tensor_ops() as ops:
            await ops.synchronize()
            bad = asyncio.create_task(ops.softmax_async(tensor([1]), 7))
            await asyncio.sleep(0)
            await ops.synchronize()
            await asyncio.sleep(0)
            assert bad.done()
            with pytest.raises(BackendError):
                await bad

    asyncio.run(main())


@pytest.mark.clause("BK-TORCH-29", "TN-ASYNC-4")
def test_closing(backend: Any, tensor: Any) -> None:
    before = set(threading.enumerate())  # one that an earlier test left may end at any time
    ops = backend.async_tensor_ops()
    assert not set(threading.enumerate()) - before
    asyncio.run(ops.synchronize())
    assert len(set(threading.enumerate()) - before) == 1
    ops.close()
    ops.close()
    assert not set(threading.enumerate()) - before
    with pytest.raises(BackendError, match="synchronize: these operations have been closed; make a new TorchAsync"):
        asyncio.run(ops.synchronize())
    never = backend.async_tensor_ops()
    never.close()
    with pytest.raises(BackendError, match="matmul_async"):
        asyncio.run(never.matmul_async(tensor([[1]]), tensor([[1]])))


@pytest.mark.clause("BK-TORCH-29", "TN-ASYNC-4")
def test_closing_waits_and_what_was_started_is_delivered(tensor: Any) -> None:
    async def main() -> None:
        ops = Recorded()
        tasks = [asyncio.create_task(ops.matmul_async(tensor(np.ones((rows, 1))), tensor([[1]]))) for rows in (2, 3)]
        await asyncio.sleep(0)
        ops.close()
        assert ops.notes == [(note, rows) for rows in (2, 3) for note in ("begin", "end")]
        assert [result.shape()[0] for result in await asyncio.gather(*tasks)] == [2, 3]

    asyncio.run(main())


@pytest.mark.clause("BK-TORCH-29")
def test_after_shutdown_and_when_dropped(tensor: Any) -> None:
    backend: Any = make_backend()
    ops, x = backend.async_tensor_ops(), tensor([[1.0]])
    asyncio.run(ops.synchronize())
    asyncio.run(backend.shutdown())
    with pytest.raises(BackendError, match="shut down"):
        asyncio.run(ops.matmul_async(x, x))
    (thread,) = (t for t in threading.enumerate() if t.name.startswith("torch-tensor-ops"))
    del ops
    for _ in range(100):  # the error above holds the frames that it passed, the thread its last job for a moment
        gc.collect()
        thread.join(0.1)
        if not thread.is_alive():
            break
    assert not thread.is_alive()


class Gpu:
    """Streams and events that note what is asked of them; `done` lets events finish."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done = threading.Event()
        self.current = "default"
        gpu = self

        class Event:
            def __init__(self, blocking: bool = False) -> None:
                self.on, self.blocking = "", blocking

            def record(self, stream: Any) -> None:
                self.on = stream.name
                gpu.notes.append(f"record on {stream.name}")

            def synchronize(self) -> None:
                assert threading.current_thread().name.startswith("torch-tensor-ops-wait")
                assert self.blocking
                gpu.done.wait(10)
                gpu.notes.append("waited")

        class Stream:
            def __init__(self, device: Any = None, name: str = "side") -> None:
                self.name = name

            def record_event(self) -> Any:
                event = Event()
                event.record(self)
                return event

            def wait_event(self, event: Any) -> None:
                gpu.notes.append(f"{self.name} waits for {event.on}")

        @contextmanager
        def stream(chosen: Any) -> Any:
            gpu.current = chosen.name
            yield
            gpu.current = "default"

        callers = Stream(name="callers")
        self.torch = SimpleNamespace(
            empty=torch.empty,
            cuda=SimpleNamespace(Event=Event, Stream=Stream, stream=stream, current_stream=lambda device: callers),
        )

    def tensor(self, name: str) -> Any:
        return SimpleNamespace(
            is_cuda=True,
            device="cuda:0",
            record_stream=lambda stream: self.notes.append(f"{name} is used by {stream.name}"),
        )


@pytest.mark.clause("BK-TORCH-30")
def test_what_is_asked_of_a_gpu_and_in_which_order(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    monkeypatch.setattr(operation_queue, "torch", gpu.torch)
    queue = OperationQueue("Operations")

    def function() -> Any:
        assert threading.current_thread() is not threading.main_thread()
        gpu.notes.append(f"computed on {gpu.current}")
        return gpu.tensor("result")

    async def main() -> None:
        first = asyncio.create_task(queue.run("first", function, [gpu.tensor("a"), gpu.tensor("b")]))
        while "record on side" not in gpu.notes:
            await asyncio.sleep(0)
        assert gpu.notes == [
            "record on callers",
            "side waits for callers",
            "a is used by side",
            "b is used by side",
            "computed on side",
            "result is used by callers",
            "record on side",
        ]
        second = asyncio.create_task(queue.run("second", function, [gpu.tensor("a")]))
        while gpu.notes.count("record on side") < 2:  # it is launched before the first is done
            await asyncio.sleep(0)
        everything = asyncio.create_task(queue.synchronize())
        for _ in range(20):
            await asyncio.sleep(0)
        assert [task.done() for task in (first, second, everything)] == [False] * 3
        gpu.done.set()
        await asyncio.gather(first, second, everything)
        assert gpu.notes.count("waited") == 3
        queue.close()

    asyncio.run(main())


@pytest.mark.clause("BK-TORCH-30", "BK-TORCH-31")
def test_an_operation_that_fails_on_a_gpu_leaves_the_queue_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    gpu.done.set()
    monkeypatch.setattr(operation_queue, "torch", gpu.torch)

    def failing() -> Any:
        raise BackendError("softmax: no")

    async def main() -> None:
        queue = OperationQueue("Operations")
        bad = asyncio.create_task(queue.run("bad", failing, [gpu.tensor("a")]))
        good = asyncio.create_task(queue.run("good", lambda: gpu.tensor("result"), [gpu.tensor("a")]))
        await asyncio.sleep(0)
        queue.close()  # what was started is delivered
        assert (await good).is_cuda
        with pytest.raises(BackendError, match="softmax: no"):
            await bad

    asyncio.run(main())
