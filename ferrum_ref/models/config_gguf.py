"""GGUF metadata -> DecoderConfig, for the architectures whose decoders llama.cpp describes there.

Clauses: MD-CONFIG-3, MD-CONFIG-6 (specs/model_files.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from ferrum_ref.errors import ConfigError, InvalidFormatError, UnsupportedError
from ferrum_ref.models.config import DEFAULT_ROPE_THETA, FULL, SLIDING, DecoderConfig, quoted
from ferrum_ref.models.config_fields import positive_number
from ferrum_ref.models.config_gguf_archs import ARCHITECTURES, GgufArchitecture
from ferrum_ref.models.rope_config import RopeSettings

# Keys under the architecture's name that change the logits: name -> the values that leave them as they are.
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "attention.causal": (None, True),
        "attention.clamp_kqv": (None, 0),
        "attention.max_alibi_bias": (None, 0),
        "attention.output_scale": (None, 0, 1),
        "attention.scale": (None, 0),
        "attention.sliding_window": (None, 0),
        "attn_logit_softcapping": (None, 0),
        "embedding_scale": (None, 0, 1),
        "expert_count": (None, 0),
        "final_logit_softcapping": (None, 0),
        "logit_scale": (None, 0, 1),
        "residual_scale": (None, 0, 1),
        "rope.scale_linear": (None, 0, 1),
        "use_parallel_residual": (None, False),
    }
)
_LONG_AND_SHORT: Final = ("rope_factors_long.weight", "rope_factors_short.weight")
_ROPE_FREQS: Final = "rope_freqs.weight"


def read_gguf_config(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], source: str) -> DecoderConfig:
    """See DecoderConfig.from_gguf."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        found = quoted(name) if isinstance(name, str) else None
        raise UnsupportedError(
            f"read {source}: general.architecture: got {found}, expected one of {', '.join(ARCHITECTURES)}"
        )
    fields = _Fields(metadata, tensors, source, name, ARCHITECTURES[name])
    fields.refuse_foreign()
    try:
        return fields.build()
    except ConfigError as error:
        raise InvalidFormatError(f"read {source}: {error.message}") from None


def gguf_eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Every id that ends a text or a turn: eos, eot and eom, in that order, without repeats.  Raises ConfigError."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    found = [_token_id(metadata, key) for key in keys]
    return tuple(dict.fromkeys(token for token in found if token is not None))


