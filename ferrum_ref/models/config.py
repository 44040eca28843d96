"""What a decoder needs to know about its architecture, whichever file said it.

A configuration either means exactly what `DecoderConfig` can express or is refused by the name of the offending field:
nothing that would change the logits is ignored.  Clauses: MD-CONFIG-1..3 (specs/model_files.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from ferrum_ref.errors import ConfigError

DEFAULT_ROPE_THETA: Final = 10000.0  # for every family, when the file is silent (D-80)
_MAX_SIZE: Final = 2**31 - 1
_MAX_POSITIONS: Final = 2**24
_MAX_QUOTED_CHARACTERS: Final = 80
_SIZES: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A Llama-family decoder: sizes, constants and the ids that begin and end a text.  [MD-CONFIG-1]

    Raises ConfigError, naming the field, on sizes that cannot belong together.
    """

    architecture: str = "llama"
    vocab_size: int  # rows of the embedding: the length of the logits
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float = DEFAULT_ROPE_THETA
    rope_scaling: Mapping[str, Any] | None = None  # None: plain rotary positions, the only kind offered
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    dtype: str | None = None  # the element type its author names; tensors carry their own

    def __post_init__(self) -> None:
        for name in _SIZES:
            limit = _MAX_POSITIONS if name == "max_position_embeddings" else _MAX_SIZE
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise ConfigError(f"{name}: got {quoted(value)}, expected an integer from 1 to {limit}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads: got {self.num_kv_heads}, expected a divisor of the {self.num_heads} query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim: got {self.head_dim}, expected an even number (rotary pairs)")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not _is_positive(value):
                raise ConfigError(f"{name}: got {quoted(value)}, expected a positive finite number")
            object.__setattr__(self, name, float(value))

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of float32 keys and values that one cached token takes: 2 * layers * G * D * 4."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * 4

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**plain, "eos_token_ids": list(self.eos_token_ids)}

    @staticmethod
    def from_hf(config: Mapping[str, Any], source: str = "config.json") -> DecoderConfig:
        """From a Hugging Face config.json, spelled as transformers 4 or 5 spells it.  [MD-CONFIG-2; D-80, D-81]

        Raises InvalidFormatError on missing or impossible values, UnsupportedError on a field that means more than
        this decoder does; both begin with `source`.  Pure.
        """
        from ferrum_ref.models.config_hf import read_hf_config

        return read_hf_config(config, source)

    @staticmethod
    def from_gguf(
        metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], source: str = "GGUF"
    ) -> DecoderConfig:
        """From a GGUF file's metadata and the shapes of its tensors.  [MD-CONFIG-3]

        The tensors decide what the metadata leaves open: no `output.weight` means tied embeddings, a bias tensor means
        biases.  Raises as `from_hf` does.  Pure.
        """
        from ferrum_ref.models.config_gguf import read_gguf_config

        return read_gguf_config(metadata, tensors, source)


def _is_positive(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value) and value > 0
    except OverflowError:  # an integer beyond float64
        return False


def quoted(value: object) -> str:
    """A file's value as it may stand in an error message: short, on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _MAX_QUOTED_CHARACTERS else text[:_MAX_QUOTED_CHARACTERS] + "..."
