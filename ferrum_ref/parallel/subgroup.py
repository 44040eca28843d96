"""Groups made of others: some ranks of a larger group, and one rank by itself.

    grid of T tensor-parallel ranks by P stages:  rank = stage * T + shard
    peers  = Subgroup(world, range(stage * T, stage * T + T));     stages = Subgroup(world, range(shard, T * P, T))

Clauses: TP-COLL-6, TP-PIPE-4 (specs/parallel.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.collectives import Collectives, Floats


class Subgroup(Collectives):
    """Some ranks of a group, renumbered; what they say passes through their first.  [TP-COLL-6]"""

    def __init__(self, world: Collectives, members: Sequence[int]) -> None:
        """Raises InvalidParameterError unless `members` are different ranks of `world`, this one among them."""
        self._world = world
        self._members = tuple(members)
        known = set(self._members)
        if len(known) < len(self._members) or world.rank not in known or not known <= set(range(world.num_ranks)):
            raise InvalidParameterError(
                f"Subgroup: members: got {list(self._members)}, expected different ranks of {world.num_ranks}, "
                f"rank {world.rank} among them"
            )

    @property
    def rank(self) -> int:
        return self._members.index(self._world.rank)

    @property
    def num_ranks(self) -> int:
        return len(self._members)

    def all_gather(self, values: Floats) -> list[Floats]:
        world, first, others = self._world, self._members[0], self._members[1:]
        if world.rank != first:
            world.send(values, first)
            return list(world.recv((self.num_ranks, *values.shape), first))
        found = [np.array(values, np.float32), *(world.recv(values.shape, other) for other in others)]
        for other in others:
            world.send(np.stack(found), other)
        return found

    def send(self, values: Floats, to: int) -> None:
        self._world.send(values, self._other("send", to))

    def recv(self, shape: tuple[int, ...], source: int) -> Floats:
        return self._world.recv(shape, self._other("recv", source))

    def barrier(self) -> None:
        self.all_gather(np.zeros(1, np.float32))

    def close(self) -> None:
        """The world stays open: it is its owner's to close."""

    def _other(self, operation: str, rank: int) -> int:
        if rank == self.rank or not 0 <= rank < self.num_ranks:
            raise InvalidParameterError(
                f"{operation}: rank: got {rank}, expected another one than {self.rank} of {self.num_ranks}"
            )
        return self._members[rank]


class Alone(Collectives):
    """A group of one."""

    @property
    def rank(self) -> int:
        return 0

    @property
    def num_ranks(self) -> int:
        return 1

    def all_gather(self, values: Floats) -> list[Floats]:
        return [np.array(values, np.float32)]

    def send(self, values: Floats, to: int) -> None:
        raise InvalidParameterError(f"send: rank: got {to}, but this rank is alone")

    def recv(self, shape: tuple[int, ...], source: int) -> Floats:
        raise InvalidParameterError(f"recv: rank: got {source}, but this rank is alone")

    def barrier(self) -> None:
        """Nobody to wait for."""

    def close(self) -> None:
        """Nothing to give back."""


ALONE: Final = Alone()


def grid(world: Collectives, num_shards: int) -> tuple[Collectives, Collectives]:
    """(peers, stages) of this rank in a grid of `num_shards` by as many stages as that leaves.  Pure.  [TP-PIPE-4]

    Raises InvalidParameterError, naming both numbers, if the world's ranks do not divide by `num_shards`.
    """
    if num_shards < 1 or world.num_ranks % num_shards:
        raise InvalidParameterError(
            f"parallel: num_shards: got {num_shards} for {world.num_ranks} ranks, expected a divisor"
        )
    stage, shard = divmod(world.rank, num_shards)
    peers = Subgroup(world, range(stage * num_shards, (stage + 1) * num_shards))
    return peers, Subgroup(world, range(shard, world.num_ranks, num_shards))
