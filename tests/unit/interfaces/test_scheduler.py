"""Batch hints, batch plans, scheduled requests, and the contract's default methods."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.scheduler import (
    BatchHint,
    BatchPlan,
    BatchResourceRequirements,
    ResourceConstraints,
    ScheduledRequest,
    Scheduler,
)
from ferrum_ref.scheduler.continuous_batch import ContinuousBatchScheduler
from ferrum_ref.types.ids import BatchId, RequestId
from ferrum_ref.types.requests import InferenceRequest, RequestState
from ferrum_ref.types.sampling import Priority, SamplingParams

AT = datetime(2026, 1, 1, tzinfo=UTC)


def plan_of(*requests: InferenceRequest) -> BatchPlan:
    members = [ScheduledRequest.new(request, AT) for request in requests]
    needs = BatchResourceRequirements(0, 0, 0, 0)
    return BatchPlan(BatchId.new(), members, 0, None, needs, AT, {request.id: 3 for request in requests})


@pytest.mark.clause("SC-HINT-1")
def test_simple_hint_is_2048_tokens_a_request() -> None:
    hint = BatchHint.simple(4)
    assert (hint.max_batch_size, hint.max_tokens) == (4, 8192)
    assert (hint.target_latency_ms, hint.available_memory) == (None, None)
    assert hint.resource_constraints == ResourceConstraints()


@pytest.mark.clause("SC-PLAN-1", "SC-PLAN-2")
def test_generation_budget_and_scheduled_tokens_are_two_things() -> None:
    params = SamplingParams(max_tokens=100)
    plan = plan_of(*(InferenceRequest.new("x", "m").with_sampling_params(params) for _ in range(2)))
    assert plan.total_tokens() == 200
    assert plan.num_scheduled_tokens() == 6
    assert (plan.size(), plan.is_empty()) == (2, False)


@pytest.mark.clause("SC-PLAN-3")
def test_highest_priority_of_nobody_is_low() -> None:
    low = InferenceRequest.new("x", "m").with_priority(Priority.Low)
    high = InferenceRequest.new("x", "m").with_priority(Priority.High)
    assert plan_of().max_priority() is Priority.Low
    assert plan_of(low).max_priority() is Priority.Low
    assert plan_of(low, high).max_priority() is Priority.High


@pytest.mark.clause("SC-QUEUE-2")
def test_ages_are_never_negative() -> None:
    record = ScheduledRequest.new(InferenceRequest.new("x", "m"), AT)
    assert record.state is RequestState.Waiting
    assert record.queue_position is None
    assert record.age(AT + timedelta(seconds=2)) == timedelta(seconds=2)
    assert record.age(AT - timedelta(seconds=2)) == timedelta(0)
    assert record.processing_time(AT) is None
    record.started_at = AT
    assert record.processing_time(AT + timedelta(seconds=1)) == timedelta(seconds=1)
    assert record.age() > timedelta(0)


@pytest.mark.clause("SC-CONTRACT-7")
def test_preempt_and_resume_are_optional() -> None:
    scheduler = ContinuousBatchScheduler()
    for method in (Scheduler.preempt, Scheduler.resume):
        with pytest.raises(UnsupportedError):
            asyncio.run(method(scheduler, RequestId.new()))
    assert Scheduler.request_state(scheduler, RequestId.new()) is None
