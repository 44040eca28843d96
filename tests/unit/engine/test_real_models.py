"""The engine over decoders with real arithmetic: a tiny random Llama under hypothesis, and SmolLM2."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_ref.assembly import LoadedModel, load_model
from ferrum_ref.interfaces.tokenizer import ChatMessage
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.serving import build_engine
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import ModelId
from ferrum_ref.types.models import ModelInfo, ModelType
from ferrum_ref.types.requests import InferenceRequest
from ferrum_ref.types.sampling import FinishReason, SamplingParams

EOS = 256
MAX_TOKENS = 12


@pytest.fixture(scope="session")
def tiny(tools: Any, tiny_llama: Callable[..., Any]) -> LoadedModel:
    """A random Llama over bytes, with the engine's byte tokenizer."""
    source = tiny_llama(seed=5, vocab_size=257, max_position_embeddings=256)
    config, backend = source.config, make_backend("cpu")
    info = ModelInfo(
        ModelId("tiny"), ModelType.Llama, 0, config.hidden_size, config.num_layers, config.num_heads,
        config.num_kv_heads, config.vocab_size, 256, DataType.FP32, Device.CPU, None, None, {},
    )  # fmt: skip
    decoder = Decoder(config, read_decoder_weights(source, backend), backend, 256)
    return LoadedModel(info, config, tools.tokenizer(), decoder, backend, Path("tiny"), frozenset([EOS]))


def greedy(loaded: LoadedModel, prompt: str, max_tokens: int) -> list[int]:
    """Greedy continuation by the decoder with its contiguous cache: no engine, no blocks."""
    llm = loaded.new_llm()
    ids = list(loaded.tokenizer.encode(prompt, True))
    logits = llm.prefill("alone", ids)
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        tokens.append(int(np.argmax(logits)))
        if tokens[-1] in loaded.stop_token_ids:
            break
        logits = llm.decode("alone", tokens[-1], len(ids) + len(tokens) - 1)
    return tokens


PROMPTS = [("abcdefgh" * 8)[: 3 + 8 * i] + str(i) for i in range(8)]


@pytest.fixture(scope="session")
def tiny_answers(tiny: LoadedModel) -> list[list[int]]:
    return [greedy(tiny, prompt, MAX_TOKENS) for prompt in PROMPTS]


Victims = list[tuple[int, bool, int]]  # index of the request; cancelled by its task or by id; after which step


async def serve_tiny(
    tiny: LoadedModel, expected: list[list[int]], num_blocks: int, max_num_batched_tokens: int, victims: Victims
) -> int:
    """Eight requests, some cancelled; checks tokens and blocks, and gives the number of preemptions."""
    engine = build_engine(
        tiny, num_blocks=num_blocks, block_size=4, max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=8
    )
    async with engine:
        params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
        requests = [InferenceRequest.new(p, "tiny").with_sampling_params(params) for p in PROMPTS]
        tasks = [asyncio.create_task(engine.infer(request)) for request in requests]
        for index, by_task, moment in sorted(victims, key=lambda v: v[2]):
            while engine.counters.num_steps < moment and not all(task.done() for task in tasks):
                await asyncio.sleep(0)
            if by_task:
                tasks[index].cancel()
            else:
                await engine.cancel(requests[index].id)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        cancelled = {index for index, *_ in victims}
        for index, (answer, tokens) in enumerate(zip(answers, expected, strict=True)):
            if index not in cancelled:
                assert answer.tokens == tokens
            elif not isinstance(answer, asyncio.CancelledError):
                assert answer.tokens == tokens[: len(answer.tokens)]
        await engine.drain()
        engine.loop.check_invariants()
        counts = engine.cache_metrics_snapshot()
        assert counts["free_blocks"] == counts["total_blocks"] == num_blocks
        assert counts["active_caches"] == 0
        return engine.counters.num_preemptions


@pytest.mark.clause("EN-LOOP-1", "EN-LOOP-4", "EN-LOOP-6", "EN-BUILD-1", "EN-BUILD-2")
@pytest.mark.parametrize("max_num_batched_tokens", [9, 128])
def test_a_tiny_llama_that_is_preempted(
    tools: Any, tiny: LoadedModel, tiny_answers: list[list[int]], max_num_batched_tokens: int
) -> None:
    assert tools.run(serve_tiny(tiny, tiny_answers, 24, max_num_batched_tokens, [])) > 0


