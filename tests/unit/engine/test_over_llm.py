"""An engine over an LLM that keeps its own caches and steps: the tokens of the LLM alone, crowded or not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrum_ref.assembly import LoadedModel
from ferrum_ref.executor.decode_backend import TransformerDecodeBackend
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.serving import build_llm_engine
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import ModelId
from ferrum_ref.types.models import ModelInfo, ModelType
from ferrum_ref.types.requests import InferenceRequest
from ferrum_ref.types.sampling import SamplingParams

EOS, MAX_TOKENS = 256, 12
PROMPTS = [("abcdefgh" * 8)[: 3 + 8 * i] + str(i) for i in range(6)]


def stepping(backend: ComputeBackend) -> ComputeBackend:
    """The backend, with the reference's decode step as its own."""

    def make(weights: Any) -> TransformerDecodeBackend:
        return TransformerDecodeBackend(weights, backend)

    setattr(backend, "make_decode_backend", make)  # noqa: B010
    return backend


@pytest.fixture(scope="module")
def tiny(tools: Any, tiny_llama: Any) -> LoadedModel:
    source = tiny_llama(seed=5, vocab_size=257, max_position_embeddings=256)
    config, backend = source.config, stepping(make_backend("cpu"))
    info = ModelInfo(
        ModelId("tiny"), ModelType.Llama, 0, config.hidden_size, config.num_layers, config.num_heads,
        config.num_kv_heads, config.vocab_size, 256, DataType.FP32, Device.CPU, None, None, {},
    )  # fmt: skip
    decoder = Decoder(config, read_decoder_weights(source, backend), backend, 256)
    return LoadedModel(info, config, tools.tokenizer(), decoder, backend, Path("tiny"), frozenset([EOS]))


def greedy(loaded: LoadedModel, prompt: str) -> list[int]:
    llm, ids = loaded.new_llm(), list(loaded.tokenizer.encode(prompt, True))
    logits, tokens = llm.prefill("alone", ids), list[int]()
    while len(tokens) < MAX_TOKENS:
        tokens.append(int(np.argmax(logits)))
        if tokens[-1] == EOS:
            break
        logits = llm.decode("alone", tokens[-1], len(ids) + len(tokens) - 1)
    return tokens


@pytest.mark.clause("LM-LOAD-6", "LM-LLM-15")
@pytest.mark.parametrize(("num_blocks", "max_num_batched_tokens"), [(24, 9), (24, 128), (500, 128)])
def test_requests_answer_as_each_alone(
    tools: Any, tiny: LoadedModel, num_blocks: int, max_num_batched_tokens: int
) -> None:
    llm = tiny.new_stepped_llm()
    limits = {"num_blocks": num_blocks, "block_size": 4, "max_num_batched_tokens": max_num_batched_tokens}
    engine = build_llm_engine(tiny, llm, max_num_seqs=6, **limits)

    async def crowd() -> list[list[int]]:
        async with engine:
            params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
            requests = [InferenceRequest.new(prompt, "tiny").with_sampling_params(params) for prompt in PROMPTS]
            return [
                [int(token) for token in answer.tokens] for answer in await asyncio.gather(*map(engine.infer, requests))
            ]

    assert tools.run(crowd()) == [greedy(tiny, prompt) for prompt in PROMPTS]
    assert (engine.counters.num_preemptions > 0) == (num_blocks < 500)


@pytest.mark.clause("LM-LOAD-6")
def test_no_prefix_is_shared(tools: Any, tiny: LoadedModel) -> None:
    """The same prompt twice, one after the other: the second one is computed whole."""
    engine = build_llm_engine(tiny, tiny.new_stepped_llm(), num_blocks=100, block_size=4)

    async def twice() -> list[list[int]]:
        async with engine:
            params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
            requests = [InferenceRequest.new(PROMPTS[5], "tiny").with_sampling_params(params) for _ in range(2)]
            return [[int(token) for token in (await engine.infer(request)).tokens] for request in requests]

    assert tools.run(twice()) == [greedy(tiny, PROMPTS[5])] * 2
