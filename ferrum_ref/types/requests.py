"""Requests for generation, their answers, and the pieces of a streamed answer.

Upstream: `ferrum_types::requests`.  Clauses: TY-REQUEST-1..4 (specs/types.md).
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from datetime import UTC, datetime

from ferrum_ref.types.ids import BatchId, BlockId, ClientId, ModelId, RequestId, SessionId, TokenId
from ferrum_ref.types.models import TokenUsage
from ferrum_ref.types.record import U64, Json, Record, Usize, check_unsigned
from ferrum_ref.types.sampling import FinishReason, Priority, SamplingParams


class RequestState(enum.Enum):
    """Where a request stands in its life."""

    Waiting = "Waiting"
    Running = "Running"
    Preempted = "Preempted"
    Completed = "Completed"
    Failed = "Failed"
    Cancelled = "Cancelled"


@dataclass(frozen=True, slots=True)
class InferenceRequest(Record):
    """One request for text; the `with_*` methods return changed copies.  [TY-REQUEST-1..2]"""

    id: RequestId
    prompt: str
    model_id: ModelId
    sampling_params: SamplingParams
    stream: bool
    priority: Priority
    client_id: ClientId | None
    session_id: SessionId | None
    created_at: datetime
    metadata: dict[str, Json]

    @staticmethod
    def new(
        prompt: str,
        model_id: ModelId | str,
        *,
        request_id: RequestId | None = None,
        created_at: datetime | None = None,
    ) -> InferenceRequest:
        """A request with default parameters, Normal priority, no streaming.  [TY-REQUEST-1; D-79]

        A random id and the wall clock are used only where `request_id` and `created_at` are not given.
        """
        return InferenceRequest(
            id=RequestId.new() if request_id is None else request_id,
            prompt=prompt,
            model_id=ModelId.from_value(model_id),
            sampling_params=SamplingParams(),
            stream=False,
            priority=Priority.Normal,
            client_id=None,
            session_id=None,
            created_at=datetime.now(UTC) if created_at is None else created_at,
            metadata={},
        )

    def with_sampling_params(self, params: SamplingParams) -> InferenceRequest:
        return dataclasses.replace(self, sampling_params=params)

    def with_stream(self, stream: bool) -> InferenceRequest:
        return dataclasses.replace(self, stream=stream)

    def with_priority(self, priority: Priority) -> InferenceRequest:
        return dataclasses.replace(self, priority=priority)

    def with_client_id(self, client_id: ClientId | str) -> InferenceRequest:
        return dataclasses.replace(self, client_id=ClientId.from_value(client_id))

    def with_session_id(self, session_id: SessionId) -> InferenceRequest:
        return dataclasses.replace(self, session_id=session_id)

    def with_metadata(self, key: str, value: Json) -> InferenceRequest:
        """A copy whose metadata also maps `key` to `value`; the original's stays as it was.  [TY-REQUEST-2]"""
        return dataclasses.replace(self, metadata={**self.metadata, key: value})


@dataclass(frozen=True, slots=True)
class InferenceResponse(Record):
    """A finished answer."""

    request_id: RequestId
    text: str
    tokens: list[TokenId]
    finish_reason: FinishReason
    usage: TokenUsage
    latency_ms: U64
    created_at: datetime
    metadata: dict[str, Json]


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """One piece of a streamed answer; finish_reason and usage come with the last piece only."""

    request_id: RequestId
    text: str
    token: TokenId | None
    finish_reason: FinishReason | None
    usage: TokenUsage | None
    created_at: datetime
    metadata: dict[str, Json]


@dataclass(frozen=True, slots=True)
class BatchRequest(Record):
    """Requests that are handled together."""

    batch_id: BatchId
    requests: list[InferenceRequest]
    max_sequence_length: Usize
    created_at: datetime

    @staticmethod
    def new(
        requests: list[InferenceRequest], *, batch_id: BatchId | None = None, created_at: datetime | None = None
    ) -> BatchRequest:
        """max_sequence_length is the members' largest `max_tokens` (prompts ignored), 512 for none.  [TY-REQUEST-3]"""
        return BatchRequest(
            batch_id=BatchId.new() if batch_id is None else batch_id,
            requests=requests,
            max_sequence_length=max((r.sampling_params.max_tokens for r in requests), default=512),
            created_at=datetime.now(UTC) if created_at is None else created_at,
        )

    def size(self) -> int:
        return len(self.requests)

    def is_empty(self) -> bool:
        return not self.requests


@dataclass(slots=True)
class ScheduledRequest(Record):
    """A request and how far it has come; mutable, and never serialised.  [TY-REQUEST-4]"""

    request: InferenceRequest
    state: RequestState
    allocated_blocks: list[BlockId]
    tokens_processed: Usize
    estimated_completion: datetime | None

    @staticmethod
    def new(request: InferenceRequest) -> ScheduledRequest:
        """Waiting, with nothing allocated."""
        return ScheduledRequest(request, RequestState.Waiting, [], 0, None)

    def set_state(self, state: RequestState) -> None:
        self.state = state

    def add_blocks(self, blocks: list[BlockId]) -> None:
        self.allocated_blocks.extend(blocks)

    def update_progress(self, tokens_processed: int) -> None:
        """Set (not add to) the number of tokens processed.  Raises InvalidParameterError for a negative count."""
        self.tokens_processed = check_unsigned(tokens_processed, 2**64, "ScheduledRequest", "tokens_processed")
