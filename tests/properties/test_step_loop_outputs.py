"""A request's answer does not depend on neighbours, preemption, chunking, prefix hits or failed steps."""

from __future__ import annotations

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from ferrum_ref.engine.plan import StepPlan, StepResult
from ferrum_ref.engine.step_loop import StepLoop
from ferrum_ref.interfaces.scheduler import BatchHint
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.scheduler.continuous_batch import ContinuousBatchScheduler
from ferrum_ref.types.config import SchedulerConfig, SchedulingPolicy
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.requests import InferenceRequest
from ferrum_ref.types.sampling import FinishReason, Priority, SamplingParams

STOP = 6


class ToyModel:
    """The next token is a function of the K/V it finds in the cache: here, of the tokens stored there."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.slots = [[-1] * block_size for _ in range(num_blocks)]
        self.size = block_size

    def run(self, loop: StepLoop, plan: StepPlan) -> StepResult:
        tokens = {}
        for member in plan.sequences:
            blocks = loop.handle_of(member.request_id).block_table().physical_blocks
            end = member.num_computed_tokens + member.num_scheduled_tokens
            new = loop.tokens_of(member.request_id, member.num_computed_tokens, end)
            for position, token in enumerate(new, start=member.num_computed_tokens):
                self.slots[blocks[position // self.size]][position % self.size] = token
            if member.samples:
                cached = [self.slots[blocks[i // self.size]][i % self.size] for i in range(end)]
                tokens[member.request_id] = sum((i + 1) * (value + 3) for i, value in enumerate(cached)) % 7
        return StepResult(tokens)


def alone(prompt: list[int], max_tokens: int, context: int) -> tuple[list[int], FinishReason]:
    known = list(prompt)
    while True:
        known.append(sum((i + 1) * (value + 3) for i, value in enumerate(known)) % 7)
        if known[-1] == STOP:
            return known[len(prompt) :], FinishReason.EOS
        if len(known) == min(len(prompt) + max_tokens, context):
            return known[len(prompt) :], FinishReason.Length


@pytest.mark.clause("ST-LOOP-10", "ST-LOOP-4", "ST-LOOP-7", "KV-STEP-7")
@settings(max_examples=200)
@given(
    size=st.integers(1, 4),
    num_blocks=st.integers(3, 10),
    jobs=st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=8), st.integers(1, 12), st.sampled_from(Priority)),
        min_size=1,
        max_size=8,
    ),
    failures=st.sets(st.integers(0, 30), max_size=6),
    budget=st.integers(1, 16),
    policy=st.sampled_from([SchedulingPolicy.FCFS, SchedulingPolicy.Priority]),
)
def test_everybody_gets_the_answer_they_would_get_alone(
    size: int,
    num_blocks: int,
    jobs: list[tuple[list[int], int, Priority]],
    failures: set[int],
    budget: int,
    policy: SchedulingPolicy,
) -> None:
    context = num_blocks * size
    loop = StepLoop(
        ContinuousBatchScheduler(SchedulerConfig(policy=policy)),
        PagedKvCacheManager(num_blocks, size),
        BatchHint.of(4, budget),
    )
    model, expected = ToyModel(num_blocks, size), {}
    got: dict[RequestId, list[int]] = {}
    for prompt, max_tokens, priority in jobs:
        request = InferenceRequest.new("", "m").with_priority(priority)
        request = request.with_sampling_params(SamplingParams(max_tokens=max_tokens))
        short = prompt[: context - 1]
        loop.submit(request, short, now_s=0.0, stop_token_ids=frozenset({STOP}))
        expected[request.id] = alone(short, max_tokens, context)
        got[request.id] = []
    reasons = {}
    for attempt in range(3000):
        plan = loop.plan(0.0)
        if plan is None:
            break
        if plan.preempted:
            event("preemption")
        result = model.run(loop, plan)
        if attempt in failures:
            event("failed step")
            loop.abort(plan)
            continue
        events = loop.commit(plan, result, 0.0)
        for request_id, token in events.tokens:
            got[request_id].append(token)
        reasons.update(events.finished)
        loop.check_invariants()
    assert {request_id: (got[request_id], reasons[request_id]) for request_id in got} == expected
