"""Ranks as threads of one process: the same calls as over a network, nothing to set up.

    logits = run_ranks(4, lambda peers: read_rank(checkpoint, backend, peers).forward(batch, kv))    # one per rank

Clauses: TP-COLL-1..5 (specs/parallel.md).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import numpy as np

from ferrum_ref.errors import FerrumTimeoutError, InvalidParameterError, NetworkError, ShapeError
from ferrum_ref.interfaces.collectives import Collectives, Floats

TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.05
Result = TypeVar("Result")


class ThreadGroup:
    """What the ranks of one group share."""

    def __init__(self, num_ranks: int, timeout_s: float = TIMEOUT_S) -> None:
        if num_ranks < 1:
            raise InvalidParameterError(f"ThreadGroup: num_ranks: got {num_ranks}, expected at least 1")
        self.num_ranks = num_ranks
        self.timeout_s = timeout_s
        self.lost = threading.Event()
        self.meeting = threading.Barrier(num_ranks)
        self.slots: list[Floats | None] = [None] * num_ranks
        self.letters: dict[tuple[int, int], queue.Queue[Floats]] = {
            (source, to): queue.Queue() for source in range(num_ranks) for to in range(num_ranks) if source != to
        }

    def rank(self, rank: int) -> ThreadCollectives:
        """One rank's end.  Raises InvalidParameterError for a rank that there is not."""
        if not 0 <= rank < self.num_ranks:
            raise InvalidParameterError(f"ThreadGroup: rank: got {rank}, expected 0 to {self.num_ranks - 1}")
        return ThreadCollectives(self, rank)

    def abort(self) -> None:
        """A rank is lost: whoever waits, now or later, raises NetworkError."""
        self.lost.set()
        self.meeting.abort()


class ThreadCollectives(Collectives):
    """One thread's end of a `ThreadGroup`."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self._group = group
        self._rank = rank

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def num_ranks(self) -> int:
        return self._group.num_ranks

    def all_gather(self, values: Floats) -> list[Floats]:
        """Raises ShapeError, on every rank, if shapes differ."""
        group = self._group
        if group.num_ranks == 1:
            return [np.array(values, np.float32)]
        group.slots[self._rank] = np.array(values, np.float32)
        self._meet("all_gather")
        found = [slot for slot in group.slots if slot is not None]
        self._meet("all_gather")  # nobody overwrites a slot before all have read it
        shapes = [each.shape for each in found]
        if len(set(shapes)) > 1:
            raise ShapeError(f"all_gather: got shapes {shapes} from the ranks, expected one shape")
        return found

    def send(self, values: Floats, to: int) -> None:
        self._other("send", to)
        self._group.letters[self._rank, to].put(np.array(values, np.float32))

    def recv(self, shape: tuple[int, ...], source: int) -> Floats:
        """Raises ShapeError if something of another shape comes."""
        self._other("recv", source)
        letters, group = self._group.letters[source, self._rank], self._group
        waited_s = 0.0
        while True:
            try:
                values = letters.get(timeout=min(_POLL_S, group.timeout_s))
                break
            except queue.Empty:
                waited_s += _POLL_S
                if group.lost.is_set():
                    raise _lost(self._rank, f"recv from rank {source}") from None
                if waited_s >= group.timeout_s:
                    raise _late(self._rank, f"recv from rank {source}", group.timeout_s) from None
        if values.shape != shape:
            raise ShapeError(f"recv: got shape {values.shape} from rank {source}, expected {shape}")
        return values

    def barrier(self) -> None:
        self._meet("barrier")

    def close(self) -> None:
        """Nothing to give back."""

    def _meet(self, operation: str) -> None:
        group = self._group
        try:
            group.meeting.wait(group.timeout_s)
        except threading.BrokenBarrierError:
            if group.lost.is_set():
                raise _lost(self._rank, operation) from None
            raise _late(self._rank, operation, group.timeout_s) from None

    def _other(self, operation: str, rank: int) -> None:
        if rank == self._rank or not 0 <= rank < self.num_ranks:
            raise InvalidParameterError(
                f"{operation}: rank: got {rank}, expected another one than {self._rank} of {self.num_ranks}"
            )


def run_ranks(num_ranks: int, work: Callable[[Collectives], Result], *, timeout_s: float = TIMEOUT_S) -> list[Result]:
    """What `work` returns on each rank, in rank order; every rank runs in a thread of its own.  [TP-COLL-5]

    Raises the error of the rank that failed first; the others do not wait for it.
    """
    group = ThreadGroup(num_ranks, timeout_s)
    first: list[BaseException] = []
    lock = threading.Lock()

    def run(rank: int) -> Result:
        try:
            return work(group.rank(rank))
        except BaseException as error:
            with lock:
                first.append(error)
            group.abort()
            raise

    with ThreadPoolExecutor(num_ranks, thread_name_prefix="rank") as pool:
        futures = [pool.submit(run, rank) for rank in range(num_ranks)]
    if first:
        raise first[0]
    return [future.result() for future in futures]


def _late(rank: int, operation: str, timeout_s: float) -> FerrumTimeoutError:
    return FerrumTimeoutError(
        f"{operation}: rank {rank} waited {timeout_s} s for the others; every rank must make the same calls in order"
    )


def _lost(rank: int, operation: str) -> NetworkError:
    return NetworkError(f"{operation}: rank {rank} lost another rank, which failed; start all ranks anew")
