"""The ranks of a parallel run over torch.distributed's gloo: processes of one machine or of several.

    peers = make_collectives(rank=1, num_ranks=4, rendezvous="file:///tmp/run-17", timeout_s=60.0)

Sums are taken in rank order from gathered values rather than by gloo's own reduction, whose order depends on the number
of ranks and on the length: so they are the same bits as over any other transport.
Importing this module does not import torch.  Clauses: TP-COLL-1..5, TP-GLOO-1..4 (specs/parallel.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import numpy as np

from ferrum_ref.errors import (
    AlreadyExistsError,
    FerrumTimeoutError,
    InvalidParameterError,
    NetworkError,
    UnsupportedError,
)
from ferrum_ref.interfaces.collectives import Collectives, Floats

TIMEOUT_S: Final = 60.0


def make_collectives(rank: int, num_ranks: int, rendezvous: str, timeout_s: float = TIMEOUT_S) -> Collectives:
    """This process's end of a gloo group; returns once all ranks are there.  [TP-GLOO-1]

    `rendezvous`: "file:///path" that does not exist yet and that all ranks see, or "tcp://host:port" of rank 0.
    Raises InvalidParameterError for a rank outside [0, num_ranks); UnsupportedError, with the remedy, without torch;
    AlreadyExistsError if this process is in a group; FerrumTimeoutError, NetworkError if the others do not come.
    """
    if not 0 <= rank < num_ranks:
        raise InvalidParameterError(f"make_collectives: rank: got {rank}, expected 0 to {num_ranks - 1}")
    try:
        import torch.distributed as distributed
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "torch":
            raise
        raise UnsupportedError(
            "make_collectives: torch is not installed, expected torch >= 2.11; "
            "install it: pip install 'ferrum-ref[torch]'"
        ) from error
    if not distributed.is_available() or not distributed.is_gloo_available():
        raise UnsupportedError("make_collectives: this torch was built without gloo; install another build of torch")
    if distributed.is_initialized():
        raise AlreadyExistsError("make_collectives: this process is in a group already; close that one first")
    with _told("make_collectives", rank, num_ranks, timeout_s):
        distributed.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=timeout_s)
        )
    return GlooCollectives(distributed, rank, num_ranks, timeout_s)


class GlooCollectives(Collectives):
    """One process's end of torch.distributed's default group.  [TP-GLOO-1..4]"""

    def __init__(self, distributed: Any, rank: int, num_ranks: int, timeout_s: float) -> None:
        """`distributed` is torch.distributed, its default group made.  For `make_collectives`."""
        self._distributed = distributed
        self._rank = rank
        self._num_ranks = num_ranks
        self._timeout_s = timeout_s
        self._is_open = True

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def num_ranks(self) -> int:
        return self._num_ranks

    def all_gather(self, values: Floats) -> list[Floats]:
        import torch

        mine = torch.from_numpy(np.array(values, np.float32))
        found = [torch.empty_like(mine) for _ in range(self._num_ranks)]
        if values.size and self._num_ranks > 1:
            with self._telling("all_gather"):
                self._distributed.all_gather(found, mine)
        else:
            found = [mine.clone() for _ in found]
        return [each.numpy() for each in found]

    def send(self, values: Floats, to: int) -> None:
        import torch

        self._other("send", to)
        if not values.size:
            return
        with self._telling(f"send to rank {to}"):
            self._distributed.send(torch.from_numpy(np.array(values, np.float32)), to)

    def recv(self, shape: tuple[int, ...], source: int) -> Floats:
        import torch

        self._other("recv", source)
        values = torch.empty(shape, dtype=torch.float32)
        if values.numel():
            with self._telling(f"recv from rank {source}"):
                self._distributed.recv(values, source)
        found: Floats = values.numpy()
        return found

    def barrier(self) -> None:
        self.all_gather(np.zeros(1, np.float32))

    def close(self) -> None:
        """Leave the group. Idempotent."""
        if self._is_open:
            self._is_open = False
            self._distributed.destroy_process_group()

    def _telling(self, operation: str) -> Any:
        if not self._is_open:
            raise NetworkError(f"{operation}: rank {self._rank} has left the group; make a new one")
        return _told(operation, self._rank, self._num_ranks, self._timeout_s)

    def _other(self, operation: str, rank: int) -> None:
        if rank == self._rank or not 0 <= rank < self._num_ranks:
            raise InvalidParameterError(
                f"{operation}: rank: got {rank}, expected another one than {self._rank} of {self._num_ranks}"
            )


@contextmanager
def _told(operation: str, rank: int, num_ranks: int, timeout_s: float) -> Iterator[None]:
    """torch's errors as this project's.  [TP-GLOO-3]"""
    try:
        yield
    except (RuntimeError, OSError) as error:  # all of torch.distributed's own errors are RuntimeErrors
        said = " ".join(str(error).split())[:200]
        if "timed out" in said.lower() or "timeout" in said.lower():
            raise FerrumTimeoutError(
                f"{operation}: rank {rank} of {num_ranks} waited {timeout_s} s for the others ({said}); every rank "
                "must be running and make the same calls in order"
            ) from error
        raise NetworkError(
            f"{operation}: rank {rank} of {num_ranks} lost another rank ({said}); start all ranks anew"
        ) from error
