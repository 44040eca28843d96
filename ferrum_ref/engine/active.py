"""One request while the engine works on it: what came out, and the pieces not yet fetched.

Clauses: EN-ANSWER-1..4 (specs/engine.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Any

from ferrum_ref.engine.admission import Admitted
from ferrum_ref.engine.text import AnswerText
from ferrum_ref.errors import FerrumError
from ferrum_ref.types.ids import TokenId
from ferrum_ref.types.models import TokenUsage
from ferrum_ref.types.requests import InferenceResponse, StreamChunk
from ferrum_ref.types.sampling import FinishReason


class ActiveRequest:
    """A request from its admission to its last piece.  [EN-ANSWER-1..4; D-27]"""

    def __init__(
        self,
        admitted: Admitted,
        text: AnswerText,
        submitted_at_s: float,
        wall_clock: Callable[[], datetime],
    ) -> None:
        self.request = admitted.request
        self.id = admitted.request.id
        self.num_prompt_tokens = len(admitted.prompt_token_ids)
        self.chooser = admitted.chooser
        self.tokens: list[TokenId] = []
        self.submitted_at_s = submitted_at_s
        self.started_at_s: float | None = None
        self.first_token_at_s: float | None = None
        self.ended_at_s: float | None = None
        self.finish_reason: FinishReason | None = None
        self.num_preemptions = 0
        self._text = text
        self._end_token_ids = admitted.end_token_ids
        self._stop_token_ids = admitted.stop_token_ids()
        self._wall_clock = wall_clock
        self._outbox: asyncio.Queue[StreamChunk | FerrumError] = asyncio.Queue()

    def push(self, token: int, now_s: float) -> bool:
        """Take one token; True when a stop string is complete with it.  [EN-ANSWER-1]"""
        if self.first_token_at_s is None:
            self.first_token_at_s = now_s
        self.tokens.append(TokenId(token))
        piece = "" if token in self._stop_token_ids else self._text.feed(token)
        self._outbox.put_nowait(self._chunk(piece, self.tokens[-1], None, None))
        return self._text.matched is not None

    def end(self, reason: FinishReason, now_s: float) -> None:
        """Close the answer: its last piece carries what text is left, the reason and the usage.  [EN-ANSWER-2..3]"""
        rest = self._text.finish()
        by_own_id = reason is FinishReason.EOS and self.tokens[-1] not in self._end_token_ids
        if by_own_id or self._text.matched is not None:
            reason = FinishReason.Stop
        self.finish_reason, self.ended_at_s = reason, now_s
        self._outbox.put_nowait(self._chunk(rest, None, reason, self.usage()))

    def fail(self, error: FerrumError, now_s: float) -> None:
        """Close the answer with an error; it is raised where the pieces are fetched."""
        self.finish_reason, self.ended_at_s = FinishReason.Error, now_s
        self._outbox.put_nowait(error)

    async def next_chunk(self) -> StreamChunk:
        """The next piece, awaited.  Raises the error that ended the request."""
        item = await self._outbox.get()
        if isinstance(item, FerrumError):
            raise item
        return item

    def usage(self) -> TokenUsage:
        return TokenUsage.new(self.num_prompt_tokens, len(self.tokens))

    def response(self) -> InferenceResponse:
        """The whole answer, once it has ended.  Pure.  [EN-ANSWER-3..4]"""
        return InferenceResponse(
            request_id=self.id,
            text=self._text.text(),
            tokens=list(self.tokens),
            finish_reason=self.finish_reason or FinishReason.Error,
            usage=self.usage(),
            latency_ms=round(1e3 * ((self.ended_at_s or self.submitted_at_s) - self.submitted_at_s)),
            created_at=self._wall_clock(),
            metadata=self._timings(),
        )

    def _chunk(
        self, text: str, token: TokenId | None, reason: FinishReason | None, usage: TokenUsage | None
    ) -> StreamChunk:
        metadata = self._timings() if reason is not None else {}
        return StreamChunk(self.id, text, token, reason, usage, self._wall_clock(), metadata)

    def _timings(self) -> dict[str, Any]:
        def since_submission_ms(moment_s: float | None) -> float | None:
            return None if moment_s is None else 1e3 * (moment_s - self.submitted_at_s)

        return {
            "queue_time_ms": since_submission_ms(self.started_at_s),
            "time_to_first_token_ms": since_submission_ms(self.first_token_at_s),
            "total_time_ms": since_submission_ms(self.ended_at_s),
            "num_preemptions": self.num_preemptions,
            "stop_sequence": self._text.matched,
        }
