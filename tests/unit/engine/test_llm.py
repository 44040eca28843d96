"""The text engine: concurrent answers equal lonely ones, endings, usage, pieces."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from ferrum_ref.interfaces.engine import InferenceEngine, LlmInferenceEngine
from ferrum_ref.types.requests import StreamChunk
from ferrum_ref.types.sampling import FinishReason

PROMPTS = [f"{'The quick brown fox. ' * (1 + i % 3)}{i}" for i in range(8)]


async def chunks_of(stream: Any) -> list[StreamChunk]:
    return [chunk async for chunk in stream]


@pytest.mark.clause("EN-LOOP-1", "EN-LOOP-4", "EN-LOOP-6")
@pytest.mark.parametrize("num_blocks", [24, 40, 1000])
@pytest.mark.parametrize("max_num_batched_tokens", [5, 64])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_eight_together_answer_as_each_alone(
    tools: Any, num_blocks: int, max_num_batched_tokens: int, prefix_caching: bool
) -> None:
    async def main() -> None:
        setup = tools.Setup(num_blocks, max_num_batched_tokens=max_num_batched_tokens, prefix_caching=prefix_caching)
        requests = [tools.request(p, max_tokens=30) for p in PROMPTS]
        answers = await asyncio.gather(*[setup.engine.infer(r) for r in requests])
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert answer.text == tools.expected_text(prompt, 30)
        preempted = sum(a.metadata["num_preemptions"] for a in answers)
        assert (preempted > 0) == (num_blocks < 1000)
        assert setup.engine.counters.num_preemptions == preempted
        await setup.require_clean()
        await setup.engine.shutdown()

    tools.run(main())


@pytest.mark.clause("EN-LOOP-2", "EN-LOOP-3")
def test_a_request_may_come_while_a_step_is_in_flight(tools: Any) -> None:
    async def main() -> None:
        setup = tools.Setup()
        async with setup.engine as engine:
            setup.executor.gate.clear()
            first = asyncio.create_task(engine.infer(tools.request("first")))
            await setup.until_held()  # the step hangs in the worker; the event loop does not
            second = asyncio.create_task(engine.infer(tools.request("second")))
            await asyncio.sleep(0)
            assert not first.done()
            assert (await engine.status()).queued_requests == 1
            setup.executor.gate.set()
            assert (await first).text == tools.expected_text("first", 20)
            assert (await second).text == tools.expected_text("second", 20)
            await setup.require_clean()

    tools.run(main())


@pytest.mark.clause("EN-LOOP-5")
def test_a_seed_gives_the_same_text_in_any_company(tools: Any) -> None:
    """Sampling with penalties, alone with plenty of blocks and crowded with preemptions."""

    def params(i: int) -> dict[str, Any]:
        return {"temperature": 4.0, "seed": i, "max_tokens": 25, "repetition_penalty": 1.5, "frequency_penalty": 0.5}

    async def alone(i: int) -> list[int]:
        async with tools.Setup(1000).engine as engine:
            return list((await engine.infer(tools.request(PROMPTS[i], **params(i)))).tokens)

    async def crowd() -> tuple[list[list[int]], int]:
        setup = tools.Setup(24)
        async with setup.engine as engine:
            requests = [tools.request(p, **params(i)) for i, p in enumerate(PROMPTS)]
            answers = await asyncio.gather(*map(engine.infer, requests))
            await setup.require_clean()
            return [list(a.tokens) for a in answers], engine.counters.num_preemptions

    tokens, num_preemptions = tools.run(crowd())
    assert num_preemptions > 0
    assert tokens == [tools.run(alone(i)) for i in range(len(PROMPTS))]
    assert len({tuple(t) for t in tokens}) == len(PROMPTS)


def scripted(script: str, ends: bool = True) -> Any:
    """A model that says `script` after the prompt "?", then ends (or goes on with dots)."""

    def next_token(history: bytes) -> int:
        said = history[::2].index(b"?") + 1
        position = len(history) // 2 - said
        text = script.encode()
        return text[position] if position < len(text) else (256 if ends else ord("."))

    return next_token


def answer_and_chunks(tools: Any, script: str, ends: bool = True, metadata: Any = (), **params: Any) -> Any:
    async def main() -> Any:
        setup = tools.Setup(next_token=scripted(script, ends))
        request = tools.request("?", **params)
        for key, value in dict(metadata).items():
            request = request.with_metadata(key, value)
        async with setup.engine as engine:
            answer = await engine.infer(request)
            again = tools.request("?", **params)
            for key, value in dict(metadata).items():
                again = again.with_metadata(key, value)
            pieces = await chunks_of(await engine.infer_stream(again))
            await setup.require_clean()
        assert "".join(c.text for c in pieces) == answer.text
        assert [c.token for c in pieces] == [*answer.tokens, None]
        assert [c.finish_reason for c in pieces] == [None] * len(answer.tokens) + [answer.finish_reason]
        assert [c.usage for c in pieces[:-1]] == [None] * len(answer.tokens)
        assert pieces[-1].usage == answer.usage
        assert answer.usage.prompt_tokens == 1
        assert answer.usage.completion_tokens == len(answer.tokens)
        return answer, pieces

    return tools.run(main())


@pytest.mark.clause("EN-ANSWER-1", "EN-ANSWER-2", "EN-ANSWER-3")
def test_the_end_token_counts_and_shows_in_the_tokens_but_not_in_the_text(tools: Any) -> None:
    answer, _ = answer_and_chunks(tools, "yes")
    assert (answer.text, answer.finish_reason) == ("yes", FinishReason.EOS)
    assert answer.tokens == [*b"yes", tools.EOS]
    assert answer.usage.total_tokens == 5


@pytest.mark.clause("EN-ANSWER-3")
def test_the_limit_ends_an_answer_unless_its_last_token_is_the_end(tools: Any) -> None:
    answer, _ = answer_and_chunks(tools, "yes", max_tokens=3)
    assert (answer.text, answer.finish_reason) == ("yes", FinishReason.Length)
    answer, _ = answer_and_chunks(tools, "yes", max_tokens=4)
    assert answer.finish_reason is FinishReason.EOS
    answer, _ = answer_and_chunks(tools, "yes", max_tokens=1)
    assert (answer.text, answer.finish_reason) == ("y", FinishReason.Length)


@pytest.mark.clause("EN-ANSWER-3", "EN-STOP-1", "EN-STOP-2")
def test_a_stop_string_cuts_the_text_and_never_shows_in_a_piece(tools: Any) -> None:
    answer, pieces = answer_and_chunks(tools, "one\n\ntwo", stop_sequences=["\n\n", "three"])
    assert (answer.text, answer.finish_reason) == ("one", FinishReason.Stop)
    assert answer.tokens == list(b"one\n\n")
    assert [c.text for c in pieces] == ["o", "n", "e", "", "", ""]
    assert answer.metadata["stop_sequence"] == "\n\n"
    answer, pieces = answer_and_chunks(tools, "one\n", stop_sequences=["\n\n"])
    assert (answer.text, answer.finish_reason) == ("one\n", FinishReason.EOS)
    assert pieces[-1].text == "\n"
    answer, _ = answer_and_chunks(tools, "one\n\n", stop_sequences=["\n\n"], max_tokens=5)
    assert (answer.text, answer.finish_reason) == ("one", FinishReason.Stop)


@pytest.mark.clause("EN-ADMISSION-5", "EN-ANSWER-3")
def test_stop_ids_of_a_request(tools: Any) -> None:
    answer, _ = answer_and_chunks(tools, "a!b", metadata={"stop_token_ids": [ord("!")]})
    assert (answer.text, answer.tokens, answer.finish_reason) == ("a", list(b"a!"), FinishReason.Stop)
    answer, _ = answer_and_chunks(tools, "ab", metadata={"stop_token_ids": [ord("!")]})
    assert (answer.text, answer.finish_reason) == ("ab", FinishReason.EOS)


@pytest.mark.clause("EN-ADMISSION-5")
def test_the_end_token_can_be_ignored(tools: Any) -> None:
    async def main() -> None:
        calls = itertools.count()
        setup = tools.Setup(next_token=lambda history: 97 if next(calls) % 2 == 0 else 98)
        async with setup.engine as engine:
            request = tools.request("x", max_tokens=6).with_metadata("ignore_eos", True)
            answer = await engine.infer(request)
            assert (answer.text, answer.finish_reason) == ("ababab", FinishReason.Length)

    tools.run(main())
    answer, _ = answer_and_chunks(tools, "ab", ends=False, max_tokens=4, metadata={"ignore_eos": True})
    assert (answer.text, answer.finish_reason) == ("ab..", FinishReason.Length)


@pytest.mark.clause("EN-TEXT-1", "EN-ANSWER-2")
def test_split_characters_in_a_stream(tools: Any) -> None:
    answer, pieces = answer_and_chunks(tools, "né€")
    assert answer.text == "né€"
    assert [c.text for c in pieces] == ["n", "", "é", "", "", "€", "", ""]


@pytest.mark.clause("EN-ANSWER-4")
def test_times_and_latency_come_from_the_one_clock(tools: Any) -> None:
    ticks = itertools.count(1_000_000)

    async def main() -> Any:
        async with tools.Setup(clock=lambda: float(next(ticks))).engine as engine:
            return await engine.infer(tools.request("x", max_tokens=3))

    answer = tools.run(main())
    times = answer.metadata
    assert 0 < times["queue_time_ms"] < times["time_to_first_token_ms"] < times["total_time_ms"]
    assert answer.latency_ms == times["total_time_ms"]
    assert answer.created_at.timestamp() < next(ticks)


@pytest.mark.clause("EN-INTERFACE-1", "EN-INTERFACE-2", "EN-INTERFACE-3")
def test_the_split_interface(tools: Any) -> None:
    async def main() -> None:
        setup = tools.Setup()
        async with setup.engine as engine:
            assert isinstance(engine, LlmInferenceEngine)
            assert isinstance(engine, InferenceEngine)
            assert engine.lora_metrics_snapshot() is None
            assert engine.cache_metrics_snapshot()["total_blocks"] == 64
            assert not hasattr(engine, "embed_text")
            stream = await engine.infer_stream(tools.request("x"))
            assert aiter(stream) is stream
            pieces = await chunks_of(stream)
            assert pieces[-1].finish_reason is not None
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    tools.run(main())
