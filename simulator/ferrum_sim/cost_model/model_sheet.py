"""Dimensions of decoder models: what a cost model must know of them.  [SI-MODEL-1, SI-MODEL-2]

Legend: E hidden size, F feed-forward size, H query heads, G kv heads, D head size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ferrum_ref.errors import ConfigError, FerrumIOError, NotFoundError

WEIGHT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class ModelSheet:
    """A decoder with gated feed-forward layers (gate, up, down) and RMSNorm."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    element_bytes: int = 2

    @property
    def linear_weights_per_layer(self) -> int:
        """E(H + 2G)D + HDE + 3EF: the weights of the matrix products of one layer."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def num_weights(self) -> int:
        """All parameters; a tied output matrix is counted once."""
        biases = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim if self.attention_bias else 0
        layers = self.num_layers * (self.linear_weights_per_layer + biases + 2 * self.hidden_size)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return layers + embeddings + self.hidden_size

    @property
    def weight_bytes(self) -> int:
        return self.num_weights * self.element_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """2 (keys and values) * layers * G * D * element size: what one cached position takes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.element_bytes


# Each line is the config.json of the repository named, as published on the Hugging Face hub.
_SHEETS = (
    # HuggingFaceTB/SmolLM2-135M-Instruct
    ModelSheet("smollm2-135m", 30, 576, 1536, 9, 3, 64, 49152, 8192, tie_word_embeddings=True),
    # Qwen/Qwen2.5-7B-Instruct
    ModelSheet("qwen2.5-7b", 28, 3584, 18944, 28, 4, 128, 152064, 32768, attention_bias=True),
    # mistralai/Mistral-7B-Instruct-v0.3
    ModelSheet("mistral-7b", 32, 4096, 14336, 32, 8, 128, 32768, 32768),
    # meta-llama/Meta-Llama-3-8B
    ModelSheet("llama-3-8b", 32, 4096, 14336, 32, 8, 128, 128256, 8192),
    # meta-llama/Llama-3.1-8B
    ModelSheet("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, 128256, 131072),
    # meta-llama/Meta-Llama-3-70B
    ModelSheet("llama-3-70b", 80, 8192, 28672, 64, 8, 128, 128256, 8192),
)
MODELS: Mapping[str, ModelSheet] = MappingProxyType({sheet.name: sheet for sheet in _SHEETS})


def find_model(name_or_path: str) -> ModelSheet:
    """A built-in sheet by name, or one read from a config.json (the file, or a folder that holds it).

    Raises NotFoundError for a name that is neither, and what `read_hf_config` raises.  [SI-MODEL-1, SI-MODEL-2]
    """
    sheet = MODELS.get(name_or_path.lower())
    if sheet is not None:
        return sheet
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise NotFoundError(
            f"find_model: '{name_or_path}' is no built-in sheet and no file; expected one of {', '.join(MODELS)}, "
            "or the path of a Hugging Face config.json"
        )
    return read_hf_config(path)


def read_hf_config(path: Path) -> ModelSheet:
    """The sheet of a Hugging Face config.json of the Llama family (Llama, Mistral, Qwen2).  [SI-MODEL-2]

    Missing num_key_value_heads means as many as heads, missing head_dim E/H, missing dtype bfloat16.
    Raises FerrumIOError (cannot read), ConfigError (not JSON, missing or absurd dimensions, experts).
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FerrumIOError(f"read_hf_config: {path}: {error.strerror}; expected a readable config.json") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"read_hf_config: {path} is not JSON; expected a Hugging Face config.json") from error
    if not isinstance(config, dict):
        raise ConfigError(f"read_hf_config: {path} holds a {type(config).__name__}; expected one JSON object")
    if any(key in config for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        raise ConfigError(f"read_hf_config: {path} has experts; the roofline model knows dense models only")
    hidden_size = _dimension(path, config, "hidden_size")
    num_heads = _dimension(path, config, "num_attention_heads")
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if not isinstance(dtype, str) or dtype not in WEIGHT_BYTES:
        raise ConfigError(f"read_hf_config: {path}: dtype is {dtype!r}; expected one of {', '.join(WEIGHT_BYTES)}")
    num_kv_heads = _dimension(path, config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"read_hf_config: {path}: num_key_value_heads is {num_kv_heads}; expected a divisor of {num_heads} heads"
        )
    return ModelSheet(
        name=Path(str(config.get("_name_or_path") or path.resolve().parent)).name,
        num_layers=_dimension(path, config, "num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=_dimension(path, config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_dimension(path, config, "head_dim", hidden_size // num_heads),
        vocab_size=_dimension(path, config, "vocab_size"),
        max_position_embeddings=_dimension(path, config, "max_position_embeddings"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", config.get("model_type") == "qwen2")),
        element_bytes=WEIGHT_BYTES[dtype],
    )


def _dimension(path: Path, config: dict[str, object], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 2**31:
        got = "missing" if value is None else repr(value)
        raise ConfigError(f"read_hf_config: {path}: {name} is {got}; expected a whole number >= 1")
    return value
