"""Runs the cases in a process of their own: a kernel that hangs, crashes or exits costs its case, not the run.

Clauses: PA-ISOLATED-1..5 (specs/judging.md).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Final

from ferrum_ref import errors
from ferrum_ref.errors import BackendError, FerrumError, InvalidParameterError
from ferrum_ref.parity.ops.catalogue import operation_named
from ferrum_ref.parity.ops.operation import Operation
from ferrum_ref.parity.runner import FAILED, SKIPPED, CaseResult, Selection, run_case
from ferrum_ref.parity.units import Storage, storage_named

TIME_LIMIT_S: Final = 60.0
OPENING_LIMIT_FACTOR: Final = 5.0  # a backend may compile its kernels when it is opened
LOST_CASES_PER_CELL: Final = 2  # a cell that hangs so often is not asked again
DEVICE_LOST: Final = re.compile(  # what CUDA says when a process can do nothing more on its device
    r"illegal.?(address|memory.access|instruction)|misaligned.?address|launch.?(fail|timeout)|launch timed out|"
    r"device.side.assert|cudaErrorAssert|CUDA_ERROR_ASSERT|hardware.?stack.?error|invalid.?(address.?space|pc)|"
    r"context is destroyed",
    re.IGNORECASE,
)
OpenSubject = Callable[[str, str], Any]
Item = tuple[Operation, Storage, int, int]


class Isolated:
    """A subject in another process, started when it is entered and anew after each loss.  [PA-ISOLATED-1..5]"""

    def __init__(self, name: str, device: str, open_subject: OpenSubject, time_limit_s: float = TIME_LIMIT_S) -> None:
        """open_subject(name, device) is imported in the other process by its own module and name.

        Raises InvalidParameterError for a limit that is not above 0.
        """
        if not time_limit_s > 0:
            raise InvalidParameterError(f"parity: the time limit is {time_limit_s:g} s, expected more than 0")
        self._process = _Process(name, device, open_subject, time_limit_s)
        self._lost = Counter[tuple[str, str]]()

    def __enter__(self) -> Isolated:
        """Raises what opening the subject raises."""
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stop()

    def run(
        self, selection: Selection, budget_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> Iterator[CaseResult]:
        """Every selected case in order, judged in the other process.  [PA-ISOLATED-1..5]

        A case beyond the time limit, and one whose process dies, is a failure with that reason; after one that leaves
        the device unusable a new process is started. Once `budget_s`
        seconds are over, the rest come out as skipped.
        """
        start, process = clock(), self._process
        for item in selection.items():
            operation, storage, case_index, seed = item
            cell = (operation.name, storage.name)
            if budget_s is not None and clock() - start >= budget_s:
                yield _told(process, item, SKIPPED, f"the budget of {budget_s:g} s was used up")
            elif self._lost[cell] >= LOST_CASES_PER_CELL:
                message = f"{self._lost[cell]} cases of this operation and type were lost before"
                yield _told(process, item, SKIPPED, message)
            else:
                found = process.judge(operation.name, storage.name, case_index, seed)
                if isinstance(found, str):
                    found = _told(process, item, FAILED, found)
                    self._lost[cell] += 1
                elif found.status == FAILED and DEVICE_LOST.search(found.message):
                    process.stop()
                    found = replace(found, message=f"{found.message}; the next case runs in a new process")
                    self._lost[cell] += 1
                yield found


def _told(process: _Process, item: Item, status: str, message: str) -> CaseResult:
    """A result without a verdict."""
    operation, storage, case_index, seed = item
    return CaseResult(
        operation=operation.name,
        dtype=storage.name,
        case_index=case_index,
        label=operation.cases[case_index].label,
        seed=seed,
        status=status,
        ratio_det=float("inf") if status == FAILED else 0.0,
        ratio_sharp=None,
        verdict=None,
        message=message,
        reproduce=f"ferrum-ref parity {process.selector} --op {operation.name} --dtype {storage.name} "
        f"--case {case_index} --seed {seed}",
    )


class _Process:
    """The other process: started when it is needed, killed when it does not answer."""

    def __init__(self, name: str, device: str, open_subject: OpenSubject, time_limit_s: float) -> None:
        self._arguments = (name, device, open_subject)
        self._limit_s = time_limit_s
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self.selector = f"--backend {name}" + (f" --device {device}" if device != "cpu" else "")

    def judge(self, *item: object) -> CaseResult | str:
        """The result, or in words what became of the process."""
        if self._pipe is None:
            self.start()
        pipe: Any = self._pipe
        try:
            pipe.send(item)
            if pipe.poll(self._limit_s):
                found: CaseResult = pipe.recv()
                return found
        except (EOFError, OSError):
            return self.stop()
        self.stop()
        return f"no result within {self._limit_s:g} s: the kernel hangs, or is that slow (--time-limit)"

    def start(self) -> None:
        """Raises the FerrumError that opening the subject raises there."""
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, *self._arguments), daemon=True)
        self._process.start()
        there.close()
        try:
            ready = self._pipe.poll(OPENING_LIMIT_FACTOR * self._limit_s)
            answer = self._pipe.recv() if ready else None
        except (EOFError, OSError):
            raise BackendError(f"parity: {self._arguments[0]}: {self.stop()} while it was opened") from None
        if answer is None:
            self.stop()
            raise BackendError(f"parity: {self._arguments[0]}: opening it takes too long; raise --time-limit")
        kind, message = answer
        if kind:
            self.stop()
            raise getattr(errors, kind, BackendError)(message)

    def stop(self) -> str:
        """Ends the process; says how it had ended if it had."""
        process, pipe = self._process, self._pipe
        self._process = self._pipe = None
        if process is None or pipe is None:
            return ""
        pipe.close()
        process.join(1.0)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
            return ""
        return f"the process died ({signal.Signals(-code).name})" if code < 0 else f"the process ended with code {code}"


def _serve(pipe: Connection, name: str, device: str, open_subject: OpenSubject) -> None:
    """In the other process: opens the subject, then judges what it is asked to."""
    try:
        subject = open_subject(name, device)
    except FerrumError as error:
        pipe.send((type(error).__name__, error.message))
        return
    pipe.send(("", ""))
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            operation, storage, case_index, seed = pipe.recv()
            pipe.send(run_case(subject, operation_named(operation), storage_named(storage), case_index, seed))
