"""Bugs of schedulers and step loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ferrum_ref.parity.engine.parts import Result
from ferrum_ref.parity.mutants.wrapped import Wrapped
from ferrum_ref.types.sampling import Priority

# Scheduler ------------------------------------------------------------------------------------------------------------


class IgnoresBudget(Wrapped):
    """The token budget is not kept."""

    def fill(self, schedule: Any, cache: Any, hint: Any, now_s: float) -> None:
        self.inner.fill(schedule, cache, replace(hint, max_tokens=2 * hint.max_tokens), now_s)


class IgnoresBatchSize(Wrapped):
    """One request more than allowed runs."""

    def fill(self, schedule: Any, cache: Any, hint: Any, now_s: float) -> None:
        self.inner.fill(schedule, cache, replace(hint, max_batch_size=hint.max_batch_size + 1), now_s)


class LastInFirstOut(Wrapped):
    """The newest request is served first."""

    def enqueue(self, sequence: Any) -> None:
        self.inner.enqueue(sequence)
        sequence.arrival_number = -sequence.arrival_number
        self.inner.change_priority(sequence, sequence.priority)


class IgnoresPriority(Wrapped):
    """Every request has the same priority."""

    def enqueue(self, sequence: Any) -> None:
        sequence.priority = Priority.Normal
        self.inner.enqueue(sequence)


class ForgetsThird(Wrapped):
    """The third request is counted but never queued."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.count = 0

    def enqueue(self, sequence: Any) -> None:
        self.count += 1
        if self.count != 3:
            self.inner.enqueue(sequence)


class SkipsPosition(Wrapped):
    """The second chunk of a prompt starts one token too far."""

    def fill(self, schedule: Any, cache: Any, hint: Any, now_s: float) -> None:
        self.inner.fill(schedule, cache, hint, now_s)
        for index in range(len(schedule.members)):
            if schedule.computed[index] and schedule.scheduled[index] > 1:
                schedule.computed[index] += 1
                schedule.scheduled[index] -= 1


class SamplesTooEarly(Wrapped):
    """A prompt that is computed only in part yields a token already."""

    def fill(self, schedule: Any, cache: Any, hint: Any, now_s: float) -> None:
        self.inner.fill(schedule, cache, hint, now_s)
        schedule.partial.clear()


class ReplaysAfterPreemption(Wrapped):
    """A preempted request starts over from its prompt and gives its tokens out again."""

    def fill(self, schedule: Any, cache: Any, hint: Any, now_s: float) -> None:
        self.inner.fill(schedule, cache, hint, now_s)
        for sequence, _ in schedule.preempted:
            del sequence.tokens[sequence.num_prompt_tokens :]
            sequence.num_known_tokens = sequence.num_prompt_tokens
            sequence.block_digests.clear()


class RunsTwice(Wrapped):
    """The first request of a step is in it twice when there is room."""

    def fill(self, schedule: Any, cache: Any, hint: Any, now_s: float) -> None:
        self.inner.fill(schedule, cache, hint, now_s)
        if len(schedule.members) > 1 and len(schedule.members) - 1 not in schedule.partial:
            for parts in (schedule.members, schedule.computed, schedule.scheduled):
                parts[-1] = parts[0]


# Step loop ------------------------------------------------------------------------------------------------------------


class SwapsTokens(Wrapped):
    """Two requests of a step get each other's token."""

    def commit(self, plan: Any, result: Any, now_s: float) -> Any:
        ids, tokens = list(result.tokens), list(result.tokens.values())
        return self.inner.commit(plan, Result(dict(zip(ids, tokens[1:] + tokens[:1], strict=True))), now_s)


class LosesLastToken(Wrapped):
    """The token with which a request ends is not handed out."""

    def commit(self, plan: Any, result: Any, now_s: float) -> Any:
        events = self.inner.commit(plan, result, now_s)
        ended = {request_id for request_id, _ in events.finished}
        events.tokens[:] = [pair for pair in events.tokens if pair[0] not in ended]
        return events


class IgnoresStop(Wrapped):
    """Generation goes on after a stop token."""

    def submit(self, request: Any, prompt_token_ids: Any, *, now_s: float, stop_token_ids: Any = frozenset()) -> Any:
        return self.inner.submit(request, prompt_token_ids, now_s=now_s)


class OneTokenMore(Wrapped):
    """max_tokens is passed by one."""

    def submit(self, request: Any, prompt_token_ids: Any, *, now_s: float, stop_token_ids: Any = frozenset()) -> Any:
        params = replace(request.sampling_params, max_tokens=request.sampling_params.max_tokens + 1)
        more = request.with_sampling_params(params)
        return self.inner.submit(more, prompt_token_ids, now_s=now_s, stop_token_ids=stop_token_ids)


class KeepsCancelled(Wrapped):
    """A cancelled request goes on."""

    def cancel(self, request_id: Any, now_s: float) -> bool:
        return True


class CommitsFailedStep(Wrapped):
    """A failed step counts as done: contents that were never written are trusted."""

    def abort(self, plan: Any, *, contents_intact: bool = False) -> None:
        self.inner.abort(plan, contents_intact=True)
