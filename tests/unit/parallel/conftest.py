"""Tiny models of every family as their ranks run them, and the fixtures of the families' own tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ferrum_ref.interfaces.collectives import Collectives
from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory, KvShape
from ferrum_ref.kv_cache.storage_latent import LatentKvFactory
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.parallel.decoder import read_rank
from ferrum_ref.parallel.in_process import run_ranks
from ferrum_ref.parallel.pipeline import read_stage
from ferrum_ref.parallel.rules import ExpertSharding
from ferrum_ref.parallel.subgroup import grid
from ferrum_ref.plugins import load_backend
from ferrum_ref.types.devices import DataType

_FAMILIES = Path(__file__).resolve().parent.parent / "models" / "families" / "conftest.py"
_spec = importlib.util.spec_from_file_location("parallel_family_fixtures", _FAMILIES)
assert _spec is not None
assert _spec.loader is not None
_families = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _families
_spec.loader.exec_module(_families)
tiny_model = _families.tiny_model
load_tiny = _families.load_tiny

Logits = NDArray[np.float32]


def logits_in(decoder: Decoder, pieces: list[list[int]]) -> Logits:
    """Logits of every row of a text, fed piece by piece over this rank's own cache."""
    config = decoder.config
    shape = KvShape(len(decoder.weights.layers), config.num_kv_heads, config.head_dim, decoder.dtype)
    kind = ContiguousKvFactory if config.latent is None else LatentKvFactory
    factory = kind(decoder.backend, shape, decoder.max_tokens)
    cache, start, rows = factory.new_cache(), 0, []
    for piece in pieces:
        batch = ForwardBatch.build([piece], [start]).with_all_logits()
        kv = factory.bind([cache], batch.lengths)
        rows.append(decoder.forward(batch, kv).to_numpy())
        kv.commit()
        start += len(piece)
    return np.concatenate(rows)


def in_pieces(ids: list[int]) -> list[list[int]]:
    """A prompt, two tokens at once, one token alone."""
    return [ids[:-3], ids[-3:-1], ids[-1:]]


@pytest.fixture(scope="session")
def sharded_logits() -> Callable[..., list[Logits]]:
    """sharded_logits(path, num_ranks, ids, experts=SPLIT, backend="numpy", dtype=FP32) -> the logits of each rank."""

    def run(
        path: Path,
        num_ranks: int,
        ids: list[int],
        experts: ExpertSharding = ExpertSharding.SPLIT,
        backend: str = "numpy",
        dtype: DataType = DataType.FP32,
        whole: bool = False,
    ) -> list[Logits]:
        def work(peers: Collectives) -> Logits:
            decoder = read_rank(checkpoint, load_backend(backend), peers, dtype, experts=experts)
            return logits_in(decoder, [ids] if whole else in_pieces(ids))

        with open_checkpoint(path) as checkpoint:
            return run_ranks(num_ranks, work)

    return run


@pytest.fixture(scope="session")
def staged_logits() -> Callable[..., list[Logits]]:
    """staged_logits(path, num_ranks, ids, num_shards=1, dtype=FP32) -> the logits of each rank."""

    def run(
        path: Path, num_ranks: int, ids: list[int], num_shards: int = 1, dtype: DataType = DataType.FP32
    ) -> list[Logits]:
        def work(world: Collectives) -> Logits:
            peers, stages = grid(world, num_shards)
            return logits_in(read_stage(checkpoint, load_backend("numpy"), stages, peers, dtype), in_pieces(ids))

        with open_checkpoint(path) as checkpoint:
            return run_ranks(num_ranks, work)

    return run


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24}
LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 18,
}
NO_LLAMA_SIZES: dict[str, Any] = dict.fromkeys(
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    ],
    ...,
)
GPT2 = {**NO_LLAMA_SIZES, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 160, "n_inner": 42}
GEMMA2 = {
    "head_dim": 16,
    "sliding_window": 9,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 8.0,
    "tie_word_embeddings": True,
}
GEMMA3 = {
    "head_dim": 16,
    "sliding_window": 9,
    "query_pre_attn_scalar": 24,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
GPT_OSS = {
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "head_dim": 8,
    "sliding_window": 12,
    "swiglu_limit": 1.1,
    "rope_parameters": {**YARN, "truncate": False},
}
QWEN3_MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 18,
    "head_dim": 16,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "intermediate_size": 42}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": 9}),
    "gemma 2": ("Gemma2Config", GEMMA2),
    "gemma 3": ("Gemma3TextConfig", GEMMA3),
    "phi 3": ("Phi3Config", {"sliding_window": 9, "intermediate_size": 42}),
    "gpt 2": ("GPT2Config", {**GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "gpt-neox": ("GPTNeoXConfig", {"num_key_value_heads": ..., "rope_parameters": {"partial_rotary_factor": 0.5}}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen3-moe": ("Qwen3MoeConfig", QWEN3_MOE),
    "deepseek-v3": ("DeepseekV3Config", {**LATENT, "n_shared_experts": 2, "attention_bias": True}),
    "gpt-oss": ("GptOssConfig", GPT_OSS),
}
NUM_TOKENS = 44  # beyond every window, and beyond the context that YaRN stretches


@pytest.fixture(scope="session")
def family_model(tiny_model: Callable[..., Any]) -> Callable[[str], Any]:
    """family_model(name) -> the family's tiny checkpoint; `.ids`, `.exact` and `.bound` are of one text."""
    import transformers

    known: dict[str, SimpleNamespace] = {}

    def make(name: str) -> SimpleNamespace:
        if name not in known:
            kind, settings = FAMILIES[name]
            tiny = tiny_model(getattr(transformers, kind), **settings)
            ids = np.random.default_rng(5).integers(3, tiny.config.vocab_size, NUM_TOKENS).tolist()
            exact = tiny.exact_logits(ids)
            bound = _families.ALLOWED_FACTOR * float(np.abs(tiny.single_logits(ids) - exact).max())
            known[name] = SimpleNamespace(path=tiny.path, config=tiny.config, ids=ids, exact=exact, bound=bound)
        return known[name]

    return make


@pytest.fixture(params=FAMILIES)
def each_family(request: pytest.FixtureRequest, family_model: Callable[[str], Any]) -> Any:
    """The tiny checkpoint of every family in turn."""
    return family_model(request.param)


@pytest.fixture(scope="session")
def single_logits() -> Callable[..., Logits]:
    """single_logits(path, ids, backend="numpy", dtype=FP32): the undivided decoder, fed in the same pieces."""

    def run(
        path: Path, ids: list[int], backend: str = "numpy", dtype: DataType = DataType.FP32, whole: bool = False
    ) -> Logits:
        with open_checkpoint(path) as checkpoint:
            kernels = load_backend(backend)
            weights = read_decoder_weights(checkpoint, kernels, dtype)
            return logits_in(Decoder(checkpoint.config, weights, kernels), [ids] if whole else in_pieces(ids))

    return run
