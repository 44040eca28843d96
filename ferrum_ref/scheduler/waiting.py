"""The waiting queue: a heap in policy order with lazy deletion.  Clauses: SC-QUEUE-1..2 (specs/scheduler.md)."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from ferrum_ref.errors import InternalError
from ferrum_ref.interfaces.step import SequenceState
from ferrum_ref.scheduler.policy import QueuePolicy

Entry = tuple[tuple[int, ...], int, SequenceState]


class WaitingQueue:
    """Requests in order of `policy.key`; every operation is O(log n).  [SC-QUEUE-1..2]

    An entry is live while it is its request's `queue_entry`; dead ones are dropped when they reach the top.
    """

    __slots__ = ("_heap", "_num_pushes", "_policy", "num_live")

    def __init__(self, policy: QueuePolicy) -> None:
        self._policy = policy
        self._heap: list[Entry] = []
        self._num_pushes = 0
        self.num_live = 0

    def push(self, sequence: SequenceState) -> None:
        """Queue a request at the place its key gives it. Mutates queue and request."""
        if sequence.queue_entry is not None:
            raise InternalError(f"WaitingQueue.push: request {sequence.request_id} is queued already")
        self._num_pushes += 1
        entry = (self._policy.key(sequence), self._num_pushes, sequence)
        sequence.queue_entry = entry
        heapq.heappush(self._heap, entry)
        self.num_live += 1

    def remove(self, sequence: SequenceState) -> None:
        """Take a request out, wherever it stands. Mutates queue and request."""
        if sequence.queue_entry is None:
            raise InternalError(f"WaitingQueue.remove: request {sequence.request_id} is not queued")
        sequence.queue_entry = None
        self.num_live -= 1
        if len(self._heap) > 64 + 4 * self.num_live:
            self._heap = [entry for entry in self._heap if entry[2].queue_entry is entry]
            heapq.heapify(self._heap)

    def peek(self) -> SequenceState | None:
        """The first request, or None. Pure but for dead entries."""
        heap = self._heap
        while heap:
            entry = heap[0]
            sequence = entry[2]
            if sequence.queue_entry is entry:
                return sequence
            heapq.heappop(heap)
        return None

    def position(self, sequence: SequenceState) -> int | None:
        """How many queued requests come before this one; None when it is not queued. Pure.  [SC-QUEUE-2; D-72]"""
        if sequence.queue_entry is None:
            return None
        key = sequence.queue_entry[0]
        return sum(1 for entry in self._heap if entry[2].queue_entry is entry and entry[0] < key)

    def __iter__(self) -> Iterator[SequenceState]:
        """Queued requests in order. Pure."""
        live = (entry for entry in self._heap if entry[2].queue_entry is entry)
        return (entry[2] for entry in sorted(live, key=lambda entry: entry[0]))
