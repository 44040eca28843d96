"""Small Llama checkpoints: written by transformers, and the same weights written by ggml's GGUF writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF_OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def tiny_llama(**changes: Any) -> transformers.LlamaForCausalLM:
    """Two layers of hidden size 64, 4 query and 2 key/value heads of 16, every weight distinct."""
    sizes = {
        "vocab_size": 40,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def llama_cpp_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: halves of a head become adjacent pairs."""
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    if name in GGUF_OUTER_NAMES:
        return GGUF_OUTER_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_LAYER_NAMES[part]}.{kind}"


def write_gguf(path: Path, model: transformers.LlamaForCausalLM, label: str = "F32") -> Path:
    """The model as a GGUF file; matrices in format `label`, vectors in F32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_eos_token_id(2)
    kind = gguf.GGMLQuantizationType[label]
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                values = llama_cpp_rows(values, heads)
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
        else:
            writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def make_llama() -> Callable[..., transformers.LlamaForCausalLM]:
    return tiny_llama


@pytest.fixture
def make_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Write a model to a GGUF file: make_gguf(model, "Q8_0")."""
    return lambda model, label="F32": write_gguf(tmp_path / f"{label}.gguf", model, label)


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded directory as transformers writes it; not to be changed."""
    directory = tmp_path_factory.mktemp("tiny") / "hf"
    tiny_llama().save_pretrained(directory, max_shard_size="100KB")
    return directory


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in a GGUF file; not to be changed."""
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", tiny_llama())


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The real all-MiniLM-L6-v2 directory; fetched into the user's cache on first use."""
    import argparse

    from ferrum_ref.cli.cache import cache_dir
    from ferrum_ref.models.source import pull_model

    return pull_model("all-minilm-l6-v2", cache_dir(argparse.Namespace(cache_dir=None)))
