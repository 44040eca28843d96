"""Awaited operations run one after another, in the order in which they were started, and are complete when delivered.

On the host a launched kernel counts as done only when somebody has waited for its stream, so what forgets to shows.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ferrum_cupy.async_ops import CupyAsyncTensorOps
from ferrum_cupy.host.streams import HostEvent
from ferrum_cupy.operation_queue import OperationQueue
from ferrum_cupy.runtime import Runtime

from ferrum_ref.errors import BackendError
from ferrum_ref.interfaces.tensor import AsyncTensorOps


@pytest.fixture
def own(host: Any) -> Any:
    """A backend that only this test uses."""
    from ferrum_cupy.host import make_backend

    return make_backend()


@pytest.fixture
def tensor(own: Any) -> Any:
    return lambda values: own.tensor_factory().from_numpy(np.array(values, np.float32))


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.001)
    pytest.fail("what was waited for has not happened in two seconds")


class Recorded(CupyAsyncTensorOps):
    """Notes when operations begin and end; the first waits for a signal."""

    def __init__(self, machine: Any) -> None:
        super().__init__(Runtime(machine))
        self.notes: list[tuple[str, int]] = []
        self.go = threading.Event()

    def matmul(self, a: Any, b: Any) -> Any:
        self.notes.append(("begin", a.shape()[0]))
        if a.shape()[0] == 1:
            self.go.wait(10)
        result = super().matmul(a, b)
        self.notes.append(("end", a.shape()[0]))
        return result


@pytest.mark.clause("BK-CUPY-50", "TN-ASYNC-1")
def test_values_and_errors(own: Any, tensor: Any) -> None:
    a = tensor([[1, 2], [3, 4]])
    with own.async_tensor_ops() as ops:
        assert isinstance(ops, AsyncTensorOps)

        async def main() -> None:
            product, p = await asyncio.gather(ops.matmul_async(a, a), ops.softmax_async(tensor([0, np.log(3)]), -1))
            assert product.to_numpy().tolist() == [[7, 10], [15, 22]]
            assert np.array_equal(p.to_numpy(), ops.softmax(tensor([0, np.log(3)]), -1).to_numpy())
            with pytest.raises(BackendError, match="inner dimensions"):
                await ops.matmul_async(a, tensor([[1, 2, 3]]))
            with pytest.raises(BackendError, match="dim: got 5"):
                await ops.softmax_async(a, 5)
            with pytest.raises(BackendError, match="matmul: b: got ndarray"):
                await ops.matmul_async(a, np.ones((2, 2)))

        asyncio.run(main())
        asyncio.run(main())  # another event loop
        assert ops.matmul(a, a).to_numpy().tolist() == [[7, 10], [15, 22]]


@pytest.mark.clause("BK-CUPY-50", "TN-ASYNC-1", "TN-ASYNC-2", "TN-ASYNC-3")
def test_order(own: Any, tensor: Any) -> None:
    async def main() -> None:
        with Recorded(own._machine) as ops:
            finished: list[int] = []
            tasks = []
            for rows in (1, 2, 3, 4):
                task = asyncio.create_task(ops.matmul_async(tensor(np.ones((rows, 1))), tensor([[1]])))
                task.add_done_callback(lambda task, rows=rows: finished.append(rows))  # type: ignore[misc]
                tasks.append(task)
            waiting = asyncio.create_task(ops.synchronize())
            await until(lambda: bool(ops.notes))  # the loop goes on while the first one computes
            assert ops.notes == [("begin", 1)]
            assert not waiting.done()
            tasks[2].cancel()
            await asyncio.sleep(0)
            ops.go.set()
            await waiting
            assert ops.notes == [(note, rows) for rows in (1, 2, 4) for note in ("begin", "end")]
            results: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(results[2], asyncio.CancelledError)
            assert [result.shape()[0] for result in (results[0], results[1], results[3])] == [1, 2, 4]
            assert [rows for rows in finished if rows != 3] == [1, 2, 4]

    asyncio.run(main())


@pytest.mark.clause("BK-CUPY-50", "TN-ASYNC-3")
def test_synchronize_raises_nothing_of_theirs(own: Any, tensor: Any) -> None:
    async def main() -> None:
        with own.async_tensor_ops() as ops:
            await ops.synchronize()
            bad = asyncio.create_task(ops.softmax_async(tensor([1]), 7))
            await asyncio.sleep(0)
            await ops.synchronize()
            await asyncio.sleep(0)
            assert bad.done()
            with pytest.raises(BackendError):
                await bad

    asyncio.run(main())


def threads() -> set[Any]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("cupy-tensor-ops")}


@pytest.mark.clause("BK-CUPY-50", "TN-ASYNC-4")
def test_closing(own: Any, tensor: Any) -> None:
    before = threads()  # one that an earlier test left may end at any time
    ops = own.async_tensor_ops()
    assert not threads() - before
    asyncio.run(ops.matmul_async(tensor([[1]]), tensor([[1]])))
    assert len(threads() - before) == 2
    ops.close()
    ops.close()
    assert not threads() - before
    with pytest.raises(BackendError, match="synchronize: these operations have been closed; make a new CupyAsync"):
        asyncio.run(ops.synchronize())
    never = own.async_tensor_ops()
    never.close()
    with pytest.raises(BackendError, match="matmul_async"):
        asyncio.run(never.matmul_async(tensor([[1]]), tensor([[1]])))


@pytest.mark.clause("BK-CUPY-50", "TN-ASYNC-4")
def test_closing_waits_and_what_was_started_is_delivered(own: Any, tensor: Any) -> None:
    async def main() -> None:
        ops = Recorded(own._machine)
        tasks = [asyncio.create_task(ops.matmul_async(tensor(np.ones((rows, 1))), tensor([[1]]))) for rows in (2, 3)]
        await asyncio.sleep(0)
        ops.close()
        assert ops.notes == [(note, rows) for rows in (2, 3) for note in ("begin", "end")]
        assert not own._machine.current_stream().entries  # the device has done it, too
        assert [result.shape()[0] for result in await asyncio.gather(*tasks)] == [2, 3]

    asyncio.run(main())


@pytest.mark.clause("BK-CUPY-50")
def test_after_shutdown_and_when_dropped(own: Any, tensor: Any) -> None:
    ops, x = own.async_tensor_ops(), tensor([[1.0]])
    before = threads()
    asyncio.run(ops.synchronize())
    (thread,) = threads() - before
    asyncio.run(own.shutdown())
    with pytest.raises(BackendError, match="shut down"):
        asyncio.run(ops.matmul_async(x, x))
    del ops
    for _ in range(100):  # the error above holds the frames that it passed, the thread its last job for a moment
        gc.collect()
        thread.join(0.1)
        if not thread.is_alive():
            break
    assert not thread.is_alive()


@pytest.mark.clause("BK-CUPY-51", "TN-ASYNC-1")
def test_a_result_is_complete_when_it_is_delivered(own: Any, tensor: Any) -> None:
    """And the event is waited for in a thread of its own: neither by the loop nor by the one that launches."""
    stream = own._machine.current_stream()
    waiting: list[str] = []
    really = HostEvent.synchronize

    def noted(event: HostEvent) -> None:
        waiting.append(threading.current_thread().name)
        really(event)

    async def main() -> None:
        with pytest.MonkeyPatch.context() as patch, own.async_tensor_ops() as ops:
            patch.setattr(HostEvent, "synchronize", noted)
            for _ in range(3):
                await ops.matmul_async(tensor([[1]]), tensor([[1]]))
                assert not stream.entries
            await ops.synchronize()  # everything is done: nobody waits
        assert len(waiting) == 3
        assert all(name.startswith("cupy-tensor-ops-wait") for name in waiting)

    asyncio.run(main())


class Device:
    """Streams and events that note what is asked of them; `done` lets events finish."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done = threading.Event()
        self.callers = self.current = "default"

    def stream(self, name: str) -> Any:
        return SimpleNamespace(
            name=name,
            wait=lambda event: self.notes.append(f"{name} waits for {event.on}"),
            record=lambda: self.notes.append(f"record on {name}") or self.event(name),
        )

    def event(self, on: str) -> Any:
        def synchronize() -> None:
            self.done.wait(10)
            self.notes.append(f"waited for {on}")

        return SimpleNamespace(on=on, is_done=False, synchronize=synchronize)

    def current_stream(self) -> Any:
        assert threading.current_thread() is threading.main_thread()
        return self.stream(self.callers)

    def using(self, stream: Any) -> Any:
        device = self

        class Within:
            def __enter__(self) -> None:
                device.current = stream.name

            def __exit__(self, *_: object) -> None:
                device.current = "default"

        return Within()


