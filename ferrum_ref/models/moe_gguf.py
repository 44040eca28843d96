"""GGUF metadata of models with experts, said in the words of their config.json.

    llama with expert_count (Mixtral)   qwen3moe   deepseek2 (DeepSeek-V3: sigmoid routing)   gpt-oss

Clauses: MD-MOEGGUF-1, MD-MOEGGUF-2 (specs/decoder_families.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from ferrum_ref.errors import ConfigError, InvalidFormatError, UnsupportedError
from ferrum_ref.models.config import DecoderConfig, quoted

_GPT_OSS_TRUNCATE: Final = False
_SOFTMAX, _SIGMOID = 1, 2
_TOKENIZER: Final[Mapping[str, str]] = MappingProxyType(
    {
        "bos_token_id": "tokenizer.ggml.bos_token_id",
        "pad_token_id": "tokenizer.ggml.padding_token_id",
    }
)
_COMMON: Final = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "expert_count",
    "expert_used_count", "expert_gating_func", "expert_weights_norm", "attention.head_count", "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length", "rope.freq_base",
    "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
)  # fmt: skip
_OWN: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "llama": (),
        "qwen3moe": ("expert_feed_forward_length",),
        "gpt-oss": ("expert_feed_forward_length", "attention.sliding_window"),
        "deepseek2": (
            "expert_feed_forward_length", "expert_shared_count", "expert_weights_scale", "expert_group_count",
            "expert_group_used_count", "leading_dense_block_count", "attention.q_lora_rank", "attention.kv_lora_rank",
            "attention.key_length_mla", "attention.value_length_mla", "rope.scaling.yarn_log_multiplier",
        ),
    }
)  # fmt: skip


def is_moe_gguf(metadata: Mapping[str, Any]) -> bool:
    """Whether a file's model is one of those above. Pure."""
    architecture = metadata.get("general.architecture")
    return architecture in _OWN and (architecture != "llama" or bool(metadata.get("llama.expert_count")))


def read_moe_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], source: str) -> DecoderConfig:
    """The configuration of such a file.  [MD-MOEGGUF-1]

    `tensors`: shapes by GGUF's names. Raises InvalidFormatError on missing or impossible values, UnsupportedError on a
    key that means more than this decoder does; both begin with `source`.  Pure.
    """
    keys = _Keys(metadata, source)
    try:
        config = {**_common(keys, tensors), **_READERS[keys.architecture](keys)}
    except ConfigError as error:
        raise InvalidFormatError(f"read {source}: {error.message}") from None
    return DecoderConfig.from_hf(config, source)


