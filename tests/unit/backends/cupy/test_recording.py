"""Graphs and streams, with a stand-in for CuPy's: where memory comes from, what a failure leaves behind, who waits."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("cupy")

from ferrum_ref.errors import BackendError, ResourceExhaustedError, UnsupportedError


class Failure(RuntimeError):
    pass


class NoMemory(Failure):
    pass


class Pool:
    def malloc(self, size: int) -> str:
        return f"{size} bytes of the recording's own pool"


class Stream:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def __enter__(self) -> None:
        self.log.append("stream")

    def __exit__(self, *_: object) -> None:
        self.log.append("no stream")

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.log.append(name) or SimpleNamespace(launch=lambda _: self.log.append("launch"))


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Any:
    """(a Gpu over the stand-in, its log, the allocator in force)"""
    from ferrum_cupy import gpu

    log: list[str] = []
    state = SimpleNamespace(allocator=None)

    @contextmanager
    def using_allocator(allocator: Any) -> Any:
        state.allocator = allocator
        yield
        state.allocator = None

    cuda = SimpleNamespace(
        MemoryPool=Pool,
        Stream=lambda **_: Stream(log),
        get_current_stream=lambda: Stream(log),
        using_allocator=using_allocator,
        Event=lambda **flags: SimpleNamespace(flags=flags, done=False, synchronize=lambda: log.append("waited")),
        runtime=SimpleNamespace(CUDARuntimeError=Failure, streamPerThread=2),
        driver=SimpleNamespace(CUDADriverError=Failure),
        memory=SimpleNamespace(OutOfMemoryError=NoMemory),
    )
    monkeypatch.setattr(gpu, "cupy", SimpleNamespace(cuda=cuda))
    made: Any = object.__new__(gpu.Gpu)
    made._device = nullcontext()
    return SimpleNamespace(gpu=made, log=log, state=state)


@pytest.mark.clause("BK-CUPY-45", "BK-CUPY-19")
def test_a_recording_keeps_a_pool_of_its_own(recording: Any) -> None:
    pools: list[Any] = []

    def step() -> str:
        recording.log.append("step")
        pools.append(weakref.ref(recording.state.allocator.__self__))
        return str(recording.state.allocator(8))

    replay = recording.gpu.record(step)
    told = [entry for entry in recording.log if entry in ("step", "begin_capture", "end_capture", "synchronize")]
    assert told == ["step", "begin_capture", "step", "end_capture", "synchronize"]
    assert recording.state.allocator is None  # others get their memory where they did
    gc.collect()
    assert pools[0]() is pools[1]() is not None
    assert replay() == "8 bytes of the recording's own pool"
    assert recording.log[-1] == "launch"
    del replay
    gc.collect()
    assert pools[0]() is None


@pytest.mark.clause("BK-CUPY-45", "BK-CUPY-46")
@pytest.mark.parametrize(("raised", "expected"), [(Failure, BackendError), (NoMemory, ResourceExhaustedError)])
def test_a_recording_that_fails_ends_the_capture(recording: Any, raised: Any, expected: Any) -> None:
    def step() -> str:
        if "begin_capture" in recording.log:
            raise raised("not while capturing")
        return ""

    with pytest.raises(expected, match=r"record: .*not while capturing"):
        recording.gpu.record(step)
    assert recording.log[-2:] == ["end_capture", "no stream"]


@pytest.mark.clause("BK-CUPY-51")
def test_another_thread_launches_into_the_callers_stream(recording: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = recording.gpu.current_stream()
    with recording.gpu.using(stream):
        done = stream.record()
        stream.wait(done)
    assert recording.log == ["stream", "record", "wait_event", "no stream"]
    assert done.event.flags == {"block": True, "disable_timing": True}  # who waits for it sleeps
    assert not done.is_done
    done.synchronize()
    assert recording.log[-1] == "waited"
    for call in (lambda: stream.wait(object()), lambda: recording.gpu.using(object()).__enter__()):
        with pytest.raises(BackendError, match="of a GPU"):
            call()
    from ferrum_cupy import gpu

    monkeypatch.setattr(gpu.cupy.cuda, "get_current_stream", lambda: SimpleNamespace(ptr=2))
    with pytest.raises(UnsupportedError, match="each thread's default stream is its own"):
        recording.gpu.current_stream()
