"""What the ranks of a parallel run say to each other (extension: upstream has no such contract).

Values travel as float32 arrays on the host: exact for every 16-bit type, and the same numbers whichever transport
carries them. All ranks make the same calls in the same order.  Clauses: TP-COLL-1..5 (specs/parallel.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class Collectives(ABC):
    """One rank's end of a group.  One call at a time.

    Every call raises FerrumTimeoutError if the others do not come within the group's time limit, and NetworkError if
    the connection to one of them is lost; the group is of no further use then.
    """

    @property
    @abstractmethod
    def rank(self) -> int:
        """This rank's number, from 0."""

    @property
    @abstractmethod
    def num_ranks(self) -> int:
        """How many there are."""

    @abstractmethod
    def all_gather(self, values: Floats) -> list[Floats]:
        """The values of every rank, in rank order; all of one shape.  [TP-COLL-1]"""

    def all_reduce_sum(self, values: Floats) -> Floats:
        """((v_0 + v_1) + v_2) + ...: in float32, in rank order, so that every rank has the same bits.  [TP-COLL-2]

        Same shape on every rank; the result is fresh.
        """
        gathered = self.all_gather(values)
        total = gathered[0].copy()
        with np.errstate(all="ignore"):
            for part in gathered[1:]:
                total += part
        return total

    @abstractmethod
    def send(self, values: Floats, to: int) -> None:
        """To one other rank, which calls `recv`.  [TP-COLL-3]  Raises InvalidParameterError for no other rank."""

    @abstractmethod
    def recv(self, shape: tuple[int, ...], source: int) -> Floats:
        """What `source` sends next, which has that shape.  [TP-COLL-3]  Raises InvalidParameterError as `send`."""

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank has called it."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group; idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
