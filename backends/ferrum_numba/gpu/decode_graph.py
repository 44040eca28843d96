"""Launches on a stream recorded once as a CUDA graph, which the driver then repeats in one call.

Numba records nothing itself; the driver does, on any stream, while kernels are launched on it as ever. `driver` is
`cuda.bindings.driver`, which numba-cuda itself needs.   Clause: BK-NCUDA-23 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ferrum_numba.gpu.kernels.copy import fill
from ferrum_ref.errors import DeviceError, UnsupportedError

if TYPE_CHECKING:
    from ferrum_numba.gpu.machine import Machine

PROBE = np.dtype(np.uint32)
BEFORE, AFTER = 1, 7


class StreamGraph:
    """What `run` launched, as a graph; calling it queues all of that again, on the stream it was recorded on."""

    def __init__(self, driver: Any, stream: Any, executable: Any, run: Callable[[], None]) -> None:
        self._driver, self._stream, self._executable = driver, stream, executable
        self._run = run  # keeps alive the memory that the graph's kernels touch
        weakref.finalize(self, driver.cuGraphExecDestroy, executable).atexit = False  # the context frees what is left

    def __call__(self) -> None:
        """Raises DeviceError when the driver refuses."""
        (code,) = self._driver.cuGraphLaunch(self._executable, self._stream)
        if int(code):
            raise DeviceError(f"decode_step: cuGraphLaunch: {_named(code)}; make the decode backend without graphs")


def record_on_stream(driver: Any, handle: int, run: Callable[[], None]) -> StreamGraph:
    """A graph of what `run` launches on the stream `handle`; nothing of it happens now.

    `run` must have run before: loading a kernel cannot be recorded. The stream is usable afterwards in any case.
    Raises UnsupportedError, naming the call that refused.
    """
    stream = driver.CUstream(handle)
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED  # other threads may go on with the driver
    _of("cuStreamBeginCapture", driver.cuStreamBeginCapture(stream, mode))
    try:
        run()
    except Exception as error:
        driver.cuStreamEndCapture(stream)
        raise UnsupportedError(f"record: a launch cannot be recorded: {error}; launch the kernels instead") from error
    graph = _of("cuStreamEndCapture", driver.cuStreamEndCapture(stream))
    try:
        executable = _of("cuGraphInstantiate", driver.cuGraphInstantiate(graph, 0))
    finally:
        driver.cuGraphDestroy(graph)
    return StreamGraph(driver, stream, executable, run)


def replays(machine: Machine) -> bool:
    """Whether the machine records a launch without running it, and runs it when replayed: tried with one kernel."""
    kernel, array = fill(PROBE), machine.empty(1, PROBE)

    def write(value: int) -> None:
        machine.launch(kernel, 1, 32, array, value, 1)

    def run() -> None:
        write(AFTER)

    write(BEFORE)
    replay = machine.record(run)
    if replay is run or int(machine.download(array)[0]) != BEFORE:
        return False
    replay()
    return int(machine.download(array)[0]) == AFTER


def _of(call: str, result: tuple[Any, ...]) -> Any:
    """What a driver call gave besides its code. Raises UnsupportedError for a code other than success."""
    code, *values = result
    if int(code):
        raise UnsupportedError(f"record: {call}: {_named(code)}; launch the kernels instead")
    return values[0] if values else None


def _named(code: Any) -> str:
    return str(getattr(code, "name", code))
