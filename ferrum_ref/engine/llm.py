"""The text engine: many concurrent requests, one background task that goes round the step loop.

    admit -> submit -> [plan -> execute and sample in a worker thread -> commit -> pieces of text] ... -> answer

Everything but the worker thread's work happens on the event loop's thread.  Clauses: EN-LOOP-1..6, EN-CANCEL-1..5,
EN-SHUTDOWN-1..2, EN-STATUS-1..3 (specs/engine.md).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

from ferrum_ref.engine.active import ActiveRequest
from ferrum_ref.engine.admission import Entrance
from ferrum_ref.engine.counters import EngineCounters
from ferrum_ref.engine.execution import Share, StepOutcome, run_step
from ferrum_ref.engine.plan import StepEvents, StepPlan, StepResult, datetime_of
from ferrum_ref.engine.report import EngineReport
from ferrum_ref.engine.step_loop import StepLoop
from ferrum_ref.engine.stream import ChunkStream
from ferrum_ref.engine.text import AnswerText
from ferrum_ref.errors import CancelledError, FerrumError, InternalError, ResourceExhaustedError
from ferrum_ref.interfaces.engine import LlmInferenceEngine
from ferrum_ref.interfaces.model_executor import UnifiedBatchItem, UnifiedExecutor
from ferrum_ref.interfaces.tokenizer import IncrementalTokenizer
from ferrum_ref.types.config import EngineConfig
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.metrics import EngineMetrics, EngineStatus, HealthStatus
from ferrum_ref.types.requests import InferenceRequest, InferenceResponse
from ferrum_ref.types.sampling import FinishReason


class LlmEngine(LlmInferenceEngine):
    """Generates text for many requests at once over one step loop and one executor.  [EN-LOOP-1..6]

    The engine belongs to the event loop of its first request; its methods are called from there. `async with engine:`
    shuts it down at the end.
    """

    def __init__(
        self,
        *,
        loop: StepLoop,
        executor: UnifiedExecutor,
        tokenizer: IncrementalTokenizer[Any],
        entrance: Entrance,
        report: EngineReport,
        config: EngineConfig,
        clock: Callable[[], float],
    ) -> None:
        """`clock` gives seconds since 1970 and never goes back; it is the only source of time (D-79)."""
        self.loop = loop
        self.counters = EngineCounters()
        self._executor = executor
        self._tokenizer = tokenizer
        self._entrance = entrance
        self._report = report
        self._config = config
        self._clock = clock
        self._active: dict[RequestId, ActiveRequest] = {}
        self._ending: list[ActiveRequest] = []  # cancelled while their step is in flight
        self._plan: StepPlan | None = None
        self._worker = ThreadPoolExecutor(1, "ferrum-ref-step")
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None
        self._closed: FerrumError | None = None
        self._crash: FerrumError | None = None
        self._started_at_s = clock()

    # Requests.
    async def infer(self, request: InferenceRequest) -> InferenceResponse:
        """One request to its end; cancelling the awaiting task cancels the request.  [EN-LOOP-1, EN-CANCEL-1]"""
        active = self._submit(request)
        try:
            while (await active.next_chunk()).finish_reason is None:
                pass
        finally:
            self._abandon(active)
        return active.response()

    async def infer_stream(self, request: InferenceRequest) -> ChunkStream:
        """The pieces of one answer; giving the stream up cancels the request.  [EN-STREAM-1..3, EN-CANCEL-2]"""
        return ChunkStream(self._submit(request), self._abandon)

    async def cancel(self, request_id: RequestId) -> bool:
        """End a request where it stands: its answer is what came so far, with reason Cancelled.  [EN-CANCEL-3]

        False when no such request is waiting or running.
        """
        active = self._active.get(request_id)
        if active is None or not self.loop.cancel(request_id, self._clock()):
            return False
        if self.loop.request_state(request_id) is None:
            self._end(active, FinishReason.Cancelled)
        else:  # the step in flight writes into its blocks: it ends with the commit
            self._ending.append(active)
        self._wake.set()
        return True

    async def drain(self) -> None:
        """Wait until every request has ended and its blocks are back.  [EN-CANCEL-4]"""
        await self._idle.wait()

    # The engine's life.
    async def shutdown(self) -> None:
        """Take nothing more, cancel what runs, end the background task; again: nothing.  [EN-SHUTDOWN-1..2]"""
        self._closed = self._closed or ResourceExhaustedError("infer: the engine is shut down; build another one")
        for request_id in list(self._active):
            await self.cancel(request_id)
        self._wake.set()
        if self._task is not None:
            await asyncio.wait([self._task])
        self._worker.shutdown()

    async def __aenter__(self) -> LlmEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()

    async def status(self) -> EngineStatus:
        return self._report.status(self._closed is None, self._uptime_s(), self._now())

    def config(self) -> EngineConfig:
        return self._config

    def metrics(self) -> EngineMetrics:
        return self.counters.metrics(self._uptime_s(), self.loop.num_waiting, self._report.kv_utilization())

    async def health_check(self) -> HealthStatus:
        return self._report.health(self._crash, self._plan is not None, self._now())

    def cache_metrics_snapshot(self) -> dict[str, Any]:
        return self._report.cache_metrics()

    # Inside.
    def _now(self) -> datetime:
        return datetime_of(self._clock())

    def _uptime_s(self) -> float:
        return self._clock() - self._started_at_s

    def _submit(self, request: InferenceRequest) -> ActiveRequest:
        """Check, queue, and start the background task if it is the first.  [EN-LOOP-2]"""
        try:
            active = self._admit(request)
        except FerrumError as error:
            self.counters.num_rejected += 1
            self.counters.failed(error, request.id, self._now())
            raise
        self.counters.num_accepted += 1
        self._active[request.id] = active
        self._idle.clear()
        self._wake.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._serve(), name="ferrum-ref-engine")
        return active

    def _admit(self, request: InferenceRequest) -> ActiveRequest:
        if self._closed is not None:
            raise self._closed
        begin_s = self._clock()
        admitted = self._entrance.admit(request)
        now_s = self._clock()
        self.counters.tokenize_s += now_s - begin_s
        self.loop.submit(
            admitted.request, admitted.prompt_token_ids, now_s=now_s, stop_token_ids=admitted.stop_token_ids()
        )
        text = AnswerText(self._tokenizer, admitted.request.sampling_params.stop_sequences)
        return ActiveRequest(admitted, text, now_s, self._now)

    async def _serve(self) -> None:
        """Go round the loop until the engine is closed and empty; whatever goes wrong, nobody waits in vain."""
        try:
            while self._closed is None or self.loop.has_work():
                if await self._step():
                    continue
                if not self.loop.has_work():
                    self._idle.set()
                elif not self.loop.num_running:
                    raise InternalError(f"engine: {self.loop.num_waiting} requests wait and none can ever run")
                await self._wake.wait()
                self._wake.clear()
        except Exception as error:  # noqa: BLE001  (reported to every request, and by health_check)
            self._fall(FerrumError.from_value(error))
        except asyncio.CancelledError:
            self._fall(CancelledError("infer: the event loop of the engine ended"))
            raise
        finally:
            self._idle.set()

    async def _step(self) -> bool:
        """Once round the loop; False when nothing can run.  [EN-LOOP-3..6]"""
        begin_s = self._clock()
        self._plan = plan = self.loop.plan(begin_s)
        if plan is None:
            return False
        shares = self._shares(plan, begin_s)
        self.counters.schedule_s += self._clock() - begin_s
        work = asyncio.get_running_loop().run_in_executor(self._worker, run_step, self._executor, shares, self._clock)
        try:
            outcome = await asyncio.shield(work)
        except asyncio.CancelledError:
            self._worker.shutdown()  # the thread still writes into the blocks of this plan
            raise
        now_s = self._clock()
        events = self.loop.commit(plan, StepResult(outcome.tokens, outcome.errors), now_s)
        self._plan = None
        self._deliver(events, now_s)
        self._count(outcome, events, self._clock() - now_s)
        return True

    def _shares(self, plan: StepPlan, now_s: float) -> list[Share]:
        for request_id in plan.preempted:
            self._active[request_id].num_preemptions += 1
            self.counters.num_preemptions += 1
        shares = []
        for request_id, start, num_tokens, samples in plan.sequences:
            active = self._active[request_id]
            if active.started_at_s is None:
                active.started_at_s = now_s
                self.counters.num_started += 1
                self.counters.queue_wait_s += now_s - active.submitted_at_s
            tokens = self.loop.tokens_of(request_id, start, start + num_tokens)
            handle = self.loop.handle_of(request_id)
            item = UnifiedBatchItem(str(request_id), tokens, handle, start, samples, active.request.metadata)
            shares.append(Share(request_id, item, active.chooser))
        return shares

    def _deliver(self, events: StepEvents, now_s: float) -> None:
        """Tokens to their answers, endings to those who wait."""
        for request_id, token in events.tokens:
            active = self._active.get(request_id)
            if active is not None and active.push(token, now_s):
                self.loop.finish(request_id, FinishReason.Stop, now_s)
                self._end(active, FinishReason.Stop)
        for request_id, reason in events.finished:
            active = self._active.get(request_id)
            if active is not None:
                self._end(active, reason, events.errors.get(request_id))
        ending, self._ending = self._ending, []
        for active in ending:
            if self._active.get(active.id) is active:
                self._end(active, FinishReason.Cancelled)

    def _count(self, outcome: StepOutcome, events: StepEvents, commit_s: float) -> None:
        self.counters.num_steps += 1
        self.counters.num_generated_tokens += events.num_tokens
        self.counters.execute_s += outcome.execute_s
        self.counters.sample_s += outcome.sample_s
        self.counters.schedule_s += commit_s

    def _end(self, active: ActiveRequest, reason: FinishReason, error: FerrumError | None = None) -> None:
        now_s = self._clock()
        del self._active[active.id]
        if error is not None:
            self.counters.num_failed += 1
            self.counters.failed(error, active.id, self._now())
            active.fail(error, now_s)
            return
        active.end(reason, now_s)
        if reason is FinishReason.Cancelled:
            self.counters.num_cancelled += 1
        else:
            self.counters.answered(now_s - active.submitted_at_s)

    def _abandon(self, active: ActiveRequest) -> None:
        """Nobody waits for this answer any more; nothing happens when it has ended.  [EN-CANCEL-1..2]"""
        if self._active.get(active.id) is active:
            self.loop.cancel(active.id, self._clock())
            self._end(active, FinishReason.Cancelled)
            self._wake.set()

    def _fall(self, error: FerrumError) -> None:
        """The background task is at its end: give all blocks back and tell every request.  [EN-SHUTDOWN-2]"""
        self._closed = self._crash = error
        if self._plan is not None:
            with contextlib.suppress(FerrumError):  # the commit itself may have been what failed
                self.loop.abort(self._plan)
            self._plan = None
        for active in list(self._active.values()):
            self.loop.cancel(active.id, self._clock())
            self._end(active, FinishReason.Error, error)
