"""A tiny random model as a decoder, as an LLM and behind a decode backend, and transformers' answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ferrum_ref.executor.decode_backend import TransformerDecodeBackend
from ferrum_ref.executor.paged import PagedModelExecutor
from ferrum_ref.interfaces.model_executor import (
    ExecutorCapabilities,
    MemoryRequirements,
    PrefillInput,
)
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvCache, ContiguousKvFactory, KvShape
from ferrum_ref.kv_cache.storage_paged import PagedKvStorage
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_llm import DecoderLlm
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.models.transformer_weights import DecoderTransformerWeights
from ferrum_ref.plugins import load_backend
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import ModelId
from ferrum_ref.types.models import ModelInfo, ModelType

VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "one kv head, biases": {"num_kv_heads": 1, "attention_bias": True, "mlp_bias": True},
    "tied, wide heads": {"tie_word_embeddings": True, "hidden_size": 48, "head_dim": 16},
}


IDS = np.random.default_rng(3).integers(0, 97, 90).tolist()


class Bench:
    """A tiny model: as a decoder, as an LLM over contiguous caches, and behind a decode backend."""

    def __init__(self, tiny: Any, backend: str = "numpy", dtype: DataType = DataType.FP32, **options: Any) -> None:
        self.tiny = tiny
        self.compute = load_backend(backend)
        self.decoder = Decoder(tiny.config, read_decoder_weights(tiny, self.compute, dtype), self.compute)
        config = tiny.config
        self.shape = KvShape(config.num_layers, config.num_kv_heads, config.head_dim, dtype)
        caches = ContiguousKvFactory(self.compute, self.shape, self.decoder.max_tokens)
        self.llm: DecoderLlm[ContiguousKvCache] = DecoderLlm(self.decoder, caches)
        self.weights = DecoderTransformerWeights.of_decoder(self.decoder)
        self.decode = TransformerDecodeBackend(self.weights, self.compute, **options)

    def no_kv(self) -> list[Any]:
        dims = (0, self.shape.num_kv_heads, self.shape.head_dim)
        empty = self.compute.tensor_factory().zeros(dims, self.shape.dtype, self.shape.device)
        return [(empty, empty)] * self.shape.num_layers

    def prefilled(self, ids: list[int], block_size: int = 4) -> tuple[Any, Any, Any]:
        """(executor, its handle, storage) after a prefill over paged blocks."""
        return prefilled(self.decoder, self.shape, ids, block_size)

    def steps(self, key: str, ids: list[int], start: int = 0) -> Any:
        """Logits `[len(ids), V]`, one step each."""
        rows = [self.decode.decode_step(token, start + i, key) for i, token in enumerate(ids)]
        assert all(row.shape() == (1, 1, 97) for row in rows)
        return np.concatenate([row.to_numpy()[0] for row in rows])


def prefilled(decoder: Decoder, shape: KvShape, ids: list[int], block_size: int) -> tuple[Any, Any, Any]:
    """A paged executor over the decoder, its handle after a prefill, and the storage it wrote to."""
    config, compute = decoder.config, decoder.backend
    storage = PagedKvStorage(compute, shape, 60, block_size)
    info = ModelInfo(
        ModelId("tiny"), ModelType.Llama, 1, config.hidden_size, config.num_layers, config.num_heads,
        config.num_kv_heads, config.vocab_size, decoder.max_tokens, decoder.dtype, Device.CPU, None, None, {},
    )  # fmt: skip
    capabilities = ExecutorCapabilities(
        8, 96, [], True, True, False, False, False, [DataType.FP32], [Device.CPU], MemoryRequirements(1, 1, 1, 1)
    )
    executor = PagedModelExecutor(
        decoder,
        storage,
        compute.tensor_factory(),
        info,
        capabilities,
        lender=PagedKvCacheManager(60, block_size, storage=storage),
        head_dim=shape.head_dim,
    )
    prompt = compute.tensor_factory().from_ids(ids).reshape((1, len(ids)))
    return executor, asyncio.run(executor.prefill(PrefillInput.new(prompt))).kv_cache, storage


def judged(tiny: Any, ids: list[int]) -> tuple[Any, float]:
    exact = tiny.logits(ids, True)
    return exact, 2 * float(np.abs(tiny.logits(ids, False) - exact).max())


@pytest.fixture(scope="session")
def make_bench() -> Callable[..., Bench]:
    """make_bench(tiny, backend="numpy", dtype=FP32, max_tokens=...)"""
    return Bench


@pytest.fixture(scope="module")
def bench(tiny_llama: Any) -> Bench:
    """Model 7 on numpy."""
    return Bench(tiny_llama(7))


@pytest.fixture(scope="session")
def prefill_paged() -> Callable[..., tuple[Any, Any, Any]]:
    """prefill_paged(decoder, shape, ids, block_size) -> (executor, handle, storage)"""
    return prefilled


@pytest.fixture(scope="session", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    """DecoderConfig fields: grouped queries, biases, tied and wide heads."""
    return VARIANTS[request.param]


@pytest.fixture(scope="session")
def text() -> list[int]:
    """90 token ids."""
    return list(IDS)


@pytest.fixture(scope="session")
def judge() -> Callable[..., tuple[Any, float]]:
    """judge(model, ids) -> transformers' float64 logits, and twice its own float32 error."""
    return judged