@pytest.mark.clause("EN-LOOP-1", "EN-LOOP-6", "EN-CANCEL-1", "EN-CANCEL-3", "EN-CANCEL-4")
@settings(max_examples=25)
@given(
    num_blocks=st.integers(18, 40),
    max_num_batched_tokens=st.sampled_from([7, 33, 128]),
    victims=st.lists(
        st.tuples(st.integers(0, 7), st.booleans(), st.integers(0, 20)), max_size=5, unique_by=lambda v: v[0]
    ),
)
def test_a_tiny_llama_cancelled_at_random_moments(
    tools: Any,
    tiny: LoadedModel,
    tiny_answers: list[list[int]],
    num_blocks: int,
    max_num_batched_tokens: int,
    victims: Victims,
) -> None:
    """Whoever is not cancelled gets the decoder's own tokens; every block comes back."""
    tools.run(serve_tiny(tiny, tiny_answers, num_blocks, max_num_batched_tokens, victims))


@pytest.mark.clause("EN-BUILD-3")
def test_blocks_follow_from_the_memory_given(tools: Any, tiny: LoadedModel) -> None:
    per_token = tiny.kv_shape.bytes_per_token()
    engine = build_engine(tiny, block_size=8, kv_memory_bytes=per_token * 8 * 5 + 7, max_num_seqs=4)
    assert engine.cache_metrics_snapshot()["total_blocks"] == 5
    assert engine.loop.context_limit_tokens == 40
    ample = build_engine(tiny, block_size=8, max_num_seqs=2)
    assert ample.cache_metrics_snapshot()["total_blocks"] == 2 * 256 // 8
    memory = tools.run(ample.status()).memory_usage
    assert memory.total_bytes == memory.cache_memory_bytes == 512 * per_token


QUESTIONS = [
    "What is the capital of France?",
    "Hello",
    "Why is the sky blue? Answer in one sentence please, with words that a child knows.",
    "Tell me about the sea.",
    "Count: one two three",
    "Once upon a time, in a land far away where the mountains met the sea and the rivers ran with silver light, there"
    " lived an old woman who",
    "List three fruits.",
    "2+2=",
]


@pytest.mark.model
@pytest.mark.clause("EN-LOOP-1", "EN-LOOP-4", "EN-LOOP-6", "EN-BUILD-2")
def test_eight_chats_with_smollm2_answer_as_each_alone(tools: Any, smollm2_path: Path) -> None:
    """Mixed prompt lengths over 50 blocks of 4 tokens: preempted, and yet the same texts as alone."""
    loaded = load_model(smollm2_path)
    prompts = [loaded.tokenizer.apply_chat_template([ChatMessage.user(q)]) for q in QUESTIONS]
    lengths = [8] + [5] * 7  # the first is done with "The capital of France is Paris." and its end token
    alone = [greedy(loaded, *pair) for pair in zip(prompts, lengths, strict=True)]

    async def main() -> None:
        engine = build_engine(loaded, num_blocks=50, block_size=4, max_num_batched_tokens=64)
        async with engine:
            requests = [
                InferenceRequest.new(prompt, loaded.info.model_id).with_sampling_params(
                    SamplingParams(temperature=0.0, max_tokens=length)
                )
                for prompt, length in zip(prompts, lengths, strict=True)
            ]
            answers = await asyncio.gather(*map(engine.infer, requests))
            assert engine.counters.num_preemptions > 0
            assert len({a.usage.prompt_tokens for a in answers}) > 4
            for answer, expected in zip(answers, alone, strict=True):
                assert answer.tokens == expected
                visible = [t for t in expected if t not in loaded.stop_token_ids]
                assert answer.text == loaded.tokenizer.decode(visible, True)
            assert "Paris" in answers[0].text
            assert answers[0].finish_reason is FinishReason.EOS
            await engine.drain()
            engine.loop.check_invariants()
            counts = engine.cache_metrics_snapshot()
            assert counts["free_blocks"] == counts["total_blocks"] == 50

    tools.run(main())