@pytest.mark.clause("BK-CUPY-51", "TN-ASYNC-2")
def test_what_is_asked_of_the_device_and_in_which_order() -> None:
    device: Any = Device()
    queue: OperationQueue[int] = OperationQueue(device, "Operations")

    def function() -> int:
        assert threading.current_thread() is not threading.main_thread()
        device.notes.append(f"computed on {device.current}")
        return 7

    async def main() -> None:
        first = asyncio.create_task(queue.run("first", function))
        await until(lambda: "record on default" in device.notes)
        assert device.notes == ["computed on default", "record on default"]
        device.callers = "another"
        second = asyncio.create_task(queue.run("second", function))
        await until(lambda: "record on another" in device.notes)  # it is launched before the first is done
        assert device.notes[2:] == ["another waits for default", "computed on another", "record on another"]
        everything = asyncio.create_task(queue.synchronize())
        for _ in range(20):
            await asyncio.sleep(0)
        assert [task.done() for task in (first, second, everything)] == [False] * 3
        device.done.set()
        assert await asyncio.gather(first, second, everything) == [7, 7, None]
        assert device.notes[5:] == ["waited for default", "waited for another", "waited for another"]
        queue.close()

    asyncio.run(main())


@pytest.mark.clause("BK-CUPY-51")
def test_an_operation_that_fails_leaves_the_queue_usable() -> None:
    device: Any = Device()
    device.done.set()

    def failing() -> int:
        raise BackendError("softmax: no")

    async def main() -> None:
        queue: OperationQueue[int] = OperationQueue(device, "Operations")
        bad = asyncio.create_task(queue.run("bad", failing))
        good = asyncio.create_task(queue.run("good", lambda: 3))
        await asyncio.sleep(0)
        queue.close()  # what was started is delivered
        assert await good == 3
        assert device.current == "default"
        with pytest.raises(BackendError, match="softmax: no"):
            await bad

    asyncio.run(main())
