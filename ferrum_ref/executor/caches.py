"""What an executor knows of the caches it writes: whose they are, how far they are filled, how they grow and shrink.

Clauses: MX-HANDLE-1..4, MX-TRUNCATE-2..4 (specs/model_executor.md).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from ferrum_ref.errors import InvalidParameterError, ModelError, NotFoundError, UnsupportedError
from ferrum_ref.interfaces.kv_cache import AllocationRequest, CacheManagerStats, KvCacheHandle
from ferrum_ref.types.ids import RequestId


class CacheLender(Protocol):
    """What is needed of a KV-cache manager: its synchronous core."""

    def allocate_now(self, request: AllocationRequest) -> KvCacheHandle:
        """See `KvCacheManager.allocate`."""

    def extend_now(self, handle: KvCacheHandle, additional_tokens: int) -> None:
        """See `KvCacheManager.extend`."""

    def deallocate_now(self, request_id: RequestId) -> None:
        """See `KvCacheManager.deallocate`."""

    def stats(self) -> CacheManagerStats:
        """See `KvCacheManager.stats`."""


@runtime_checkable
class CacheFinder(Protocol):
    """A lender that knows its handles; others cannot tell a foreign one."""

    def find_cache(self, cache_id: str) -> KvCacheHandle | None:
        """The live handle with this cache id, or None."""

    def list_handles(self) -> list[tuple[RequestId, KvCacheHandle]]:
        """All live handles."""


@runtime_checkable
class CacheRollback(Protocol):
    """A lender that takes tokens back."""

    def truncate_now(self, handle: KvCacheHandle, new_len: int) -> None:
        """Account for `new_len` tokens only; blocks wholly behind them go back.  Mutates handle and manager."""


@dataclass(slots=True)
class _Entry:
    """One known cache: its handle (weakly: a fork is freed when nobody holds it) and the tokens written to it."""

    handle: Callable[[], object | None]
    num_written: int | None = None
    request_id: RequestId | None = None


class CacheLedger:
    """Caches by id. A handle is known only as the very object that was seen under its id.  [MX-HANDLE-1; D-83]"""

    def __init__(self, lender: CacheLender | None, template: AllocationRequest) -> None:
        """`template` describes the model's K/V; its request id and initial tokens are replaced on each use."""
        self.lender = lender
        offered: object = lender
        self._finder = offered if isinstance(offered, CacheFinder) else None
        self._rollback = offered if isinstance(offered, CacheRollback) else None
        self._template = template
        self._entries: dict[str, _Entry] = {}

    def require(self, operation: str, handle: KvCacheHandle) -> None:
        """Raises NotFoundError unless the handle is live and, as far as the lender can tell, its own."""
        if not handle.is_valid():
            raise NotFoundError(f"{operation}: cache {handle.cache_id()} was freed; prefill a new one")
        entry = self._entries.get(handle.cache_id())
        if entry is not None and entry.handle() is handle:
            return
        if self._finder is not None and self._finder.find_cache(handle.cache_id()) is not handle:
            raise NotFoundError(
                f"{operation}: cache {handle.cache_id()} belongs to another manager than this executor's;"
                " allocate it there, or let prefill allocate one"
            )
        self._entries[handle.cache_id()] = _Entry(self._reference(handle))

    def num_cached(self, handle: KvCacheHandle) -> int | None:
        """Tokens this executor has written to it; None for a cache it has not written. Pure."""
        entry = self._entries.get(handle.cache_id())
        return entry.num_written if entry is not None and entry.handle() is handle else None

    def wrote(self, handle: KvCacheHandle, num_tokens: int) -> None:
        """The cache now holds `num_tokens` tokens."""
        self._entries[handle.cache_id()].num_written = num_tokens

    def allocate(self, operation: str, num_tokens: int) -> KvCacheHandle:
        """A cache of its own, for `num_tokens`.  Raises UnsupportedError, ResourceExhaustedError."""
        request = replace(self._template, request_id=RequestId.new(), initial_tokens=num_tokens)
        handle = self.require_lender(operation).allocate_now(request)
        self._entries[handle.cache_id()] = _Entry(self._reference(handle), None, request.request_id)
        return handle

    def release(self, cache_id: str) -> None:
        """Forget a cache; free it if it was allocated here. An unknown id is no error.  [MX-PREFILL-5]"""
        entry = self._entries.pop(cache_id, None)
        if entry is not None and entry.request_id is not None:
            self.require_lender("release_cache").deallocate_now(entry.request_id)

    def require_own_blocks(self, operation: str, handle: KvCacheHandle, start: int) -> None:
        """Nothing may be overwritten that another live cache can read.  [MX-HANDLE-3]

        Positions at or behind the accounted length are the lender's to make writable; those before it are refused
        here (ModelError) when a block of theirs is in another handle's table.
        """
        table = handle.block_table()
        if start >= table.sequence_length or self._finder is None:
            return
        touched = set(table.physical_blocks[start // table.block_size :])
        for _, other in self._finder.list_handles():
            if other is not handle and not touched.isdisjoint(other.block_table().physical_blocks):
                raise ModelError(
                    f"{operation}: writing {handle.cache_id()} from position {start} on would overwrite blocks that"
                    f" {other.cache_id()} shares; go on from position {table.sequence_length}, or truncate it first"
                )

    def grow(self, operation: str, handles: Sequence[KvCacheHandle], ends: Sequence[int]) -> Callable[[], None]:
        """Account for `ends[i]` tokens in each; all or nothing where the lender can roll back.  [MX-HANDLE-4]

        Returns what undoes it.  Raises ResourceExhaustedError, UnsupportedError.
        """
        grown: list[tuple[KvCacheHandle, int]] = []

        def undo() -> None:
            if self._rollback is not None:
                for handle, before in reversed(grown):
                    self._rollback.truncate_now(handle, before)
            grown.clear()

        try:
            for handle, end in zip(handles, ends, strict=True):
                before = handle.num_tokens()
                if end > before:
                    self.require_lender(operation).extend_now(handle, end - before)
                    grown.append((handle, before))
        except BaseException:
            undo()
            raise
        return undo

    def can_truncate(self) -> bool:
        """Does the lender take tokens back. Pure."""
        return self._rollback is not None

    def truncate(self, handle: KvCacheHandle, new_len: int) -> None:
        """Forget the tokens from `new_len` on.  [MX-TRUNCATE-2..4]

        Raises NotFoundError, InvalidParameterError outside [0, cached], UnsupportedError (lender cannot).
        """
        self.require("truncate_kv", handle)
        written = self.num_cached(handle)
        cached = handle.num_tokens() if written is None else written
        if not 0 <= new_len <= cached:
            raise InvalidParameterError(
                f"truncate_kv: {handle.cache_id()} holds {cached} tokens, got new_len {new_len}; expected 0 to {cached}"
            )
        if self._rollback is not None:
            self._rollback.truncate_now(handle, new_len)
        elif new_len < cached:
            raise UnsupportedError(
                f"truncate_kv: the KV-cache manager of this executor takes no tokens back; {handle.cache_id()} keeps"
                f" its {cached}; use a manager with truncate_now, or release the cache and prefill again"
            )
        self.wrote(handle, new_len)

    def require_lender(self, operation: str) -> CacheLender:
        """Raises UnsupportedError without one."""
        if self.lender is None:
            raise UnsupportedError(
                f"{operation}: this executor has no KV-cache manager; give it one, or use unified_decode"
            )
        return self.lender

    def _reference(self, handle: KvCacheHandle) -> Callable[[], Any]:
        """A weak reference whose death drops the entry; a strong one where the class allows no other."""
        cache_id = handle.cache_id()

        def forget(dead: object) -> None:
            entry = self._entries.get(cache_id)
            if entry is not None and entry.handle is dead and entry.request_id is None:
                del self._entries[cache_id]

        try:
            return weakref.ref(handle, forget)
        except TypeError:
            return lambda: handle
