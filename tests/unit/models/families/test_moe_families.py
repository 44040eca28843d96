"""Whole tiny models with experts, as transformers saves them: logits within the bound, 48 greedy tokens identical."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers

from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.kv_cache.storage_paged import PagedKvStorage

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 40,
}
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
    "moe_intermediate_size": 16,
}
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4}),
    "mixtral, sliding, tied": (
        transformers.MixtralConfig,
        {"num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 12, "tie_word_embeddings": True},
    ),
    "qwen3-moe": (
        transformers.Qwen3MoeConfig,
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "head_dim": 16,
            "norm_topk_prob": True,
        },
    ),
    "qwen3-moe, some layers dense, biased": (
        transformers.Qwen3MoeConfig,
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "head_dim": 10,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "attention_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
        },
    ),
    "deepseek-v3": (transformers.DeepseekV3Config, LATENT),
    "deepseek-v3, yarn with mscale": (
        transformers.DeepseekV3Config,
        {
            **LATENT,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "attention_bias": True,
            "rope_parameters": {**YARN, "mscale": 0.6, "mscale_all_dim": 1.4},
        },
    ),
    "gpt-oss": (
        transformers.GptOssConfig,
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "head_dim": 8,
            "sliding_window": 12,
            "swiglu_limit": 1.1,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
}


@pytest.fixture(params=MODELS)
def tiny(request: pytest.FixtureRequest, tiny_model: Any) -> Any:
    kind, settings = MODELS[request.param]
    return tiny_model(kind, **settings)


@pytest.mark.clause("LM-MOE-1", "LM-MOE-5", "LM-MOE-6", "LM-MOE-7", "LM-MOE-8", "LM-LATENT-1", "LM-LATENT-4")
def test_logits_and_greedy_tokens_equal_transformers(tiny: Any, judge: Any) -> None:
    judge(tiny)


@pytest.mark.clause("LM-MOE-1", "LM-LATENT-3")
def test_pieces_over_paged_caches_beside_other_sequences(tiny: Any, load_tiny: Any) -> None:
    loaded = load_tiny(tiny.path)
    storage = PagedKvStorage(loaded.backend, loaded.kv_shape, num_blocks=30, block_size=8)
    blocks = np.random.default_rng(3).permutation(30).tolist()
    mine, other, start, cached, rows = blocks[:12], blocks[12:24], 0, 0, []
    while start < len(tiny.text):
        piece, beside = tiny.text[start : start + 17], tiny.text[cached : cached + 3]
        batch = ForwardBatch.build([beside, piece], [cached, start]).with_all_logits()
        kv = storage.bind([other, mine], [cached, start], batch.lengths)
        rows.append(loaded.decoder.forward(batch, kv).to_numpy()[len(beside) :])
        start, cached = start + len(piece), cached + len(beside)
    assert np.abs(np.concatenate(rows) - tiny.exact).max() <= tiny.bound


@pytest.mark.clause("LM-MOE-1", "LM-LATENT-2")
def test_the_torch_backend_keeps_the_bound(tiny: Any, logit_error: Any) -> None:
    assert logit_error(tiny, backend="torch") <= tiny.bound
