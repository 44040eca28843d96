"""Prefix cache: which block holds which beginning of a text, by chained digests of full blocks.

    digest[i] = blake2b-128(digest[i-1] || little-endian int64 ids of block i),   digest[-1] = 16 zero bytes

A digest thus names the whole text up to the end of its block, and is the same in every process.
Clauses: KV-PREFIX-1..4 (specs/kv_cache.md).
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b

from ferrum_ref.errors import InternalError

DIGEST_BYTES = 16
ROOT_DIGEST = bytes(DIGEST_BYTES)
Eviction = tuple[int, bytes, "int | tuple[int, ...]"]  # (block, its digest, the digest's holders before)


def extend_digests(digests: list[bytes], tokens: array[int], num_blocks: int, block_size: int) -> None:
    """Grow the chain to `num_blocks` full blocks of `tokens` (int64). Mutates digests.  [KV-PREFIX-1]"""
    first = len(digests)
    if first >= num_blocks:
        return
    ids = tokens[first * block_size : num_blocks * block_size]
    if sys.byteorder == "big":
        ids.byteswap()
    data = ids.tobytes()
    parent = digests[-1] if digests else ROOT_DIGEST
    stride = block_size * 8
    for start in range(0, len(data), stride):
        parent = blake2b(parent + data[start : start + stride], digest_size=DIGEST_BYTES).digest()
        digests.append(parent)


class PrefixIndex:
    """digest -> the blocks that hold it, oldest first; block -> its digest.  [KV-PREFIX-2..4]

    Several blocks may hold one digest (equal prompts computed side by side); the oldest answers.
    """

    __slots__ = ("_digest_of", "_holders", "num_evictions")

    def __init__(self) -> None:
        self._holders: dict[bytes, int | tuple[int, ...]] = {}
        self._digest_of: dict[int, bytes] = {}
        self.num_evictions = 0

    def __len__(self) -> int:
        return len(self._digest_of)

    def find(self, digest: bytes) -> int | None:
        """The oldest block with this digest, or None. Pure."""
        holders = self._holders.get(digest)
        return holders[0] if isinstance(holders, tuple) else holders

    def holders(self, digest: bytes) -> tuple[int, ...]:
        """All blocks with this digest, oldest first. Pure."""
        holders = self._holders.get(digest, ())
        return holders if isinstance(holders, tuple) else (holders,)

    def digest_of(self, block: int) -> bytes | None:
        """The digest a block is findable by, or None. Pure."""
        return self._digest_of.get(block)

    def register(self, block: int, digest: bytes) -> None:
        """Make a block findable. Mutates the index."""
        self._digest_of[block] = digest
        holders = self._holders.get(digest)
        if holders is None:
            self._holders[digest] = block
        elif isinstance(holders, tuple):
            self._holders[digest] = (*holders, block)
        else:
            self._holders[digest] = (holders, block)

    def evict(self, blocks: Sequence[int]) -> list[Eviction]:
        """Forget blocks that are about to be overwritten; what `restore` needs. Mutates the index."""
        evicted: list[Eviction] = []
        for block in blocks:
            digest = self._digest_of.pop(block, None)
            if digest is None:
                continue
            before = self._holders[digest]
            evicted.append((block, digest, before))
            if isinstance(before, tuple):
                left = tuple(holder for holder in before if holder != block)
                self._holders[digest] = left if len(left) > 1 else left[0]
            else:
                del self._holders[digest]
        self.num_evictions += len(evicted)
        return evicted

    def restore(self, evicted: Sequence[Eviction]) -> None:
        """Take an `evict` back exactly; nothing else may have changed since. Mutates the index."""
        for block, digest, before in reversed(evicted):
            self._digest_of[block] = digest
            self._holders[digest] = before
        self.num_evictions -= len(evicted)

    def check(self) -> None:
        """Raises InternalError unless both directions agree.  [KV-POOL-6]"""
        listed = {block: digest for digest in self._holders for block in self.holders(digest)}
        if listed != self._digest_of:
            raise InternalError("PrefixIndex invariant broken: digests and their holders differ")

    def state(self) -> list[tuple[bytes, tuple[int, ...]]]:
        """(digest, holders) sorted by digest. Pure."""
        return [(digest, self.holders(digest)) for digest in sorted(self._holders)]