class _Fields:
    """Metadata under one architecture's name, and the shapes of the tensors, which decide what it leaves open."""

    def __init__(
        self,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, tuple[int, ...]],
        source: str,
        name: str,
        architecture: GgufArchitecture,
    ) -> None:
        self._metadata = _scalars(metadata, source, name)
        self._pattern = metadata.get(f"{name}.attention.sliding_window_pattern")
        self._tensors = tensors
        self._source = source
        self._name = name
        self._architecture = architecture

    def build(self) -> DecoderConfig:
        """Raises ConfigError, UnsupportedError."""
        metadata, tensors, architecture = self._metadata, self._tensors, self._architecture
        hidden_size, num_heads = self.size("embedding_length"), self.size("attention.head_count")
        head_dim = self.get("attention.key_length")
        if head_dim is None:
            if hidden_size % num_heads:
                raise ConfigError(
                    f"{self.key('embedding_length')}: got {hidden_size}, expected a multiple of {num_heads} heads"
                )
            head_dim = hidden_size // num_heads
        if self.get("attention.value_length", head_dim) != head_dim:
            self.refuse("attention.value_length", f"head_dim {head_dim}")
        layer_norm = architecture.fixed.get("norm") == "layer"
        found: dict[str, Any] = {
            "architecture": architecture.family,
            "vocab_size": self._vocab_size(),
            "hidden_size": hidden_size,
            "intermediate_size": self.size("feed_forward_length"),
            "num_layers": self.size("block_count"),
            "num_heads": num_heads,
            "num_kv_heads": self.size("attention.head_count_kv", num_heads),
            "head_dim": head_dim,
            "max_position_embeddings": self.size("context_length"),
            "rms_norm_eps": self.need(f"attention.layer_norm_{'' if layer_norm else 'rms_'}epsilon"),
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": "blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in tensors or "blk.0.ffn_gate.bias" in tensors,
            "eos_token_ids": gguf_eos_token_ids(metadata),
            "bos_token_id": _token_id(metadata, "tokenizer.ggml.bos_token_id"),
            "pad_token_id": _token_id(metadata, "tokenizer.ggml.padding_token_id"),
            **architecture.fixed,
        }
        if found["attention_bias"] and "blk.0.attn_output.bias" not in tensors:
            found["attention_output_bias"] = False
        if not found.get("learned_positions"):
            found |= self._rope(head_dim)
        if "attention.sliding_window" in architecture.knows:
            found |= self._windows(found["num_layers"])
        if "use_parallel_residual" in architecture.knows:
            found["parallel_residual"] = bool(self.get("use_parallel_residual", True))
        return DecoderConfig(**{**found, **self._gemma(found)})

    def _gemma(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Scales and caps of Gemma; as llama.cpp has them where the file is silent.  [MD-CONFIG-6]"""
        architecture = self._architecture
        if not architecture.large_layers:
            return {}
        hidden_size, per_head = found["hidden_size"], found["head_dim"]
        if found["num_layers"] == architecture.large_layers:
            per_head = hidden_size // found["num_heads"]
        caps = {"final_softcap": self.get("final_logit_softcapping", 0)}
        if "attn_logit_softcapping" in architecture.knows:
            caps["attention_softcap"] = self.get("attn_logit_softcapping", 0)
        return {"embedding_scale": hidden_size**0.5, "query_scale": per_head**-0.5, **caps}

    def _windows(self, num_layers: int) -> dict[str, Any]:
        if not self.get("attention.sliding_window"):
            return {}
        window, pattern = self.size("attention.sliding_window"), self._architecture.pattern
        if isinstance(self._pattern, (list, tuple)) or hasattr(self._pattern, "tolist"):
            slides = [bool(each) for each in self._pattern]  # type: ignore[union-attr]
        else:
            pattern = self.size("attention.sliding_window_pattern", pattern) if pattern else 0
            slides = [bool((layer + 1) % pattern) if pattern else True for layer in range(num_layers)]
        types = tuple(SLIDING if each else FULL for each in slides)
        return {"sliding_window": window, "layer_types": types} if SLIDING in types else {}

    def _rope(self, head_dim: int) -> dict[str, Any]:
        turned = self.get("rope.dimension_count", head_dim)
        if turned != head_dim and not self._architecture.turns_parts:
            self.refuse("rope.dimension_count", f"head_dim {head_dim}")
        theta = self.get("rope.freq_base", DEFAULT_ROPE_THETA)
        scaling = self._scaling()
        plain: dict[str, Any] = {"rope_theta": theta}
        if self._architecture.family == "gemma3_text":
            local = RopeSettings(rotary_dim=turned, theta=self.get("rope.freq_base_swa", DEFAULT_ROPE_THETA))
            return {
                **plain,
                "rope": RopeSettings(rotary_dim=turned, theta=theta, **scaling),
                "local_rope": local,
            }
        if not scaling and turned == head_dim:
            return plain
        return {**plain, "rope": RopeSettings(rotary_dim=turned, theta=theta, **scaling)}

    def _scaling(self) -> dict[str, Any]:
        """Scaled positions: factors in tensors, or a type and its numbers.  [MD-CONFIG-6]"""
        kind = self.get("rope.scaling.type")
        kind = None if kind == "none" else kind
        long_and_short = [name for name in _LONG_AND_SHORT if name in self._tensors]
        if long_and_short:
            if len(long_and_short) < 2 or "longrope" not in self._architecture.scalings:
                raise UnsupportedError(
                    f"read {self._source}: tensor {long_and_short[0]}: got scaled rotary positions, expected plain ones"
                )
            return {
                "kind": "longrope",
                "factors_in_file": True,
                "original_positions": self.size("rope.scaling.original_context_length"),
                "attention_factor": self.get("rope.scaling.attn_factor", 1.0),
            }
        if _ROPE_FREQS in self._tensors:
            if kind is not None or self._architecture.family not in ("llama", "qwen2", "qwen3"):
                raise UnsupportedError(
                    f"read {self._source}: tensor {_ROPE_FREQS}: got scaled rotary positions beside "
                    f"{self.key('rope.scaling.type')} {quoted(kind)}, expected one of them"
                )
            return {"kind": "stored", "factors_in_file": True}
        if kind is None:
            if self.get("rope.scaling.factor") not in (None, 0, 1):
                self.refuse("rope.scaling.factor", "it absent, since rope.scaling.type is")
            return {}
        if kind not in self._architecture.scalings or kind == "longrope":
            self.refuse("rope.scaling.type", f"one of {', '.join(self._architecture.scalings) or 'none'}, or absent")
        factor = self.need("rope.scaling.factor")
        if kind == "linear":
            return {"kind": kind, "factor": factor}
        return self._yarn(factor)

    def _yarn(self, factor: Any) -> dict[str, Any]:
        for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"):
            if self.get(f"rope.scaling.{name}") not in (None, 0, 1):
                self.refuse(f"rope.scaling.{name}", "it absent")
        number = positive_number(factor, self.key("rope.scaling.factor"))
        return {
            "kind": "yarn",
            "factor": number,
            "attention_factor": 1.0 if number <= 1 else 0.1 * math.log(number) + 1.0,
            "original_positions": self.size("rope.scaling.original_context_length"),
            "beta_fast": self.get("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": self.get("rope.scaling.yarn_beta_slow", 1.0),
        }

    def refuse_foreign(self) -> None:
        """Raises UnsupportedError, naming the key, for what would change the result."""
        for field, neutral in _NEUTRAL.items():
            if field not in self._architecture.knows and self.get(field) not in neutral:
                self.refuse(field, "it absent")
        if self._metadata.get("split.count", 1) not in (0, 1):
            found = self._metadata["split.count"]
            raise UnsupportedError(
                f"read {self._source}: split.count: got {quoted(found)} files, expected one; "
                "merge them with gguf-split --merge"
            )

    def key(self, field: str) -> str:
        return f"{self._name}.{field}"

    def get(self, field: str, default: Any = None) -> Any:
        return self._metadata.get(self.key(field), default)

    def need(self, field: str) -> Any:
        if self.key(field) not in self._metadata:
            raise ConfigError(f"{self.key(field)}: got nothing, expected a value")
        return self._metadata[self.key(field)]

    def size(self, field: str, default: int | None = None) -> int:
        value = self.get(field, default) if default is not None else self.need(field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{self.key(field)}: got {quoted(value)}, expected a positive integer")
        return value

    def refuse(self, field: str, expected: str) -> None:
        found = quoted(self.get(field))
        raise UnsupportedError(f"read {self._source}: {self.key(field)}: got {found}, expected {expected}")

    def _vocab_size(self) -> int:
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None or len(embedding) != 2:
            raise ConfigError(
                f"tensor token_embd.weight: got {embedding}, expected a matrix of vocabulary x hidden size"
            )
        declared = self.get("vocab_size", embedding[0])
        if declared != embedding[0]:
            raise ConfigError(
                f"{self.key('vocab_size')}: got {quoted(declared)}, but token_embd.weight has {embedding[0]} rows"
            )
        return embedding[0]


def _scalars(metadata: Mapping[str, Any], source: str, name: str) -> dict[str, Any]:
    """Metadata without its arrays; one of the architecture's own keys must not be an array (one value per layer)."""
    scalars = {key: value for key, value in metadata.items() if isinstance(value, (bool, int, float, str))}
    for key in metadata:
        if key.startswith(f"{name}.") and key not in scalars and not key.endswith(".sliding_window_pattern"):
            raise UnsupportedError(f"read {source}: {quoted(key)}: got an array, expected one value for all layers")
    return scalars


def _token_id(metadata: Mapping[str, Any], key: str) -> int | None:
    value = metadata.get(key)
    if value is None or (isinstance(value, int) and value == 2**32 - 1):  # the type's largest id: not set
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise ConfigError(f"{key}: got {quoted(value)}, expected a token id")
    return value
