"""The pieces of one answer, as an asynchronous iterator that cancels its request when it is given up.

Clauses: EN-STREAM-1..3 (specs/engine.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Callable

from ferrum_ref.engine.active import ActiveRequest
from ferrum_ref.types.requests import StreamChunk


class ChunkStream(AsyncIterator[StreamChunk]):
    """Pieces until the one with a finish reason.  [EN-STREAM-1..3]

    The request is cancelled when the stream is closed, when the task that waits for a piece is cancelled, and when
    nobody holds the stream any more, even if it was never iterated.
    """

    def __init__(self, active: ActiveRequest, abandon: Callable[[ActiveRequest], None]) -> None:
        self._active = active
        self._abandon = abandon
        self._ended = False
        self._give_up = weakref.finalize(self, _abandon_from_anywhere, asyncio.get_running_loop(), abandon, active)
        self._give_up.atexit = False

    def __aiter__(self) -> ChunkStream:
        return self

    async def __anext__(self) -> StreamChunk:
        """The next piece.  Raises the error that ended the request."""
        if self._ended:
            raise StopAsyncIteration
        try:
            chunk = await self._active.next_chunk()
        except BaseException:
            await self.aclose()
            raise
        if chunk.finish_reason is not None:
            self._ended = True
            self._give_up.detach()
        return chunk

    async def aclose(self) -> None:
        """Give the answer up; nothing happens when it has ended."""
        self._ended = True
        if self._give_up.detach() is not None:
            self._abandon(self._active)


def _abandon_from_anywhere(
    loop: asyncio.AbstractEventLoop, abandon: Callable[[ActiveRequest], None], active: ActiveRequest
) -> None:
    """A finaliser may run in any thread, and after the event loop is gone."""
    with contextlib.suppress(RuntimeError):  # the event loop is closed: its requests went with it
        loop.call_soon_threadsafe(abandon, active)
