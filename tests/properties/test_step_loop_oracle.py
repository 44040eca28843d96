"""The step loop against a second, naive scheduler written from the stated semantics alone: lists and tuples."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from ferrum_ref.engine.plan import StepResult
from ferrum_ref.engine.step_loop import StepLoop
from ferrum_ref.interfaces.scheduler import BatchHint
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.scheduler.continuous_batch import ContinuousBatchScheduler
from ferrum_ref.types.config import SchedulerConfig, SchedulingPolicy
from ferrum_ref.types.requests import InferenceRequest
from ferrum_ref.types.sampling import Priority, SamplingParams


@dataclass
class Job:
    """One request of a scenario and, in the naive model, its state."""

    number: int
    arrives_at_step: int
    prompt: tuple[int, ...]
    max_tokens: int
    priority: int
    known: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass
class Setting:
    num_blocks: int
    block_size: int
    max_seqs: int
    budget: int
    chunk: int | None
    by_priority: bool
    caching: bool


class NaiveServer:
    """Running list, waiting list, list of free blocks in order of last use, and the text each block holds."""

    def __init__(self, setting: Setting) -> None:
        self.s = setting
        self.free = list(range(setting.num_blocks))
        self.users = [0] * setting.num_blocks
        self.text: dict[int, tuple[int, ...]] = {}  # block -> whole text up to its end; insertion order = age
        self.running: list[Job] = []
        self.waiting: list[Job] = []

    def order(self, job: Job) -> tuple[int, ...]:
        return (-job.priority, job.number) if self.s.by_priority else (job.number,)

    def take(self, count: int) -> list[int] | None:
        if count > len(self.free):
            return None
        taken, self.free = self.free[:count], self.free[count:]
        for block in taken:
            self.users[block] = 1
            self.text.pop(block, None)
        return taken

    def drop(self, job: Job) -> None:
        for block in reversed(job.blocks):
            self.users[block] -= 1
            if self.users[block] == 0:
                self.free.append(block)
        job.blocks, job.computed = [], 0

    def blocks_for(self, tokens: int) -> int:
        return (tokens + self.s.block_size - 1) // self.s.block_size

    def hits(self, job: Job) -> list[int]:
        found: list[int] = []
        size = self.s.block_size
        while self.s.caching and (len(found) + 1) * size < len(job.known):
            text = tuple(job.known[: (len(found) + 1) * size])
            holders = [block for block, held in self.text.items() if held == text]
            if not holders:
                break
            found.append(holders[0])
        return found

    def plan(self) -> tuple[list[tuple[Job, int]], list[Job]]:
        share: dict[int, int] = {}
        budget, preempted = self.s.budget, []
        limit = self.s.chunk or self.s.budget
        for job in list(self.running):
            while budget and job in self.running:
                new = min(len(job.known) - job.computed, limit, budget)
                taken = self.take(max(0, self.blocks_for(job.computed + new) - len(job.blocks)))
                if taken is not None:
                    job.blocks += taken
                    share[job.number] = new
                    budget -= new
                    break
                victim = max(self.running, key=self.order)
                self.running.remove(victim)
                budget += share.pop(victim.number, 0)
                self.drop(victim)
                preempted.append(victim)
        self.waiting = sorted(self.waiting + preempted, key=self.order)
        while not preempted and self.waiting and budget and len(self.running) < self.s.max_seqs:
            job = self.waiting[0]
            hits = self.hits(job)
            start = len(hits) * self.s.block_size
            new = min(len(job.known) - start, limit, budget)
            need = self.blocks_for(start + new) - len(hits)
            if need + sum(block in self.free for block in hits) > len(self.free):
                break
            for block in hits:
                if block in self.free:
                    self.free.remove(block)
                self.users[block] += 1
            job.blocks = hits + (self.take(need) or [])
            job.computed = start
            self.running.append(self.waiting.pop(0))
            share[job.number] = new
            budget -= new
        return [(job, share[job.number]) for job in self.running if job.number in share], preempted

    def commit(self, members: list[tuple[Job, int]], token: int, context: int) -> list[int]:
        done = []
        for job, new in members:
            before, job.computed = job.computed, job.computed + new
            if job.computed == len(job.known):
                job.known.append(token)
                if len(job.known) in (len(job.prompt) + job.max_tokens, context):
                    done.append(job)
            size = self.s.block_size
            for index in range(before // size, job.computed // size):
                self.text[job.blocks[index]] = tuple(job.known[: (index + 1) * size])
        for job in done:
            self.running.remove(job)
            self.drop(job)
        return [job.number for job in done]


@st.composite
def scenarios(draw: st.DrawFn) -> tuple[Setting, list[Job]]:
    size = draw(st.integers(1, 4))
    setting = Setting(
        num_blocks=draw(st.integers(3, 14)),
        block_size=size,
        max_seqs=draw(st.integers(1, 5)),
        budget=draw(st.integers(1, 12)),
        chunk=draw(st.none() | st.integers(1, 6)),
        by_priority=draw(st.booleans()),
        caching=draw(st.booleans()),
    )
    context = setting.num_blocks * size
    texts = [draw(st.lists(st.integers(1, 3), min_size=1, max_size=10)) for _ in range(2)]
    jobs = []
    for number in range(draw(st.integers(1, 8))):
        text = draw(st.sampled_from(texts)) + draw(st.lists(st.integers(0, 3), max_size=3))
        jobs.append(
            Job(
                number,
                draw(st.integers(0, 20)),
                tuple(text[: context - 1]),
                draw(st.integers(1, 14)),
                draw(st.integers(0, 3)),
            )
        )
    jobs.sort(key=lambda job: job.arrives_at_step)
    for number, job in enumerate(jobs):
        job.number = number
    return setting, jobs


@pytest.mark.clause("SC-STEP-2", "SC-STEP-3", "SC-STEP-4", "SC-STEP-5", "SC-POLICY-1", "SC-POLICY-2", "KV-STEP-1")
@pytest.mark.clause("KV-STEP-2", "KV-STEP-4", "KV-STEP-5", "KV-POOL-4", "KV-PREFIX-3", "ST-LOOP-3", "ST-LOOP-4")
@settings(max_examples=400)
@given(scenarios())
def test_every_plan_is_the_naive_schedulers(scenario: tuple[Setting, list[Job]]) -> None:
    setting, jobs = scenario
    context = setting.num_blocks * setting.block_size
    naive = NaiveServer(setting)
    policy = SchedulingPolicy.Priority if setting.by_priority else SchedulingPolicy.FCFS
    cache = PagedKvCacheManager(setting.num_blocks, setting.block_size, enable_prefix_caching=setting.caching)
    loop = StepLoop(
        ContinuousBatchScheduler(SchedulerConfig(policy=policy), max_chunk_tokens=setting.chunk),
        cache,
        BatchHint.of(setting.max_seqs, setting.budget),
    )
    arriving = list(jobs)
    numbers, finished = {}, 0
    for step in range(2000):
        while arriving and arriving[0].arrives_at_step <= step:
            job = arriving.pop(0)
            job.known = list(job.prompt)
            naive.waiting = sorted([*naive.waiting, job], key=naive.order)
            request = InferenceRequest.new("", "m").with_sampling_params(SamplingParams(max_tokens=job.max_tokens))
            request = request.with_priority(Priority(job.priority))
            numbers[loop.submit(request, job.prompt, now_s=float(step))] = job.number
        members, preempted = naive.plan()
        plan = loop.plan(float(step))
        if plan is None:
            assert not members
            assert not loop.has_work()
            if not arriving:
                break
            continue
        got = [(numbers[m.request_id], *m[1:]) for m in plan.sequences]
        assert got == [(j.number, j.computed, new, j.computed + new == len(j.known)) for j, new in members]
        assert [numbers[request_id] for request_id in plan.preempted] == [job.number for job in preempted]
        for (job, _), member in zip(members, plan.sequences, strict=True):
            assert loop.handle_of(member.request_id).block_table().physical_blocks == job.blocks
        token = step % 3
        samples = {member.request_id: token for member in plan.sequences if member.samples}
        events = loop.commit(plan, StepResult(samples), step + 1.0)
        done = naive.commit(members, token, context)
        assert [numbers[request_id] for request_id, _ in events.finished] == done
        assert list(cache.pool.free_list()) == naive.free
        loop.check_invariants()
        finished += len(done)
        if preempted:
            event("preemption")
        if any(0 < job.computed < len(job.prompt) for job, _ in members):
            event("chunk or hit")
    assert finished == len(jobs)
    assert cache.num_free_blocks == setting.num_blocks
