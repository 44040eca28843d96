#!/usr/bin/env python3
"""The judge's verdict on a whole model on one backend, as JSON: the real one if it is here, else a small random one.

    python tools/gpu_model.py --backend ferrum_cupy:make_backend --device cuda [--model smollm2-135m]

Nothing is downloaded. Exit status 0: passed, 1: failed, 2: the backend is not available.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

DEFAULT_MODEL = "smollm2-135m"
QUESTION = "What is the capital of France?"
NUM_GENERATED = 16
PROMPT = (3, 17, 250, 101, 8, 30, 5, 77, 12, 199, 42)
RANDOM_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    arguments = parser.parse_args()

    from ferrum_ref.errors import FerrumError, NotFoundError
    from ferrum_ref.models.source import resolve_model
    from ferrum_ref.parity.model_report import model_as_json
    from ferrum_ref.plugins import load_backend

    try:
        backend = load_backend(arguments.backend, arguments.device)
    except FerrumError as error:
        print(f"gpu_model: {error}", file=sys.stderr)
        return 2
    try:
        path, remark = resolve_model(arguments.model), ""
    except NotFoundError as error:
        path, remark = None, f"{arguments.model} is not on this machine ({error.message}): a small random model instead"
    if path is None:
        name, verdict = "random llama, 4 layers", judge_random(backend)
    else:
        from ferrum_ref.cli.parity_model import judge_model_at

        name, verdict = arguments.model, judge_model_at(path, backend, QUESTION, NUM_GENERATED)
    print(json.dumps({"name": name, "remark": remark, **model_as_json(verdict)}, indent=1))
    return 0 if verdict.passed else 1


def judge_random(backend: Any) -> Any:
    """The verdict on a Llama with random weights."""
    from ferrum_ref.cli.parity_model import judge_decoder
    from ferrum_ref.models.checkpoint import open_checkpoint
    from ferrum_ref.models.decoder import Decoder
    from ferrum_ref.models.decoder_weights import read_decoder_weights

    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder))
        with open_checkpoint(Path(folder)) as checkpoint:
            decoder = Decoder(checkpoint.config, read_decoder_weights(checkpoint, backend), backend)
            return judge_decoder(decoder, checkpoint, PROMPT, NUM_GENERATED)


def write_random(folder: Path) -> None:
    """A checkpoint as Hugging Face writes it: weights N(0, 1/in), gains near 1."""
    from safetensors.numpy import save_file

    config: dict[str, Any] = RANDOM_CONFIG
    rng, hidden, inner = np.random.default_rng(0), config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))

    def matrix(outputs: int, inputs: int) -> Any:
        return (rng.standard_normal((outputs, inputs)) * inputs**-0.5).astype(np.float32)

    def gain() -> Any:
        return (1.0 + 0.1 * rng.standard_normal(hidden)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": rng.standard_normal((config["vocab_size"], hidden)).astype(np.float32),
        "model.norm.weight": gain(),
        "lm_head.weight": matrix(config["vocab_size"], hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (heads, hidden),
            "self_attn.k_proj": (kv_heads, hidden),
            "self_attn.v_proj": (kv_heads, hidden),
            "self_attn.o_proj": (hidden, heads),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = matrix(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = gain()
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
