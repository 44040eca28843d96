"""Checkpoints that transformers writes, a loader over them, and what their executors say."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ferrum_ref.builder import DecoderModelBuilder
from ferrum_ref.interfaces.model_executor import DecodeInput, PrefillInput
from ferrum_ref.interfaces.weights import WeightLoaderConfig
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.types.devices import DataType
from ferrum_ref.types.models import ModelConfig
from ferrum_ref.weights.loader import SourceWeightLoader

BACKEND = make_backend()
NUM_TOKENS = 24


@dataclass
class SavedModel:
    """A directory that transformers wrote, the model in it, and what transformers says of a prompt."""

    path: Path
    tiny: Any
    ids: list[int]
    exact: NDArray[np.float64]
    bound: float

    def config(self, **changes: Any) -> ModelConfig:
        """FP32 settings for this directory, without a warning."""
        return dataclasses.replace(
            ModelConfig.new("tiny", str(self.path)), dtype=DataType.FP32, max_sequence_length=96, **changes
        )

    def error(self, logits: Any) -> float:
        return float(np.abs(logits - self.exact).max())


def save_with_transformers(path: Path, tiny: Any, max_shard_size: str | None = None) -> None:
    """config.json and weights as transformers writes them, and a tokenizer of one word per id."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    config = tiny.config
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_word_embeddings,
            attention_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
        )
    )
    state = {name: torch.from_numpy(values.copy()) for name, values in tiny.tensors.items()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state)
    model.save_pretrained(path, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(path / "tokenizer.json"))


@pytest.fixture(scope="session")
def saved(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SavedModel]:
    """saved(seed=0, shards=None, **DecoderConfig fields) -> the directory; each combination is written once."""
    made: dict[str, SavedModel] = {}

    def make(seed: int = 0, shards: str | None = None, **changes: Any) -> SavedModel:
        key = repr((seed, shards, sorted(changes.items())))
        if key not in made:
            tiny = tiny_llama(seed, **changes)
            path = tmp_path_factory.mktemp("model")
            save_with_transformers(path, tiny, shards)
            ids = np.random.default_rng(seed).integers(0, tiny.config.vocab_size, NUM_TOKENS).tolist()
            exact = tiny.logits(ids, True)
            made[key] = SavedModel(path, tiny, ids, exact, 2 * np.abs(tiny.logits(ids, False) - exact).max())
        return made[key]

    return make


@pytest.fixture(scope="session")
def backend() -> Any:
    return BACKEND


@pytest.fixture
def loader() -> SourceWeightLoader:
    return SourceWeightLoader(WeightLoaderConfig(False, None, None, 2, 20, True, {}), BACKEND.tensor_factory())


@pytest.fixture
def builder() -> DecoderModelBuilder:
    return DecoderModelBuilder()


@pytest.fixture(scope="session")
def run() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    return asyncio.run


@pytest.fixture(scope="session")
def prompt_logits() -> Callable[..., NDArray[np.float32]]:
    """prompt_logits(executor, ids) -> [T, V] of one prefill in a cache of its own."""

    def logits(executor: Any, ids: list[int], backend: Any = BACKEND) -> NDArray[np.float32]:
        found = asyncio.run(executor.prefill(PrefillInput.new(backend.tensor_factory().from_ids(ids))))
        executor.release_cache(found.kv_cache.cache_id())
        return np.asarray(found.logits.to_numpy(), dtype=np.float32)[0]

    return logits


@pytest.fixture(scope="session")
def stepped_logits() -> Callable[..., NDArray[np.float32]]:
    """stepped_logits(executor, ids, n) -> [T, V]: a prefill of n tokens, then one decode after the other."""

    def logits(executor: Any, ids: list[int], num_prompt: int) -> NDArray[np.float32]:
        factory = BACKEND.tensor_factory()

        async def steps() -> list[Any]:
            first = await executor.prefill(PrefillInput.new(factory.from_ids(ids[:num_prompt])))
            rows, handle = [first.logits.to_numpy()[0]], first.kv_cache
            for token in ids[num_prompt:]:
                out = await executor.decode(DecodeInput.new(factory.from_ids([token]).reshape((1, 1)), handle))
                rows.append(out.logits.to_numpy())
                handle = out.kv_cache
            executor.release_cache(handle.cache_id())
            return rows

        return np.concatenate(asyncio.run(steps()))

    return logits
