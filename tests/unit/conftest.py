"""Small random Llama models, as weights for the decoder and as transformers models to judge it by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ferrum_ref.models.config import DecoderConfig


@dataclass
class TinyLlama:
    """A random model: a weight source for the decoder, and the same model in transformers."""

    config: DecoderConfig
    tensors: dict[str, NDArray[np.float32]]
    num_reads: dict[str, int] = field(default_factory=dict)

    def read(self, name: str, dtype: Any = np.float32, out: NDArray[Any] | None = None) -> NDArray[Any]:
        self.num_reads[name] = self.num_reads.get(name, 0) + 1
        values = self.tensors[name].astype(dtype)
        if out is None:
            return values
        out[...] = values
        return out

    def logits(self, ids: list[int], double: bool) -> NDArray[Any]:
        """transformers' logits of every position, in float32 or truly in float64."""
        return transformers_logits(self.config, self.tensors, ids, double)[0]


def transformers_model(config: DecoderConfig, tensors: dict[str, NDArray[np.float32]], double: bool) -> Any:
    """LlamaForCausalLM with these weights; `double`: float64 throughout (its own RMSNorm rounds to float32)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    class DoubleNorm(torch.nn.Module):
        def __init__(self, norm: Any) -> None:
            super().__init__()
            self.weight, self.eps = norm.weight, norm.variance_epsilon

        def forward(self, x: Any) -> Any:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

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
    ).eval()
    state = {name: torch.from_numpy(values.copy()) for name, values in tensors.items()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state)
    if double:
        model = model.to(torch.float64)
        model.model.norm = DoubleNorm(model.model.norm)
        for layer in model.model.layers:
            layer.input_layernorm = DoubleNorm(layer.input_layernorm)
            layer.post_attention_layernorm = DoubleNorm(layer.post_attention_layernorm)
    return model


def transformers_logits(
    config: DecoderConfig, tensors: dict[str, NDArray[np.float32]], ids: list[int], double: bool
) -> tuple[NDArray[Any], list[NDArray[Any]]]:
    """(logits [T, V], hidden states: embedding, then the residual after each layer but the last)."""
    import torch

    with torch.no_grad():
        out = transformers_model(config, tensors, double)(torch.tensor([ids]), output_hidden_states=True)
    return out.logits[0].numpy(), [state[0].numpy() for state in out.hidden_states[:-1]]


def random_tensors(config: DecoderConfig, seed: int) -> dict[str, NDArray[np.float32]]:
    """Every tensor of such a model, with norms and biases that matter."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def vector(size: int, around: float) -> NDArray[np.float32]:
        return (around + 0.3 * rng.standard_normal(size)).astype(np.float32)

    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tensors = {"model.embed_tokens.weight": matrix(config.vocab_size, hidden), "model.norm.weight": vector(hidden, 1)}
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = matrix(config.vocab_size, hidden)
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = vector(hidden, 1)
        attention = {"q_proj": (query, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
        attention["o_proj"] = (hidden, query)
        mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        groups = (("self_attn", attention, config.attention_bias), ("mlp", mlp, config.mlp_bias))
        for part, shapes, has_bias in groups:
            for name, (rows, columns) in shapes.items():
                tensors[f"{layer}.{part}.{name}.weight"] = matrix(rows, columns)
                if has_bias:
                    tensors[f"{layer}.{part}.{name}.bias"] = vector(rows, 0)
    return tensors


def make_tiny_llama(seed: int = 0, **changes: Any) -> TinyLlama:
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 96,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    config = DecoderConfig(**{**settings, **changes})
    return TinyLlama(config, random_tensors(config, seed))


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., TinyLlama]:
    """tiny_llama(seed=0, **DecoderConfig fields) -> a random model of a few thousand weights."""
    return make_tiny_llama


@pytest.fixture(scope="session")
def judge_logits() -> Callable[..., tuple[NDArray[Any], list[NDArray[Any]]]]:
    """transformers' logits and hidden states of given weights, in float32 or float64."""
    return transformers_logits
