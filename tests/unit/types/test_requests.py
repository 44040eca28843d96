"""Requests, batches of requests and their progress."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.types.ids import BatchId, ClientId, ModelId, RequestId, SessionId
from ferrum_ref.types.requests import BatchRequest, InferenceRequest, RequestState, ScheduledRequest
from ferrum_ref.types.sampling import Priority, SamplingParams

WHEN = datetime(2026, 1, 2, tzinfo=UTC)


def a_request(max_tokens: int = 5) -> InferenceRequest:
    key = RequestId.new(np.random.default_rng(0))
    request = InferenceRequest.new("Hello", "m", request_id=key, created_at=WHEN)
    return request.with_sampling_params(SamplingParams(max_tokens=max_tokens))


@pytest.mark.clause("TY-REQUEST-1")
def test_a_new_request() -> None:
    request = InferenceRequest.new("Hello", "m", request_id=RequestId.new(np.random.default_rng(0)), created_at=WHEN)
    assert request == InferenceRequest.new("Hello", ModelId("m"), request_id=request.id, created_at=WHEN)
    assert (request.prompt, request.model_id, request.created_at) == ("Hello", ModelId("m"), WHEN)
    assert request.sampling_params == SamplingParams()
    assert (request.stream, request.priority, request.client_id, request.session_id, request.metadata) == (
        False, Priority.Normal, None, None, {},
    )  # fmt: skip
    assert InferenceRequest.new("a", "m").created_at.tzinfo is UTC
    assert InferenceRequest.new("a", "m").id != InferenceRequest.new("a", "m").id


@pytest.mark.clause("TY-REQUEST-2")
def test_builders_leave_the_original_alone() -> None:
    request = a_request()
    session = SessionId.new()
    changed = (
        request.with_stream(True).with_priority(Priority.High).with_client_id("c").with_session_id(session)
        .with_metadata("a", 1).with_metadata("b", [2])
    )  # fmt: skip
    assert changed.metadata == {"a": 1, "b": [2]}
    assert (changed.stream, changed.priority) == (True, Priority.High)
    assert (changed.client_id, changed.session_id) == (ClientId("c"), session)
    assert changed.id == request.id
    assert request == a_request()
    assert request.metadata == {}


@pytest.mark.clause("TY-REQUEST-3")
def test_a_batch_is_as_long_as_its_most_demanding_member() -> None:
    batch = BatchRequest.new([a_request(5), a_request(70), a_request(6)], batch_id=BatchId.new(), created_at=WHEN)
    assert (batch.max_sequence_length, batch.size(), batch.is_empty()) == (70, 3, False)
    empty = BatchRequest.new([])
    assert (empty.max_sequence_length, empty.size(), empty.is_empty()) == (512, 0, True)


@pytest.mark.clause("TY-REQUEST-4")
def test_progress_is_set_not_added() -> None:
    scheduled = ScheduledRequest.new(a_request())
    assert (scheduled.state, scheduled.allocated_blocks, scheduled.tokens_processed) == (RequestState.Waiting, [], 0)
    scheduled.update_progress(7)
    scheduled.update_progress(3)
    scheduled.add_blocks([1, 2])
    scheduled.add_blocks([9])
    scheduled.set_state(RequestState.Running)
    assert (scheduled.state, scheduled.allocated_blocks, scheduled.tokens_processed) == (
        RequestState.Running, [1, 2, 9], 3,
    )  # fmt: skip


@pytest.mark.clause("TY-REQUEST-4")
def test_progress_is_a_count() -> None:
    scheduled = ScheduledRequest.new(a_request())
    with pytest.raises(InvalidParameterError, match="tokens_processed"):
        scheduled.update_progress(-1)
    assert scheduled.tokens_processed == 0
    with pytest.raises(TypeError, match="required positional"):
        ScheduledRequest(a_request())  # type: ignore[call-arg]
