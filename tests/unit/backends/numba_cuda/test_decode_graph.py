"""Recording launches as a CUDA graph, over a driver that keeps the rules of stream capture and does nothing else."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from ferrum_numba.gpu import machine as machine_module
from ferrum_numba.gpu.decode_graph import record_on_stream, replays
from ferrum_numba.gpu.machine import NvidiaMachine, SimulatedMachine

from ferrum_ref.errors import DeviceError, UnsupportedError

real = pytest.importorskip("cuda.bindings.driver")
HANDLE = 0x5EED
REFUSED = real.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED


class Driver:
    """`cuda.bindings.driver` for one stream: launches are held while it captures; the call `refusing` fails."""

    CUstream, CUstreamCaptureMode = real.CUstream, real.CUstreamCaptureMode

    def __init__(self, refusing: str = "") -> None:
        self.refusing = refusing
        self.calls: list[str] = []
        self.done: list[str] = []
        self.captured: list[str] | None = None

    def launch(self, kernel: str) -> None:
        (self.done if self.captured is None else self.captured).append(kernel)

    def _code(self, call: str) -> Any:
        self.calls.append(call)
        return REFUSED if call == self.refusing else real.CUresult.CUDA_SUCCESS

    def cuStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any]:
        assert (int(stream), mode.name) == (HANDLE, "CU_STREAM_CAPTURE_MODE_RELAXED")
        assert self.captured is None
        code = self._code("cuStreamBeginCapture")
        if not int(code):
            self.captured = []
        return (code,)

    def cuStreamEndCapture(self, stream: Any) -> tuple[Any, Any]:
        assert int(stream) == HANDLE
        assert self.captured is not None
        graph, self.captured = self.captured, None
        return self._code("cuStreamEndCapture"), graph

    def cuGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, Any]:
        assert flags == 0
        return self._code("cuGraphInstantiate"), tuple(graph)

    def cuGraphDestroy(self, graph: Any) -> tuple[Any]:
        return (self._code("cuGraphDestroy"),)

    def cuGraphLaunch(self, executable: Any, stream: Any) -> tuple[Any]:
        assert int(stream) == HANDLE
        code = self._code("cuGraphLaunch")
        if not int(code):
            self.done += executable
        return (code,)

    def cuGraphExecDestroy(self, executable: Any) -> tuple[Any]:
        return (self._code("cuGraphExecDestroy"),)


def running(driver: Driver) -> Callable[[], None]:
    def run() -> None:
        driver.launch("first")
        driver.launch("second")

    return run


@pytest.mark.clause("BK-NCUDA-23")
def test_launches_are_recorded_not_run_and_come_with_every_replay() -> None:
    driver = Driver()
    graph = record_on_stream(driver, HANDLE, running(driver))
    assert driver.done == []
    assert driver.calls == ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphDestroy"]
    graph()
    graph()
    assert driver.done == ["first", "second"] * 2
    del graph
    gc.collect()
    assert driver.calls[-1] == "cuGraphExecDestroy"


@pytest.mark.clause("BK-NCUDA-23")
@pytest.mark.parametrize("call", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"])
def test_a_refusal_is_told_and_the_stream_stays_usable(call: str) -> None:
    driver = Driver(refusing=call)
    with pytest.raises(UnsupportedError, match=f"record: {call}: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"):
        record_on_stream(driver, HANDLE, running(driver))
    assert driver.captured is None
    assert ("cuGraphDestroy" in driver.calls) == (call == "cuGraphInstantiate")
    driver.launch("third")
    assert driver.done == ["third"]


@pytest.mark.clause("BK-NCUDA-23")
def test_a_launch_that_fails_ends_the_recording() -> None:
    driver = Driver()

    def run() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(UnsupportedError, match="a launch cannot be recorded: operation not permitted"):
        record_on_stream(driver, HANDLE, run)
    assert driver.calls == ["cuStreamBeginCapture", "cuStreamEndCapture"]


@pytest.mark.clause("BK-NCUDA-23")
def test_a_graph_that_cannot_be_launched_is_an_error() -> None:
    driver = Driver(refusing="cuGraphLaunch")
    graph = record_on_stream(driver, HANDLE, running(driver))
    with pytest.raises(DeviceError, match="cuGraphLaunch: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"):
        graph()


@pytest.mark.clause("BK-NCUDA-23")
def test_the_driver_that_is_installed_has_what_is_called() -> None:
    called = [name for name in vars(Driver) if name.startswith("cu") and name[2].isupper()]
    assert len(called) == 6
    for name in called:
        told = str(inspect.getdoc(getattr(real, name))).split(")")[0].split("(")[1].split(",")
        ours = [one for one in inspect.signature(getattr(Driver, name)).parameters if one != "self"]
        assert len(told) == len(ours), name
    assert int(real.CUstream(HANDLE)) == HANDLE


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> Callable[[Driver], NvidiaMachine]:
    """nvidia(driver): a machine on a GPU that is not there, whose stream is the driver's."""

    def make(driver: Driver) -> NvidiaMachine:
        made = object.__new__(NvidiaMachine)
        made._gpu, made._stream = nullcontext(), HANDLE
        monkeypatch.setattr(machine_module, "cuda", SimpleNamespace(defer_cleanup=nullcontext))
        for name in vars(Driver):
            if name.startswith("cu") and name[2].isupper():
                monkeypatch.setattr(real, name, getattr(driver, name))
        return made

    return make


@pytest.mark.clause("BK-NCUDA-23")
def test_a_gpu_replays_its_graph_or_falls_back_to_launches(nvidia: Any) -> None:
    driver = Driver()
    run = running(driver)
    replay = nvidia(driver).record(run)
    assert replay is not run
    replay()
    assert driver.done == ["first", "second"]
    refusing = Driver(refusing="cuGraphInstantiate")
    run = running(refusing)
    assert nvidia(refusing).record(run) is run


class Pretending(SimulatedMachine):
    """Keeps the launches of a recording back, or not; and lets a replay make them, or not."""

    def __init__(self, runs_while_recording: bool, runs_when_replayed: bool) -> None:
        super().__init__()
        self.runs_while_recording, self.runs_when_replayed = runs_while_recording, runs_when_replayed

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        if self.runs_while_recording:
            run()
        return (lambda: run()) if self.runs_when_replayed else (lambda: None)


@pytest.mark.clause("BK-NCUDA-23")
def test_whether_graphs_are_recorded_is_tried_with_a_kernel() -> None:
    assert not SimulatedMachine().records_graphs
    assert not replays(SimulatedMachine())
    assert replays(Pretending(False, True))
    assert not replays(Pretending(True, True))
    assert not replays(Pretending(False, False))