class _Keys:
    """The architecture's own keys, without its name; all of them known."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self.architecture = str(metadata["general.architecture"])
        self.metadata = metadata
        prefix = self.architecture + "."
        known = {*_COMMON, *_OWN[self.architecture]}
        self.values: dict[str, Any] = {}
        for key, value in metadata.items():
            if not key.startswith(prefix):
                continue
            name = key.removeprefix(prefix)
            if name not in known and value not in (0, False, None):
                raise UnsupportedError(f"read {source}: {key}: got {quoted(value)}, expected it absent")
            if not isinstance(value, (bool, int, float, str)):
                raise UnsupportedError(f"read {source}: {key}: got an array, expected one value for all layers")
            self.values[name] = value

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def need(self, name: str) -> Any:
        if name not in self.values:
            raise ConfigError(f"{self.architecture}.{name}: got nothing, expected a value")
        return self.values[name]


def _common(keys: _Keys, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise ConfigError(f"tensor token_embd.weight: got {embedding}, expected a matrix of vocabulary x hidden size")
    if keys.get("vocab_size", embedding[0]) != embedding[0]:
        raise ConfigError(f"vocab_size: got {keys.get('vocab_size')}, but token_embd.weight has {embedding[0]} rows")
    ends = ("eos", "eot", "eom")
    found = [keys.metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ends]
    return {
        "vocab_size": embedding[0],
        "hidden_size": keys.need("embedding_length"),
        "intermediate_size": keys.get("feed_forward_length") or keys.need("expert_feed_forward_length"),
        "num_hidden_layers": keys.need("block_count"),
        "num_attention_heads": keys.need("attention.head_count"),
        "num_key_value_heads": keys.get("attention.head_count_kv", keys.need("attention.head_count")),
        "head_dim": keys.get("attention.key_length"),
        "max_position_embeddings": keys.need("context_length"),
        "rms_norm_eps": keys.need("attention.layer_norm_rms_epsilon"),
        "num_experts_per_tok": keys.need("expert_used_count"),
        "rope_parameters": _rope(keys),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "eos_token_id": list(dict.fromkeys(token for token in found if _is_set(token))),
        **{name: keys.metadata[key] for name, key in _TOKENIZER.items() if _is_set(keys.metadata.get(key))},
    }


def _is_set(token: Any) -> bool:
    return token is not None and token != 2**32 - 1


def _rope(keys: _Keys) -> dict[str, Any]:
    kind = keys.get("rope.scaling.type", "none")
    rope: dict[str, Any] = {"rope_type": "default" if kind == "none" else kind}
    if "rope.freq_base" in keys.values:
        rope["rope_theta"] = keys.get("rope.freq_base")
    if kind == "none":
        return rope
    return rope | {
        name: keys.get(key)
        for name, key in (
            ("factor", "rope.scaling.factor"),
            ("original_max_position_embeddings", "rope.scaling.original_context_length"),
            ("beta_fast", "rope.scaling.yarn_beta_fast"),
            ("beta_slow", "rope.scaling.yarn_beta_slow"),
        )
        if key in keys.values and not (kind != "yarn" and name != "factor")
    }


def _mixtral(keys: _Keys) -> dict[str, Any]:
    _require(keys, "expert_gating_func", _SOFTMAX)
    _require(keys, "expert_weights_norm", True)
    return {"model_type": "mixtral", "num_local_experts": keys.need("expert_count")}


def _qwen3_moe(keys: _Keys) -> dict[str, Any]:
    _require(keys, "expert_gating_func", _SOFTMAX)
    return {
        "model_type": "qwen3_moe",
        "num_experts": keys.need("expert_count"),
        "moe_intermediate_size": keys.need("expert_feed_forward_length"),
        "norm_topk_prob": keys.get("expert_weights_norm", True),
    }


def _gpt_oss(keys: _Keys) -> dict[str, Any]:
    _require(keys, "expert_gating_func", _SOFTMAX)
    rope = _rope(keys)
    if rope["rope_type"] == "yarn":
        rope["truncate"] = _GPT_OSS_TRUNCATE
    return {
        "model_type": "gpt_oss",
        "num_local_experts": keys.need("expert_count"),
        "intermediate_size": keys.need("expert_feed_forward_length"),
        "sliding_window": keys.need("attention.sliding_window"),
        "attention_bias": True,
        "rope_parameters": rope,
    }


def _deepseek(keys: _Keys) -> dict[str, Any]:
    _require(keys, "expert_gating_func", _SIGMOID, absent=_SOFTMAX)
    rank, turned = keys.need("attention.kv_lora_rank"), keys.need("rope.dimension_count")
    one_head = "attention.key_length_mla" in keys.values  # keys and values are those of the cached latent
    query = keys.get("attention.key_length_mla") if one_head else keys.need("attention.key_length")
    value = keys.need("attention.value_length_mla" if one_head else "attention.value_length")
    if one_head and keys.get("attention.key_length", rank + turned) != rank + turned:
        raise ConfigError(
            f"deepseek2.attention.key_length: got {keys.get('attention.key_length')}, expected {rank + turned}"
        )
    rope = _rope(keys)
    if rope["rope_type"] == "yarn":  # 0.1 times mscale_all_dim; mscale is the same number wherever it is published
        scale = 10 * keys.get("rope.scaling.yarn_log_multiplier", 0.0)
        rope |= {"mscale": round(scale, 6), "mscale_all_dim": round(scale, 6)} if scale else {}
    return {
        "model_type": "deepseek_v3",
        "num_key_value_heads": keys.need("attention.head_count"),
        "head_dim": turned,
        "n_routed_experts": keys.need("expert_count"),
        "n_shared_experts": keys.need("expert_shared_count"),
        "moe_intermediate_size": keys.need("expert_feed_forward_length"),
        "routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "n_group": keys.get("expert_group_count", 1),
        "topk_group": keys.get("expert_group_used_count", 1),
        "first_k_dense_replace": keys.get("leading_dense_block_count", 0),
        "q_lora_rank": keys.get("attention.q_lora_rank"),
        "kv_lora_rank": rank,
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": query - turned,
        "v_head_dim": value,
        "rope_interleave": True,
        "rope_parameters": rope,
    }


def _require(keys: _Keys, name: str, expected: Any, absent: Any = None) -> None:
    """Raises ConfigError for another value; an absent key means `absent`, or the expected one."""
    value = keys.get(name, expected if absent is None else absent)
    if value != expected:
        raise ConfigError(f"{keys.architecture}.{name}: got {quoted(value)}, expected {expected!r}")


_READERS: Final[Mapping[str, Callable[[_Keys], dict[str, Any]]]] = MappingProxyType(
    {"llama": _mixtral, "qwen3moe": _qwen3_moe, "gpt-oss": _gpt_oss, "deepseek2": _deepseek}
)
