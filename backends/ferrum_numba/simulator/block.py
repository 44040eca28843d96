"""The threads of one block: run in turn, each until it ends or meets a barrier or a warp intrinsic.

Clauses: BK-CUDASIM-1..4 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from greenlet import getcurrent, greenlet

from ferrum_numba.simulator.moment import Clock, Dim3, Moment
from ferrum_numba.simulator.warp import EXCHANGES, LANES
from ferrum_ref.errors import BackendError

SHOWN_THREADS = 6
BARRIERS = frozenset({"syncthreads", "syncthreads_count", "syncthreads_and", "syncthreads_or"})


class Request(NamedTuple):
    """What a thread waits for: a barrier, or an exchange among the lanes of `mask`; `site` is the stack, `file` and
    `line` the place in the code."""

    operation: str
    site: tuple[int, ...]
    file: str
    line: int
    mask: int
    operands: tuple[Any, ...]

    @property
    def place(self) -> str:
        return f"{Path(self.file).name}:{self.line}"


class Thread:
    """One CUDA thread; `request` is what it waits for, None once it has ended."""

    def __init__(self, run: Callable[[], None], index: Dim3, number: int) -> None:
        self._greenlet: Any = greenlet(run)
        self._greenlet.gr_context = contextvars.copy_context()  # numpy's error state, as the launch has set it
        self.index, self.number = index, number
        self.warp, self.lane = divmod(number, LANES)
        self.warp_epoch = 0
        self.moment: Moment
        self.request: Request | None = None
        self.results: tuple[Any, ...] = ()  # of the request that was granted last

    def resume(self) -> None:
        """Run on with the results, up to the next request or the end."""
        self.request = self._greenlet.switch(*self.results)


class Block:
    """One block of a launch.  [BK-CUDASIM-2]

    `current` is the thread that is running; `number` the block's place in the grid.
    """

    def __init__(self, kernel: str, index: Dim3, number: int, shape: Dim3) -> None:
        self.kernel, self.index, self.number, self.shape = kernel, index, number, shape
        self.epoch = 0
        self.current: Thread
        self._scheduler: Any = getcurrent()
        self._threads: list[Thread] = []

    def run(self, function: Callable[[], None], clock: Clock, backwards: bool) -> None:
        """Calls `function` once in each thread, telling `clock` which.

        Raises BackendError where threads wait for what can never come; what a thread raises comes through.
        """
        points = np.ndindex(self.shape.z, self.shape.y, self.shape.x)
        self._threads = [Thread(function, Dim3(x, y, z), number) for number, (z, y, x) in enumerate(points)]
        order = self._threads[::-1] if backwards else self._threads
        for thread in order:
            self._renew(thread)
        ready: Sequence[Thread] = order
        while ready:
            for thread in ready:
                self.current, clock.moment = thread, thread.moment
                thread.resume()
            ready = self._released([thread for thread in order if thread.request is not None])

    def wait(self, request: Request) -> Any:
        """Called by a thread: lets the others run until the request is granted; returns its result."""
        return self._scheduler.switch(request)

    def _released(self, waiting: Sequence[Thread]) -> Sequence[Thread]:
        """The threads of `waiting` that can go on. Raises BackendError if there is none."""
        ready: set[int] = set()
        for thread in waiting:
            if thread.number not in ready:
                ready.update(self._exchanged(thread))
        if ready or not waiting:
            return [thread for thread in waiting if thread.number in ready]
        if len(waiting) < len(self._threads) or len({_asked(thread).site for thread in waiting}) > 1:
            raise self._divergence()
        if _asked(waiting[0]).operation not in BARRIERS:
            raise self._divergence()
        self._pass_barrier(_asked(waiting[0]).operation)
        return waiting

    def _pass_barrier(self, operation: str) -> None:
        self.epoch += 1
        values = [bool(_asked(thread).operands[0]) for thread in self._threads if _asked(thread).operands]
        result = {
            "syncthreads_count": sum(values),
            "syncthreads_and": int(all(values)),
            "syncthreads_or": int(any(values)),
        }
        for thread in self._threads:
            thread.results = (result.get(operation),)
            self._renew(thread)

    def _exchanged(self, thread: Thread) -> list[int]:
        """Numbers of the threads with which `thread` has made its exchange: [] if some are not there yet."""
        asked = _asked(thread)
        if asked.operation in BARRIERS:
            return []
        start = thread.warp * LANES
        warp = self._threads[start : start + LANES]
        members = [other for other in warp if asked.mask >> other.lane & 1 and other.request is not None]
        for other in members:
            theirs = _asked(other)
            if (theirs.operation, theirs.mask, theirs.site) != (asked.operation, asked.mask, asked.site):
                return []
        try:
            results = EXCHANGES[asked.operation]({other.lane: _asked(other).operands for other in members})
        except BackendError as error:
            raise BackendError(f"{thread.moment.place}: {asked.operation} ({asked.place}): {error.message}") from None
        epoch = 1 + max(other.warp_epoch for other in members)
        for other in members:
            other.results = (results[other.lane],)
            if asked.operation == "syncwarp":
                other.warp_epoch = epoch
                self._renew(other)
        return [other.number for other in members]

    def _renew(self, thread: Thread) -> None:
        thread.moment = Moment(
            self.number,
            thread.number,
            thread.warp,
            self.epoch,
            thread.warp_epoch,
            self.kernel,
            self.index,
            thread.index,
        )

    def _divergence(self) -> BackendError:
        groups: dict[tuple[Any, ...], list[Thread]] = {}
        for thread in self._threads:
            site = () if thread.request is None else thread.request.site
            groups.setdefault((_state(thread), site), []).append(thread)
        told = "; ".join(f"{_named(threads)} {state}" for (state, _), threads in groups.items())
        return BackendError(
            f"{self.kernel}: block {self.index}: divergent barrier: {told}; every thread of the block must reach the "
            "same syncthreads, and every lane of a mask the same intrinsic"
        )


def _asked(thread: Thread) -> Request:
    if thread.request is None:
        raise BackendError(f"simulator: thread {thread.index} waits for nothing; report this")
    return thread.request


def _state(thread: Thread) -> str:
    request = thread.request
    if request is None:
        return "ended"
    mask = "" if request.operation in BARRIERS else f" with mask {request.mask:#010x}"
    return f"at {request.operation}{mask} ({request.place})"


def _named(threads: Sequence[Thread]) -> str:
    shown = ", ".join(str(thread.index) for thread in threads[:SHOWN_THREADS])
    more = f" and {len(threads) - SHOWN_THREADS} more" if len(threads) > SHOWN_THREADS else ""
    return f"{'thread' if len(threads) == 1 else 'threads'} {shown}{more}"
