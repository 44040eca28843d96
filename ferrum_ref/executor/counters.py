"""Runtime counters of an executor.  Clauses: MX-STATUS-2..3, MX-METRICS-1..3, MX-BATCH-5 (specs/model_executor.md)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil

from ferrum_ref.errors import BackendError
from ferrum_ref.interfaces.model_executor import ExecutorMemoryUsage, ExecutorMetrics, ExecutorState, ExecutorStatus

LATENCY_WINDOW = 1024  # operations of each kind whose latencies the 95th percentile looks at


class _Operations:
    """Count, shared and whole times of one kind of operation."""

    __slots__ = ("latencies_s", "latency_sum_s", "num", "share_s")

    def __init__(self) -> None:
        self.num = 0
        self.share_s = 0.0
        self.latency_sum_s = 0.0
        self.latencies_s: deque[float] = deque(maxlen=LATENCY_WINDOW)

    def add(self, count: int, share_s: float, whole_s: float) -> None:
        self.num += count
        self.share_s += share_s * count
        self.latency_sum_s += whole_s * count
        self.latencies_s.extend([whole_s] * min(count, LATENCY_WINDOW))


class ExecutorCounters:
    """Completed prefills and decodes and the time they took. Operations share their forward's time equally."""

    def __init__(
        self, clock: Callable[[], float], kv_bytes: int, used_bytes: Callable[[], int], max_batch_size: int = 1
    ) -> None:
        """`kv_bytes` are the storage's; `used_bytes` tells how many of them belong to somebody now."""
        self._clock = clock
        self._kv_bytes = kv_bytes
        self._used_bytes = used_bytes
        self._max_batch_size = max(1, max_batch_size)
        self._peak_bytes = 0
        self._prefills, self._decodes = _Operations(), _Operations()
        self._num_tokens = self._num_forwards = self._num_members = 0
        self._busy_s = 0.0
        self._decode_batches: dict[int, tuple[int, float]] = {}
        self._in_flight = 0
        self._last_operation_s: float | None = None
        self._state = ExecutorState.Ready

    @contextmanager
    def timed(self, num_prefills: int, num_decodes: int, num_tokens: int | None = None) -> Iterator[None]:
        """Count one forward if it completes; `num_tokens` it ran, by default one an operation.

        Raises BackendError after `shut_down`.
        """
        if self._state is ExecutorState.Shutdown:
            raise BackendError("ModelExecutor: shut down; build another one")
        members = num_prefills + num_decodes
        self._in_flight, began_s = members, self._clock()
        try:
            yield
        finally:
            self._in_flight = 0
        now_s = self._clock()
        whole_s = now_s - began_s
        share_s = whole_s / max(1, members)
        self._prefills.add(num_prefills, share_s, whole_s)
        self._decodes.add(num_decodes, share_s, whole_s)
        if members:
            self._num_forwards += 1
            self._num_members += members
            self._num_tokens += members if num_tokens is None else num_tokens
            self._busy_s += whole_s
        if num_decodes and not num_prefills:
            count, seconds = self._decode_batches.get(num_decodes, (0, 0.0))
            self._decode_batches[num_decodes] = (count + 1, seconds + whole_s)
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
            prefill_operations=self._prefills.num,
            decode_operations=self._decodes.num,
            avg_prefill_time_ms=1000.0 * self._prefills.share_s / max(1, self._prefills.num),
            avg_decode_time_ms=1000.0 * self._decodes.share_s / max(1, self._decodes.num),
            memory_usage=ExecutorMemoryUsage(self._kv_bytes, used, max(used, self._peak_bytes), percent),
            last_operation=self._last_operation_s,
        )

    def metrics(self) -> ExecutorMetrics:
        """Figures so far; 0 where nothing was measured. Pure.  [MX-METRICS-1..3]"""
        mean_batch = self._num_members / max(1, self._num_forwards)
        return ExecutorMetrics(
            total_operations=self._prefills.num + self._decodes.num,
            prefill_operations=self._prefills.num,
            decode_operations=self._decodes.num,
            avg_prefill_latency=1000.0 * self._prefills.latency_sum_s / max(1, self._prefills.num),
            avg_decode_latency=1000.0 * self._decodes.latency_sum_s / max(1, self._decodes.num),
            p95_prefill_latency=1000.0 * nearest_rank(self._prefills.latencies_s, 0.95),
            p95_decode_latency=1000.0 * nearest_rank(self._decodes.latencies_s, 0.95),
            throughput_tps=self._num_tokens / self._busy_s if self._busy_s > 0 else 0.0,
            memory_efficiency=self._used_bytes() / self._kv_bytes if self._kv_bytes else 0.0,
            batch_utilization=min(1.0, mean_batch / self._max_batch_size),
        )

    def fastest_decode_batch(self) -> int | None:
        """The batch size that decoded most tokens per second, the smaller of equals; None before any decode. Pure."""
        rates = {n: n * count / seconds for n, (count, seconds) in self._decode_batches.items() if seconds > 0}
        return min(rates, key=lambda n: (-rates[n], n)) if rates else None


def nearest_rank(values: Sequence[float] | deque[float], fraction: float) -> float:
    """The ceil(fraction * n)-th smallest value; 0 for none. Pure.  [MX-METRICS-2]"""
    ordered = sorted(values)
    return ordered[max(1, ceil(fraction * len(ordered))) - 1] if ordered else 0.0
