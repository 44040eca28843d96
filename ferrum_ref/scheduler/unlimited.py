"""A cache without limits: what the scheduler plans against when nobody gave it blocks.  Clauses: SC-CONTRACT-2."""

from __future__ import annotations

from collections.abc import Sequence

from ferrum_ref.interfaces.kv_cache import BlockTable
from ferrum_ref.interfaces.step import SequenceState


class UnlimitedHandle:
    """Every position may be written."""

    __slots__ = ("num_registered_blocks", "table", "writable_tokens")

    def __init__(self) -> None:
        self.table = BlockTable.new(1)
        self.writable_tokens = 2**63
        self.num_registered_blocks = 0


class UnlimitedCache:
    """Admits and grows everything, caches nothing. The part of `StepCache` that deciding a step needs."""

    block_size = 1

    def match_prefix(self, sequence: SequenceState) -> Sequence[int]:
        return ()

    def admit(self, sequence: SequenceState, hits: Sequence[int], num_tokens: int) -> bool:
        sequence.handle = UnlimitedHandle()
        return True

    def grow(self, sequence: SequenceState, num_tokens: int) -> bool:
        return True

    def release(self, sequence: SequenceState) -> None:
        sequence.handle = None
