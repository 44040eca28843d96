"""Queue policies and the waiting queue."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InternalError, UnsupportedError
from ferrum_ref.interfaces.scheduler import SchedulingPolicy as InterfacePolicy
from ferrum_ref.interfaces.step import SequenceState
from ferrum_ref.scheduler.policy import FcfsPolicy, PriorityPolicy, make_policy
from ferrum_ref.scheduler.waiting import WaitingQueue
from ferrum_ref.types.config import SchedulingPolicy
from ferrum_ref.types.requests import InferenceRequest
from ferrum_ref.types.sampling import Priority


def sequence_of(arrival_number: int, priority: Priority = Priority.Normal) -> SequenceState:
    request = InferenceRequest.new("", "m").with_priority(priority)
    sequence = SequenceState(request, array("q"), 1, 10, frozenset(), 0.0)
    sequence.arrival_number = arrival_number
    return sequence


@pytest.mark.clause("SC-POLICY-3")
def test_known_policies_and_no_silent_fallback() -> None:
    for policy in (SchedulingPolicy.FCFS, SchedulingPolicy.ContinuousBatch, InterfacePolicy.FCFS):
        assert isinstance(make_policy(policy), FcfsPolicy)
    for policy in (SchedulingPolicy.Priority, InterfacePolicy.Priority):
        assert isinstance(make_policy(policy), PriorityPolicy)
    for policy in (
        SchedulingPolicy.SJF,
        SchedulingPolicy.FairShare,
        SchedulingPolicy.RoundRobin,
        InterfacePolicy.ResourceAware,
        InterfacePolicy.SlaAware,
    ):
        with pytest.raises(UnsupportedError, match=policy.value):
            make_policy(policy)


@pytest.mark.clause("SC-POLICY-1", "SC-POLICY-2", "SC-POLICY-4")
def test_keys_order_by_policy_and_end_in_the_arrival() -> None:
    early_low, late_low = sequence_of(0, Priority.Low), sequence_of(2, Priority.Low)
    late_high = sequence_of(1, Priority.High)
    trio = [late_low, late_high, early_low]
    assert sorted(trio, key=FcfsPolicy().key) == [early_low, late_high, late_low]
    assert sorted(trio, key=PriorityPolicy().key) == [late_high, early_low, late_low]
    assert (FcfsPolicy().name, PriorityPolicy().name) == ("fcfs", "priority")


@pytest.mark.clause("SC-QUEUE-1", "SC-QUEUE-2")
@given(st.lists(st.tuples(st.sampled_from(["push", "remove", "pop", "raise"]), st.integers(0, 9)), max_size=60))
def test_the_queue_is_a_sorted_list(steps: list[tuple[str, int]]) -> None:
    policy = PriorityPolicy()
    queue, model = WaitingQueue(policy), []
    for number, (step, pick) in enumerate(steps):
        chosen = model[pick % len(model)] if model else None
        if step == "push":
            sequence = sequence_of(number, Priority(pick % 4))
            queue.push(sequence)
            model.append(sequence)
        elif step == "remove" and chosen is not None:
            queue.remove(chosen)
            model.remove(chosen)
        elif step == "raise" and chosen is not None:
            queue.remove(chosen)
            chosen.priority = Priority(pick % 4)
            queue.push(chosen)
        elif step == "pop" and chosen is not None:
            first = queue.peek()
            assert first is not None
            queue.remove(first)
            model.remove(first)
        model.sort(key=policy.key)
        assert list(queue) == model
        assert queue.peek() is (model[0] if model else None)
        assert queue.num_live == len(model)
        assert [queue.position(sequence) for sequence in model] == list(range(len(model)))


@pytest.mark.clause("SC-STEP-8")
def test_a_request_is_queued_once() -> None:
    queue, sequence = WaitingQueue(FcfsPolicy()), sequence_of(0)
    with pytest.raises(InternalError):
        queue.remove(sequence)
    assert queue.position(sequence) is None
    queue.push(sequence)
    with pytest.raises(InternalError):
        queue.push(sequence)


@pytest.mark.clause("SC-QUEUE-1")
def test_dead_entries_do_not_pile_up() -> None:
    queue = WaitingQueue(FcfsPolicy())
    queue.push(sequence_of(0))
    for number in range(1, 2000):
        sequence = sequence_of(number)
        queue.push(sequence)
        queue.remove(sequence)
    assert len(queue._heap) < 100
