"""Laws of scheduler, cache and step loop together.

The law's executor keeps, in every slot, the token whose K/V would lie there, reads a request's whole history back
through its block table, and lets a hash of it choose the next token. A wrong block, a stale slot, a lost or repeated
token changes the text that follows, which is known beforehand.  Clause: PA-ENGINE-3.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from ferrum_ref.interfaces.kv_cache import KvCacheManager
from ferrum_ref.interfaces.scheduler import BatchHint
from ferrum_ref.parity.engine.law import Law
from ferrum_ref.parity.engine.parts import EngineParts, Loop, Plan, Result
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.requests import InferenceRequest
from ferrum_ref.types.sampling import Priority, SamplingParams

EMPTY, GARBAGE, STOP = -1, -2, 7
MAX_STEPS = 400


def next_token(history: list[int]) -> int:
    """A hash of the whole history, now and then STOP."""
    digest = hashlib.blake2b(np.array(history, dtype=np.int64).tobytes(), digest_size=4).digest()
    number = int.from_bytes(digest, "little")
    return STOP if number % 23 == 0 else 10 + number % 40


def expected_text(prompt: list[int], max_tokens: int) -> list[int]:
    """What a request generates when nothing goes wrong."""
    history = list(prompt)
    while len(history) < len(prompt) + max_tokens and (len(history) == len(prompt) or history[-1] != STOP):
        history.append(next_token(history))
    return history[len(prompt) :]


@dataclass
class Life:
    """One request as the law sees it."""

    prompt: list[int]
    max_tokens: int
    priority: Priority
    generated: list[int] = field(default_factory=list)
    is_over: bool = False
    computed: int = 0


@dataclass
class Drive:
    """One run of a step loop."""

    loop: Loop
    hint: BatchHint
    block_size: int
    slots: np.ndarray[tuple[int], np.dtype[np.int64]]
    lives: dict[RequestId, Life] = field(default_factory=dict)
    first_served: list[RequestId] = field(default_factory=list)

    def submit(self, prompt: list[int], max_tokens: int, priority: Priority) -> RequestId:
        request = InferenceRequest.new("", "m").with_priority(priority)
        request = request.with_sampling_params(SamplingParams(max_tokens=max_tokens))
        self.loop.submit(request, prompt, now_s=0.0, stop_token_ids=frozenset({STOP}))
        self.lives[request.id] = Life(prompt, max_tokens, priority)
        return request.id

    def places(self, request_id: RequestId, end: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The slots of positions [0, end)."""
        blocks = np.array(self.loop.handle_of(request_id).block_table().physical_blocks, dtype=np.int64)
        positions = np.arange(end)
        if end > blocks.size * self.block_size:
            return np.zeros(0, dtype=np.int64)
        return np.asarray(blocks[positions // self.block_size] * self.block_size + positions % self.block_size)

    def fault_in(self, plan: Plan) -> str:
        """Limits, shares, and what the cache holds of them."""
        members = plan.sequences
        ids = [member.request_id for member in members]
        if len(set(ids)) != len(ids):
            return "a request is in one step twice"
        if any(self.lives[request_id].is_over for request_id in ids):
            return "a request runs that is over"
        if len(ids) > self.hint.max_batch_size or plan.num_scheduled_tokens > self.hint.max_tokens:
            return f"{len(ids)} requests and {plan.num_scheduled_tokens} tokens in one step"
        if sum(member.num_scheduled_tokens for member in members) != plan.num_scheduled_tokens:
            return "the step's count of tokens is not that of its members"
        owner: dict[int, RequestId] = {}
        for member in members:
            known = self.loop.tokens_of(member.request_id)
            start, end = member.num_computed_tokens, member.num_computed_tokens + member.num_scheduled_tokens
            if member.num_scheduled_tokens < 1 or end > len(known) or member.samples != (end == len(known)):
                return f"tokens [{start}, {end}) of {len(known)} known ones, samples={member.samples}"
            places = self.places(member.request_id, end)
            if places.size != end:
                return f"the block table is too short for {end} tokens"
            if self.slots[places[:start]].tolist() != known[:start]:
                return "a position that counts as computed does not hold its token"
            for place in places[start:].tolist():
                if owner.setdefault(place // self.block_size, member.request_id) != member.request_id:
                    return "two requests of one step write to one block"
        return ""

    def execute(self, plan: Plan) -> Result:
        """Write every planned position, then choose from what is really stored."""
        tokens = {}
        for member in plan.sequences:
            known = self.loop.tokens_of(member.request_id)
            start, end = member.num_computed_tokens, member.num_computed_tokens + member.num_scheduled_tokens
            places = self.places(member.request_id, end)
            self.slots[places[start:]] = known[start:end]
            if member.request_id not in self.first_served:
                self.first_served.append(member.request_id)
            if member.samples:
                tokens[member.request_id] = next_token(self.slots[places].tolist())
        return Result(tokens)

    def spoil(self, plan: Plan) -> None:
        """A step that failed half-way: its positions hold nothing of use."""
        for member in plan.sequences:
            end = member.num_computed_tokens + member.num_scheduled_tokens
            self.slots[self.places(member.request_id, end)[member.num_computed_tokens :]] = GARBAGE


def _started(parts: EngineParts, rng: np.random.Generator, by_priority: bool) -> tuple[Drive, KvCacheManager]:
    size, num_blocks = int(rng.integers(1, 4)), int(rng.integers(6, 12))
    chunk = None if rng.random() < 0.4 else int(rng.integers(1, 6))
    cache = parts.make_cache(num_blocks, size, bool(rng.random() < 0.8))
    hint = BatchHint.of(int(rng.integers(1, 5)), int(rng.integers(3, 13)))
    loop = parts.make_loop(parts.make_scheduler(chunk, by_priority), cache, hint)
    slots = np.full(num_blocks * size, EMPTY, dtype=np.int64)
    families = [rng.integers(10, 50, 12).tolist() for _ in range(2)]
    drive = Drive(loop, hint, size, slots)
    room = num_blocks * size
    for _ in range(int(rng.integers(4, 9))):
        prompt = families[int(rng.integers(2))][: int(rng.integers(1, min(9, room - 2)))]
        prompt = prompt + rng.integers(10, 50, int(rng.integers(0, 2))).tolist()
        max_tokens = int(rng.integers(1, max(2, min(12, room - len(prompt)))))
        priority = Priority(int(rng.integers(0, 4))) if by_priority else Priority.Normal
        drive.submit(prompt, max_tokens, priority)
    return drive, cache  # type: ignore[return-value]


def _stepped(drive: Drive, rng: np.random.Generator, troubles: bool) -> str:
    """Steps until nothing is left to do; the first fault."""
    for step in range(MAX_STEPS):
        plan = drive.loop.plan(float(step))
        if plan is None:
            return ""
        fault = drive.fault_in(plan)
        if fault:
            return fault
        if troubles and rng.random() < 0.12:
            drive.spoil(plan)
            drive.loop.abort(plan)
            continue
        result = drive.execute(plan)
        events = drive.loop.commit(plan, result, float(step))
        for request_id, token in events.tokens:
            drive.lives[request_id].generated.append(token)
        for request_id, _ in events.finished:
            drive.lives[request_id].is_over = True
        if troubles and rng.random() < 0.05:
            waiting = [one for one, life in drive.lives.items() if not life.is_over]
            if waiting:
                chosen = waiting[int(rng.integers(len(waiting)))]
                drive.loop.cancel(chosen, float(step))
                drive.lives[chosen].is_over = True
                drive.lives[chosen].max_tokens = -1
    return f"not finished after {MAX_STEPS} steps"


def _text_fault(drive: Drive) -> str:
    for life in drive.lives.values():
        wanted = expected_text(life.prompt, max(life.max_tokens, 0))
        if life.max_tokens < 0:  # cancelled on the way: what it got must be right
            whole = expected_text(life.prompt, len(life.generated))
            if life.generated != whole[: len(life.generated)]:
                return f"a cancelled request got {life.generated}, expected a beginning of {whole}"
        elif life.generated != wanted:
            return f"a request got {life.generated}, expected {wanted}"
        elif not life.is_over:
            return "a request with all its tokens was never reported finished"
    return ""


def _law(parts: EngineParts, rng: np.random.Generator, by_priority: bool, troubles: bool) -> str:
    for _ in range(4):
        drive, cache = _started(parts, rng, by_priority)
        submitted = list(drive.lives)
        fault = _stepped(drive, rng, troubles) or _text_fault(drive)
        if fault:
            return fault
        stats = cache.stats()
        if stats.free_blocks != stats.total_blocks:
            return f"{stats.total_blocks - stats.free_blocks} blocks are still in use when all is over"
        if not troubles:
            order = sorted(submitted, key=lambda one: (-int(drive.lives[one].priority), submitted.index(one)))
            if drive.first_served != order:
                return "requests were first served in another order than the policy's"
    return ""


def text_is_right(parts: EngineParts, rng: np.random.Generator) -> str:
    """In order of arrival, under memory pressure, with shared prefixes and chunks."""
    return _law(parts, rng, by_priority=False, troubles=False)


def priority_decides(parts: EngineParts, rng: np.random.Generator) -> str:
    """Requests of different priority, all waiting at the start."""
    return _law(parts, rng, by_priority=True, troubles=False)


def troubles_leave_no_trace(parts: EngineParts, rng: np.random.Generator) -> str:
    """Failed steps and cancelled requests: the others' text stays right and no block is lost."""
    return _law(parts, rng, by_priority=False, troubles=True)


def spoiled_blocks_are_not_trusted(parts: EngineParts, rng: np.random.Generator) -> str:
    """A step fails after it has overwritten a cached prefix; the next request with that prefix must not get it."""
    size, num_blocks = int(rng.integers(1, 5)), int(rng.integers(3, 8))
    room = size * num_blocks
    cache = parts.make_cache(num_blocks, size, True)
    hint = BatchHint.of(4, room)
    loop = parts.make_loop(parts.make_scheduler(None, False), cache, hint)
    drive = Drive(loop, hint, size, np.full(room, EMPTY, dtype=np.int64))
    prefix = rng.integers(10, 50, 2 * size).tolist()
    drive.submit(prefix, 1, Priority.Normal)
    fault = _stepped(drive, rng, troubles=False)
    if fault:
        return fault
    large = drive.submit(rng.integers(50, 90, room - 1).tolist(), 1, Priority.Normal)
    plan = loop.plan(1.0)
    drive.spoil(plan)
    loop.abort(plan)
    loop.cancel(large, 1.0)
    drive.lives[large].is_over, drive.lives[large].max_tokens = True, -1
    drive.submit([*prefix, 10] if room > 2 * size + 1 else prefix, 1, Priority.Normal)
    return _stepped(drive, rng, troubles=False) or _text_fault(drive)


STEP_LAWS = (
    Law("scheduler", "text is right", text_is_right),
    Law("scheduler", "priority decides", priority_decides),
    Law("scheduler", "spoiled blocks are not trusted", spoiled_blocks_are_not_trusted),
    Law("scheduler", "troubles leave no trace", troubles_leave_no_trace),
)
