"""How one tensor lies over N ranks: pure functions on arrays.

    Copied   every rank has the whole
    Once     one rank has it, the others have zeros: a bias that is added before a sum over ranks
    Split    each part of an axis is cut by units (heads, features, rows), each rank has its run of every part
    Owned    one rank has it, the others have nothing of it along an axis: a whole expert

unshard(shard(w, 0), ..., shard(w, N-1)) == w for each of them.  Clauses: TP-SHARD-1..5 (specs/parallel.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import InvalidParameterError, ShapeError

Array = npt.NDArray[Any]


class Rule(Protocol):
    """What a rank has of a tensor. Pure."""

    def shard(self, whole: Array, rank: int, num_ranks: int) -> Array:
        """This rank's part; a view where that is possible.  Raises ShapeError, InvalidParameterError."""

    def unshard(self, shards: Sequence[Array]) -> Array:
        """The whole tensor from all ranks' parts, in rank order.  Raises ShapeError."""


@dataclass(frozen=True, slots=True)
class Part:
    """A run of an axis: `num_units` units of `size` entries each.  [TP-SHARD-2]"""

    num_units: int
    size: int = 1

    def units(self, rank: int, num_ranks: int) -> range:
        """The units of a rank: runs whose lengths differ by one at most; where there are fewer units than ranks, one
        unit that neighbouring ranks share.  Pure.  Raises InvalidParameterError for a rank outside [0, num_ranks).
        """
        _check_rank(rank, num_ranks)
        start, stop = rank * self.num_units // num_ranks, (rank + 1) * self.num_units // num_ranks
        return range(start, max(stop, start + 1))

    def entries(self, rank: int, num_ranks: int) -> slice:
        """The same as entries of the part. Pure."""
        units = self.units(rank, num_ranks)
        return slice(units.start * self.size, units.stop * self.size)

    @property
    def num_entries(self) -> int:
        return self.num_units * self.size


@dataclass(frozen=True, slots=True)
class Copied:
    """Every rank has the whole.  [TP-SHARD-1]"""

    def shard(self, whole: Array, rank: int, num_ranks: int) -> Array:
        _check_rank(rank, num_ranks)
        return whole

    def unshard(self, shards: Sequence[Array]) -> Array:
        return shards[0]


@dataclass(frozen=True, slots=True)
class Once:
    """Rank `index * N // count` has it, the others zeros: their sum is the tensor.  [TP-SHARD-3]"""

    index: int = 0
    count: int = 1

    def shard(self, whole: Array, rank: int, num_ranks: int) -> Array:
        _check_rank(rank, num_ranks)
        return whole if rank == owner_of(self.index, self.count, num_ranks) else np.zeros_like(whole)

    def unshard(self, shards: Sequence[Array]) -> Array:
        return shards[owner_of(self.index, self.count, len(shards))]


@dataclass(frozen=True, slots=True)
class Owned:
    """Rank `index * N // count` has it, the others a tensor of length 0 along `axis`.  [TP-SHARD-4]"""

    axis: int
    index: int
    count: int

    def shard(self, whole: Array, rank: int, num_ranks: int) -> Array:
        _check_rank(rank, num_ranks)
        return whole if rank == owner_of(self.index, self.count, num_ranks) else _along(whole, self.axis, slice(0, 0))

    def unshard(self, shards: Sequence[Array]) -> Array:
        return shards[owner_of(self.index, self.count, len(shards))]


@dataclass(frozen=True, slots=True)
class Split:
    """Each part of the axis is cut by its own units; a rank's runs lie one behind the other.  [TP-SHARD-2]"""

    axis: int
    parts: tuple[Part, ...]

    def shard(self, whole: Array, rank: int, num_ranks: int) -> Array:
        extent = sum(part.num_entries for part in self.parts)
        if whole.ndim <= self.axis or whole.shape[self.axis] != extent:
            raise ShapeError(f"shard: got shape {list(whole.shape)}, expected {extent} entries along axis {self.axis}")
        pieces, start = [], 0
        for part in self.parts:
            mine = part.entries(rank, num_ranks)
            pieces.append(_along(whole, self.axis, slice(start + mine.start, start + mine.stop)))
            start += part.num_entries
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, self.axis)

    def unshard(self, shards: Sequence[Array]) -> Array:
        num_ranks, shape = len(shards), list(shards[0].shape)
        shape[self.axis] = sum(part.num_entries for part in self.parts)
        whole = np.empty(shape, shards[0].dtype)
        for rank, shard in enumerate(shards):
            start = taken = 0
            for part in self.parts:
                mine = part.entries(rank, num_ranks)
                count = mine.stop - mine.start
                there = _along(whole, self.axis, slice(start + mine.start, start + mine.stop))
                here = _along(shard, self.axis, slice(taken, taken + count))
                if here.shape != there.shape:
                    raise ShapeError(f"unshard: rank {rank}: got {list(shard.shape)}, which is too small for {self}")
                there[...] = here
                start, taken = start + part.num_entries, taken + count
            if taken != shard.shape[self.axis]:
                raise ShapeError(f"unshard: rank {rank}: got {list(shard.shape)}, expected {taken} along {self.axis}")
        return whole


def owner_of(index: int, count: int, num_ranks: int) -> int:
    """The rank that has the `index`-th of `count` whole things: runs, as even as can be. Pure."""
    return index * num_ranks // count


def _along(array: Array, axis: int, entries: slice) -> Array:
    return array[(slice(None),) * axis + (entries,)]


def _check_rank(rank: int, num_ranks: int) -> None:
    if not 0 <= rank < num_ranks:
        raise InvalidParameterError(f"shard: rank: got {rank} of {num_ranks} ranks, expected 0 to {num_ranks - 1}")
