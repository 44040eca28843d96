"""The entrance: what is refused, with which error, and that a refusal costs nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from typing import Any

import pytest

from ferrum_ref.errors import (
    AlreadyExistsError,
    FerrumError,
    NotFoundError,
    RequestValidationError,
    SchedulerError,
    UnsupportedError,
)
from ferrum_ref.types.config import EngineConfig, SchedulerConfig
from ferrum_ref.types.ids import ModelId
from ferrum_ref.types.sampling import MirostatParams, ResponseFormat


def refused(tools: Any, request: Any, error: type[FerrumError], match: str, **setup: Any) -> None:
    async def main() -> None:
        s = tools.Setup(**setup)
        async with s.engine as engine:
            with pytest.raises(error, match=match):
                await engine.infer(request)
            with pytest.raises(error, match=match):
                await engine.infer_stream(request)
            answer = await engine.infer(tools.request("still alive"))
            assert answer.text == tools.expected_text("still alive", 20)
            await s.require_clean()
            metrics = engine.metrics()
            assert (metrics.total_requests, metrics.successful_requests, metrics.failed_requests) == (1, 1, 0)
            assert metrics.queue_metrics.queue_rejection_rate == pytest.approx(2 / 3)
            assert metrics.error_stats.errors_by_type == {error.kind: 2}

    tools.run(main())


@pytest.mark.clause("EN-ADMISSION-1")
def test_another_model(tools: Any) -> None:
    request = dataclasses.replace(tools.request("x"), model_id=ModelId("gpt-9"))
    refused(tools, request, NotFoundError, "gpt-9")


@pytest.mark.clause("EN-ADMISSION-2")
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"max_tokens": 0},
        {"repetition_penalty": -1.0},
        {"stop_sequences": [""]},
    ],
    ids=str,
)
def test_parameters_outside_their_domain(tools: Any, params: dict[str, Any]) -> None:
    refused(tools, tools.request("x", **params), RequestValidationError, next(iter(params)))


@pytest.mark.clause("EN-ADMISSION-2")
@pytest.mark.parametrize(
    "params",
    [
        {"tfs": 0.5},
        {"typical_p": 0.5},
        {"mirostat": MirostatParams(2, 5.0, 0.1)},
        {"response_format": ResponseFormat.JsonObject},
    ],
    ids=str,
)
def test_parameters_that_are_not_offered(tools: Any, params: dict[str, Any]) -> None:
    refused(tools, tools.request("x", **params), UnsupportedError, next(iter(params)))


@pytest.mark.clause("EN-ADMISSION-3")
def test_prompts_that_cannot_run(tools: Any) -> None:
    refused(tools, tools.request(""), RequestValidationError, "empty")
    not_text = dataclasses.replace(tools.request("x"), prompt=7)
    refused(tools, not_text, RequestValidationError, "must be a text")


@pytest.mark.clause("EN-ADMISSION-4")
def test_a_prompt_longer_than_the_context(tools: Any) -> None:
    refused(tools, tools.request("x" * 4096), RequestValidationError, "4096 tokens", num_blocks=2000)
    refused(tools, tools.request("x" * 256), RequestValidationError, "256", num_blocks=64)


@pytest.mark.clause("EN-ADMISSION-4")
def test_an_answer_ends_where_the_context_does(tools: Any) -> None:
    async def main() -> None:
        setup = tools.Setup(num_blocks=16, next_token=lambda history: 97)
        async with setup.engine as engine:
            answer = await engine.infer(tools.request("x" * 60, max_tokens=500))
            assert answer.text == "aaaa"
            assert answer.finish_reason.name == "Length"
            await setup.require_clean()

    tools.run(main())


@pytest.mark.clause("EN-ADMISSION-5")
def test_stop_ids_must_be_ids(tools: Any) -> None:
    for bad in ("7", [-1], ["a"], 7):
        request = tools.request("x").with_metadata("stop_token_ids", bad)
        refused(tools, request, RequestValidationError, "stop_token_ids")


@pytest.mark.clause("EN-ADMISSION-6")
def test_a_full_queue(tools: Any) -> None:
    async def main() -> None:
        config = EngineConfig(scheduler=SchedulerConfig(max_waiting_requests=2))
        setup = tools.Setup(config=config, max_num_seqs=1)
        async with setup.engine as engine:
            setup.executor.gate.clear()
            running = asyncio.create_task(engine.infer(tools.request("a")))
            await setup.until_held()
            waiting = [asyncio.create_task(engine.infer(tools.request(p))) for p in "bc"]
            await asyncio.sleep(0)
            with pytest.raises(SchedulerError, match="full"):
                await engine.infer(tools.request("d"))
            setup.executor.gate.set()
            answers = await asyncio.gather(running, *waiting)
            assert [a.text for a in answers] == [tools.expected_text(p, 20) for p in "abc"]
            await setup.require_clean()

    tools.run(main())


@pytest.mark.clause("EN-ADMISSION-6")
def test_an_id_in_use(tools: Any) -> None:
    async def main() -> None:
        setup = tools.Setup()
        async with setup.engine as engine:
            request = tools.request("a")
            stream = await engine.infer_stream(request)
            with pytest.raises(AlreadyExistsError):
                await engine.infer(request)
            pieces = [c.text async for c in stream]
            assert "".join(pieces) == tools.expected_text("a", 20)
            assert (await engine.infer(request)).text == "".join(pieces)

    tools.run(main())
