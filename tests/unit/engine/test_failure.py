"""Steps that fail: one request ends, the others do not notice."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from ferrum_ref.engine.execution import Share, run_step
from ferrum_ref.errors import BackendError, CancelledError, FerrumError, InternalError, ResourceExhaustedError
from ferrum_ref.interfaces.model_executor import UnifiedBatch, UnifiedBatchItem
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.metrics import HealthStatusType

PROMPTS = ["alpha", "beta", "gamma", "delta"]


def poison(character: str, error: Exception) -> Any:
    """An executor's `before` that fails for every batch holding a certain first token."""

    def before(batch: UnifiedBatch) -> None:
        if any(item.q_tokens[0] == ord(character) for item in batch.items):
            raise error

    return before


@pytest.mark.clause("EN-STEP-1", "EN-STEP-2")
@pytest.mark.parametrize("error", [BackendError("kernel failed"), MemoryError("no memory"), ValueError("shapes")])
def test_only_the_request_that_makes_a_step_fail_fails(tools: Any, error: Exception) -> None:
    async def main() -> None:
        setup = tools.Setup(before=poison("g", error))
        async with setup.engine as engine:
            answers = await asyncio.gather(
                *[engine.infer(tools.request(p, stop_sequences=["g"])) for p in PROMPTS], return_exceptions=True
            )
            for prompt, answer in zip(PROMPTS, answers, strict=True):
                if prompt == "gamma":
                    assert isinstance(answer, FerrumError)
                    assert str(error) in str(answer)
                else:
                    assert answer.text == tools.expected_text(prompt, 20).split("g")[0]
            await setup.require_clean()
            metrics = engine.metrics()
            assert (metrics.total_requests, metrics.failed_requests, metrics.successful_requests) == (4, 1, 3)
            assert metrics.error_stats.recent_errors[0].message in str(answers[2])
            assert (await engine.health_check()).status is HealthStatusType.Healthy

    tools.run(main())


@pytest.mark.clause("EN-STEP-2")
def test_a_failed_forward_that_succeeds_alone_costs_nobody_a_token(tools: Any) -> None:
    """Large batches fail, small ones do not: every answer is right, with no token twice (D-69)."""

    def before(batch: UnifiedBatch) -> None:
        if len(batch.items) > 1:
            raise BackendError("batch too large")

    async def main() -> None:
        setup = tools.Setup(num_blocks=20, before=before)
        async with setup.engine as engine:
            answers = await asyncio.gather(*[engine.infer(tools.request(p)) for p in PROMPTS])
            assert [a.text for a in answers] == [tools.expected_text(p, 20) for p in PROMPTS]
            await setup.require_clean()

    tools.run(main())


