"""Runtime counters of an executor.  Clauses: MX-STATUS-2 (specs/model_executor.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ferrum_ref.errors import BackendError
from ferrum_ref.interfaces.model_executor import ExecutorMemoryUsage, ExecutorState, ExecutorStatus


class ExecutorCounters:
    """Completed prefills and decodes and the time they took. One forward counts its time to what it held most of."""

    def __init__(self, clock: Callable[[], float], kv_bytes: int, used_bytes: Callable[[], int]) -> None:
        """`kv_bytes` are the storage's; `used_bytes` tells how many of them belong to somebody now."""
        self._clock = clock
        self._kv_bytes = kv_bytes
        self._used_bytes = used_bytes
        self._peak_bytes = 0
        self._num_prefills = self._num_decodes = 0
        self._prefill_s = self._decode_s = 0.0
        self._in_flight = 0
        self._last_operation_s: float | None = None
        self._state = ExecutorState.Ready

    @contextmanager
    def timed(self, num_prefills: int, num_decodes: int) -> Iterator[None]:
        """Count one forward if it completes; its time is shared in proportion to the operations.

        Raises BackendError after `shut_down`.
        """
        if self._state is ExecutorState.Shutdown:
            raise BackendError("ModelExecutor: shut down; build another one")
        self._in_flight, began_s = num_prefills + num_decodes, self._clock()
        try:
            yield
        finally:
            self._in_flight = 0
        now_s = self._clock()
        share_s = (now_s - began_s) / max(1, num_prefills + num_decodes)
        self._num_prefills += num_prefills
        self._num_decodes += num_decodes
        self._prefill_s += share_s * num_prefills
        self._decode_s += share_s * num_decodes
        self._last_operation_s = now_s
        self._peak_bytes = max(self._peak_bytes, self._used_bytes())

    def shut_down(self) -> None:
        """No further work is taken."""
        self._state = ExecutorState.Shutdown

    def status(self) -> ExecutorStatus:
        """A snapshot. Pure."""
        is_ready = self._state is ExecutorState.Ready
        used = self._used_bytes()
        percent = 100.0 * used / self._kv_bytes if self._kv_bytes else 0.0
        return ExecutorStatus(
            state=ExecutorState.Busy if is_ready and self._in_flight else self._state,
            is_ready=is_ready,
            current_batch_size=self._in_flight,
            prefill_operations=self._num_prefills,
            decode_operations=self._num_decodes,
            avg_prefill_time_ms=1000.0 * self._prefill_s / max(1, self._num_prefills),
            avg_decode_time_ms=1000.0 * self._decode_s / max(1, self._num_decodes),
            memory_usage=ExecutorMemoryUsage(self._kv_bytes, used, max(used, self._peak_bytes), percent),
            last_operation=self._last_operation_s,
        )
