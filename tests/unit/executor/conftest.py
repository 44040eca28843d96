"""Tiny random models behind executors, and transformers' answers for the same weights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ferrum_ref.assembly import LoadedModel
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import ModelId
from ferrum_ref.types.models import ModelInfo, ModelType

BACKEND = make_backend()


@pytest.fixture(scope="session")
def load_tiny(tiny_llama: Any) -> Callable[..., LoadedModel]:
    """load_tiny(seed=0, backend=numpy's, **DecoderConfig fields) -> the random model, loaded, without a tokenizer."""

    def load(seed: int = 0, backend: Any = BACKEND, **changes: Any) -> LoadedModel:
        tiny = tiny_llama(seed, **changes)
        config = tiny.config
        decoder = Decoder(config, read_decoder_weights(tiny, backend), backend)
        info = ModelInfo(
            ModelId(f"tiny-{seed}"), ModelType.Llama, 1, config.hidden_size, config.num_layers, config.num_heads,
            config.num_kv_heads, config.vocab_size, config.max_position_embeddings, DataType.FP32, Device.CPU, None,
            None, {},
        )  # fmt: skip
        tokenizer: Any = None
        return LoadedModel(info, config, tokenizer, decoder, backend, Path("."), frozenset())

    return load


@pytest.fixture(scope="session")
def judge7(tiny_llama: Any, load_tiny: Any) -> SimpleNamespace:
    """Model 7: loaded, and exact(ids) -> float64 logits; `bound` is twice transformers' own float32 error."""
    tiny = tiny_llama(7)
    ids = np.random.default_rng(3).integers(0, 97, 60).tolist()
    exact = tiny.logits(ids, True)
    bound = 2 * np.abs(tiny.logits(ids, False) - exact).max()

    @cache
    def logits(text: tuple[int, ...]) -> Any:
        return tiny.logits(list(text), True)

    def right(found: Any, text: list[int], row: int = -1) -> bool:
        """Is `found` `[V]` the logits after text[row]."""
        return bool(np.abs(np.asarray(found).reshape(-1) - logits(tuple(text))[row]).max() <= bound)

    return SimpleNamespace(tiny=tiny, loaded=load_tiny(7), ids=ids, bound=bound, exact=logits, right=right)


@pytest.fixture(scope="session")
def run() -> Callable[[Any], Any]:
    return asyncio.run


@pytest.fixture(scope="session")
def tensor() -> Callable[..., Any]:
    """tensor([[1, 2]]) -> a UINT32 tensor of that shape; another numpy dtype if given."""

    def make(values: Any, dtype: Any = np.uint32) -> Any:
        return BACKEND.tensor_factory().from_numpy(np.asarray(values, dtype=dtype))

    return make


@pytest.fixture(scope="session")
def transformers_7(judge7: SimpleNamespace, judge_logits: Any) -> Callable[[str], Any]:
    """transformers_7("eager" | "sdpa") -> model 7 in transformers, float64."""
    build = judge_logits.__globals__["transformers_model"]

    def make(attention: str) -> Any:
        model = build(judge7.tiny.config, judge7.tiny.tensors, True)
        model.set_attn_implementation(attention)
        return model

    return make