class Chooser:
    """Takes the largest logit; fails on the way when told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def next_token(self, logits: np.ndarray) -> int:
        if self.error is not None:
            raise self.error
        return int(logits.argmax())


class ListExecutor:
    def __init__(self, results: list[Any]) -> None:
        self.results = results

    def execute_unified(self, batch: UnifiedBatch) -> list[Any]:
        return self.results[: len(batch.items)]


def share(chooser: Chooser, final: bool = True) -> Share:
    return Share(RequestId.new(), UnifiedBatchItem("s", [1], None, 0, final), chooser)  # type: ignore[arg-type]


@pytest.mark.clause("EN-STEP-1", "EN-STEP-3")
def test_a_failed_choice_ends_its_request_only() -> None:
    logits = np.arange(5.0)
    shares = [share(Chooser()), share(Chooser(BackendError("NaN"))), share(Chooser()), share(Chooser(), final=False)]
    outcome = run_step(ListExecutor([logits, logits, None, None]), shares, clock=iter(range(9)).__next__)
    ids = [s.request_id for s in shares]
    assert outcome.tokens == {ids[0]: 4}
    assert set(outcome.errors) == {ids[1], ids[2]}
    assert "no logits" in str(outcome.errors[ids[2]])
    assert (outcome.execute_s, outcome.sample_s) == (1, 1)


@pytest.mark.clause("EN-STEP-2")
def test_an_executor_that_loses_results_is_found_out() -> None:
    outcome = run_step(ListExecutor([]), [share(Chooser())], clock=lambda: 0.0)
    (error,) = outcome.errors.values()
    assert "expected 1 results, got 0" in str(error)


@pytest.mark.clause("EN-STREAM-3", "EN-STEP-2")
def test_a_stream_raises_the_error_after_the_pieces_that_came(tools: Any) -> None:
    async def main() -> None:
        steps = iter(range(100))

        def before(batch: UnifiedBatch) -> None:
            if next(steps) == 3:
                raise BackendError("fourth step")

        setup = tools.Setup(before=before)
        async with setup.engine as engine:
            stream = await engine.infer_stream(tools.request("x"))
            pieces = [(await anext(stream)).text for _ in range(3)]
            with pytest.raises(BackendError, match="fourth step"):
                await anext(stream)
            assert "".join(pieces) == tools.expected_text("x", 3)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            await setup.require_clean()

    tools.run(main())


@pytest.mark.clause("EN-SHUTDOWN-1")
def test_shutdown_ends_what_runs_with_its_text_and_refuses_the_rest(tools: Any) -> None:
    async def main() -> None:
        setup = tools.Setup(next_token=lambda history: 97)
        engine = setup.engine
        stream = await engine.infer_stream(tools.request("x", max_tokens=100))
        whole = asyncio.create_task(engine.infer(tools.request("y", max_tokens=100)))
        assert (await anext(stream)).text == "a"
        await engine.shutdown()
        rest = [chunk async for chunk in stream]
        assert rest[-1].finish_reason.name == (await whole).finish_reason.name == "Cancelled"
        assert set((await whole).text) <= {"a"}
        with pytest.raises(ResourceExhaustedError, match="shut down"):
            await engine.infer(tools.request("z"))
        assert not (await engine.status()).is_ready
        await engine.shutdown()
        await setup.require_clean()

    tools.run(main())


@pytest.mark.clause("EN-SHUTDOWN-2", "EN-STATUS-2")
def test_when_the_loop_itself_breaks_nobody_waits_in_vain(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        setup = tools.Setup()
        engine = setup.engine

        def broken(*_: object) -> None:
            raise InternalError("books do not balance")

        with monkeypatch.context() as patch:
            patch.setattr(engine.loop, "commit", broken)
            answers = await asyncio.gather(*[engine.infer(tools.request(p)) for p in PROMPTS], return_exceptions=True)
        assert [str(a) for a in answers] == ["Internal error: books do not balance"] * 4
        await setup.require_clean()
        with pytest.raises(InternalError, match="balance"):
            await engine.infer(tools.request("x"))
        health = await engine.health_check()
        assert health.status is HealthStatusType.Unhealthy
        assert "balance" in health.component_status.model_executor.message
        await engine.shutdown()

    tools.run(main())


@pytest.mark.clause("EN-SHUTDOWN-2")
def test_the_end_of_the_event_loop_ends_the_engine(tools: Any) -> None:
    kept: dict[str, Any] = {}

    async def main() -> None:
        kept["setup"] = setup = tools.Setup(next_token=lambda history: 97)
        stream = await setup.engine.infer_stream(tools.request("x", max_tokens=200))
        await anext(stream)
        kept["stream"] = stream

    tools.run(main())  # the background task is cancelled with the event loop
    setup = kept["setup"]
    assert setup.kv_cache.stats().free_blocks == 64
    setup.engine.loop.check_invariants()
    with pytest.raises(CancelledError):
        tools.run(setup.engine.infer(tools.request("y")))


@pytest.mark.clause("EN-SHUTDOWN-2")
def test_requests_that_can_never_run_are_told(tools: Any) -> None:
    """Blocks lent behind the loop's back leave no room: an error, not a hang."""

    async def main() -> None:
        setup = tools.Setup(num_blocks=8)
        setup.kv_cache.pool.take(8)
        with pytest.raises(InternalError, match="none can ever run"):
            await setup.engine.infer(tools.request("x"))
        await setup.engine.shutdown()

    tools.run(main())
