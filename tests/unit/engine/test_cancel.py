"""Cancellation, in all its ways and at any moment: nothing leaks, the others do not notice."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_ref.types.sampling import FinishReason

PROMPTS = [f"{'some shared words and ' * (1 + i % 3)}{i}" for i in range(8)]


@pytest.mark.clause("EN-CANCEL-1")
def test_cancelling_the_task_cancels_the_request(tools: Any) -> None:
    async def main() -> None:
        setup = tools.Setup(1000, next_token=lambda history: 97)
        async with setup.engine as engine:
            task = asyncio.create_task(engine.infer(tools.request("x", max_tokens=3000)))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(engine.infer(tools.request("y", max_tokens=3000)), 0.01)
            await setup.require_clean()
            assert engine.counters.num_cancelled == 2

    tools.run(main())


@pytest.mark.clause("EN-CANCEL-2", "EN-STREAM-1", "EN-STREAM-2")
@pytest.mark.parametrize("way", ["never iterated", "left", "closed", "task cancelled"])
def test_giving_a_stream_up_cancels_the_request(tools: Any, way: str) -> None:
    async def main() -> None:
        setup = tools.Setup(next_token=lambda history: 97)
        async with setup.engine as engine:
            request = tools.request("x", max_tokens=200)

            async def reads(num_chunks: int, close: bool = False) -> None:
                stream = await engine.infer_stream(request)
                for _ in range(num_chunks):
                    await anext(stream)
                if close:
                    await stream.aclose()
                    with pytest.raises(StopAsyncIteration):
                        await anext(stream)

            if way == "task cancelled":
                setup.executor.gate.clear()
                task = asyncio.create_task(reads(1))
                await setup.until_held()
                task.cancel()
                await asyncio.wait([task])
                setup.executor.gate.set()
            else:
                await reads(0 if way == "never iterated" else 3, close=way == "closed")
                gc.collect()
            await asyncio.wait_for(setup.require_clean(), 5)
            assert engine.counters.num_cancelled == 1
            assert engine.counters.num_generated_tokens < 200
            assert not await engine.cancel(request.id)

    tools.run(main())


@pytest.mark.clause("EN-CANCEL-3", "EN-CANCEL-5")
def test_cancel_by_id_keeps_what_came(tools: Any) -> None:
    async def main() -> None:
        setup = tools.Setup(next_token=lambda history: 97, max_num_seqs=1)
        async with setup.engine as engine:
            running, waiting = tools.request("x", max_tokens=200), tools.request("y", max_tokens=200)
            stream = await engine.infer_stream(running)
            queued = asyncio.create_task(engine.infer(waiting))
            first = await anext(stream)
            assert first.text == "a"
            setup.executor.gate.clear()
            await setup.until_held()
            assert await engine.cancel(waiting.id)
            assert (await queued).finish_reason is FinishReason.Cancelled
            assert (await queued).text == ""
            assert await engine.cancel(running.id)
            assert not await engine.cancel(running.id)
            assert setup.kv_cache.stats().free_blocks != 64  # the step still writes into them
            setup.executor.gate.set()
            rest = [c async for c in stream]
            assert rest[-1].finish_reason is FinishReason.Cancelled
            num_tokens = 1 + sum(c.token is not None for c in rest)
            assert rest[-1].usage.completion_tokens == num_tokens
            assert "".join(c.text for c in [first, *rest]) == "a" * num_tokens
            assert setup.kv_cache.stats().free_blocks == 64  # with the last piece the blocks are back
            await setup.require_clean()
            assert not await engine.cancel(tools.request("z").id)

    tools.run(main())


@pytest.mark.clause("EN-CANCEL-4")
def test_an_idle_engine_is_drained(tools: Any) -> None:
    async def main() -> None:
        setup = tools.Setup()
        async with setup.engine as engine:
            await engine.drain()
            answer = asyncio.create_task(engine.infer(tools.request("x")))
            await asyncio.sleep(0)
            await engine.drain()
            assert not engine.loop.has_work()
            await answer
            await engine.drain()

    tools.run(main())


WAYS = ("task", "id", "stream")


@pytest.mark.clause("EN-CANCEL-1", "EN-CANCEL-2", "EN-CANCEL-3", "EN-CANCEL-4", "EN-LOOP-4", "EN-LOOP-6")
@settings(max_examples=60)
@given(
    num_blocks=st.integers(24, 60),
    victims=st.lists(
        st.tuples(st.integers(0, 7), st.sampled_from(WAYS), st.integers(0, 25)), max_size=6, unique_by=lambda v: v[0]
    ),
    max_num_batched_tokens=st.sampled_from([3, 17, 64]),
)
def test_cancelling_at_random_moments(
    tools: Any, num_blocks: int, victims: list[tuple[int, str, int]], max_num_batched_tokens: int
) -> None:
    """Survivors' texts are as alone; in the end every block is free and every reference count zero."""

    async def main() -> None:
        setup = tools.Setup(num_blocks, max_num_batched_tokens=max_num_batched_tokens)
        async with setup.engine as engine:
            requests = [tools.request(p, max_tokens=30) for p in PROMPTS]
            plan = {index: (way, moment) for index, way, moment in victims}

            async def streams(request: Any, limit: int) -> str:
                text = ""
                stream = await engine.infer_stream(request)
                async for chunk in stream:
                    text += chunk.text
                    limit -= 1
                    if limit < 0:
                        break
                return text

            async def cancels(moment: int, act: Any) -> None:
                while engine.counters.num_steps < moment and not done.is_set():
                    await asyncio.sleep(0)
                result = act()
                if asyncio.iscoroutine(result):
                    await result

            done = asyncio.Event()
            tasks, helpers = [], []
            for index, request in enumerate(requests):
                way, moment = plan.get(index, ("none", 0))
                work = streams(request, moment) if way == "stream" else engine.infer(request)
                task = asyncio.create_task(work)
                tasks.append(task)
                if way == "task":
                    helpers.append(asyncio.create_task(cancels(moment, task.cancel)))
                elif way == "id":
                    cancel = lambda id=request.id: engine.cancel(id)  # noqa: E731
                    helpers.append(asyncio.create_task(cancels(moment, cancel)))
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            done.set()
            await asyncio.gather(*helpers)
            for index, answer in enumerate(answers):
                expected = tools.expected_text(PROMPTS[index], 30)
                if index not in plan:
                    assert answer.text == expected
                elif not isinstance(answer, asyncio.CancelledError):
                    text = answer if isinstance(answer, str) else answer.text
                    assert expected.startswith(text)
            await setup.require_clean()

    tools.run(main())
