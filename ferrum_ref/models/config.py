"""What a decoder needs to know about its architecture, whichever file said it.

A configuration either means exactly what `DecoderConfig` can express or is refused by the name of the offending field:
nothing that would change the logits is ignored.  Clauses: MD-CONFIG-1..5 (specs/model_files.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from ferrum_ref.errors import ConfigError

if TYPE_CHECKING:
    from ferrum_ref.models.latent_config import LatentSettings
    from ferrum_ref.models.moe_config import MoeSettings
    from ferrum_ref.models.rope_config import RopeSettings

DEFAULT_ROPE_THETA: Final = 10000.0  # for every family, when the file is silent (D-80)
_MAX_SIZE: Final = 2**31 - 1
_MAX_POSITIONS: Final = 2**24
_MAX_QUOTED_CHARACTERS: Final = 80
FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"
LAYER_TYPES: Final = (FULL, SLIDING)
_LLAMA_VALUES: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "hidden_act": "silu",
        "norm": "rms",
        "norm_offset": 0.0,
        "post_norms": False,
        "qk_norm": False,
        "parallel_residual": False,
        "gated": True,
        "query_scale": None,
        "scale_by_layer": False,
        "attention_softcap": 0.0,
        "final_softcap": 0.0,
        "attention_sinks": False,
        "embedding_scale": 1.0,
        "learned_positions": False,
        "sliding_window": 0,
        "rope": None,
        "local_rope": None,
        "moe": None,
        "latent": None,
    }
)
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
    """A decoder: sizes, constants, and the ids that begin and end a text.  [MD-CONFIG-1, MD-CONFIG-4]

    `architecture` is the family (`models.family_table`); the fields that the other families add stand at their Llama
    values by default. Raises ConfigError, naming the field, on sizes that cannot belong together.
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
    rms_norm_eps: float  # of LayerNorm, too
    rope_theta: float = DEFAULT_ROPE_THETA
    rope_scaling: Mapping[str, Any] | None = None  # always None: scaled positions stand in `rope`
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of q, k and v; of the output, too, unless attention_output_bias says otherwise
    mlp_bias: bool = False
    hidden_act: str = "silu"  # "silu", "gelu", "gelu_tanh" or "relu"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    dtype: str | None = None  # the element type its author names; tensors carry their own
    tensor_layout: str = "llama"  # how its tensors are called and oriented (`models.tensor_layout`)
    norm: str = "rms"  # or "layer": LayerNorm with bias
    norm_offset: float = 0.0  # a norm multiplies by (offset + weight)
    post_norms: bool = False  # attention and feed-forward are normed once more, before they are added
    qk_norm: bool = False  # every head's query and key are normed before they are turned
    parallel_residual: bool = False  # h + attention(norm(h)) + feed_forward(norm'(h))
    gated: bool = True  # down(act(gate) * up); else down(act(up))
    attention_output_bias: bool | None = None
    query_scale: float | None = None  # of the scores; None: D**-0.5
    scale_by_layer: bool = False  # scores of layer l are divided by l + 1
    attention_softcap: float = 0.0  # 0: none
    final_softcap: float = 0.0
    attention_sinks: bool = False
    embedding_scale: float = 1.0
    learned_positions: bool = False  # added to the embedding, in place of turning
    sliding_window: int = 0  # of the layers whose type is "sliding_attention"
    layer_types: tuple[str, ...] = ()  # () or one for each layer
    rope: RopeSettings | None = None  # None: plain, of the whole head, with rope_theta
    local_rope: RopeSettings | None = None  # of the sliding layers, where they turn otherwise
    moe: MoeSettings | None = None
    latent: LatentSettings | None = None

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
        if self.head_dim % 2 and self.rope is None and not self.learned_positions:
            raise ConfigError(f"head_dim: got {self.head_dim}, expected an even number (rotary pairs)")
        positive = ["rms_norm_eps", "rope_theta", "embedding_scale"]
        for name in positive if self.query_scale is None else [*positive, "query_scale"]:
            value = getattr(self, name)
            if not _is_positive(value):
                raise ConfigError(f"{name}: got {quoted(value)}, expected a positive finite number")
            object.__setattr__(self, name, float(value))
        self._check_attention()

    def _check_attention(self) -> None:
        for name in ("attention_softcap", "final_softcap"):
            value = getattr(self, name)
            if value != 0 and not _is_positive(value):
                raise ConfigError(f"{name}: got {quoted(value)}, expected a positive finite number, or 0 for none")
        window = self.sliding_window
        if not isinstance(window, int) or isinstance(window, bool) or not 0 <= window <= _MAX_SIZE:
            raise ConfigError(f"sliding_window: got {quoted(window)}, expected 0 or a number of tokens")
        if self.layer_types and len(self.layer_types) != self.num_layers:
            raise ConfigError(
                f"layer_types: got {len(self.layer_types)} of them, expected one for each of {self.num_layers} layers"
            )
        for kind in self.layer_types:
            if kind not in LAYER_TYPES:
                raise ConfigError(f"layer_types: got {quoted(kind)}, expected {' or '.join(map(repr, LAYER_TYPES))}")
        if SLIDING in self.layer_types and not self.sliding_window:
            raise ConfigError("sliding_window: got 0, expected a number of tokens for the layers that slide")
        for rope in (self.rope, self.local_rope):
            if rope is not None and self.latent is None and rope.rotary_dim > self.head_dim:
                raise ConfigError(f"rotary_dim: got {rope.rotary_dim}, expected at most head_dim {self.head_dim}")

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of float32 keys and values that one cached token takes: 2 * layers * G * D * 4."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * 4

    @property
    def context_tokens(self) -> int:
        """Longest sequence.  Pure.  [LM-ROPE-9]

        `max_position_embeddings`; where positions are scaled dynamically that number times the factor, and under yarn
        the original context times the factor, if that is longer.
        """
        own, rope = self.max_position_embeddings, self.rope
        if rope is None or rope.kind not in ("dynamic", "yarn"):
            return own
        return max(own, min(_MAX_POSITIONS, int(rope.original_positions * rope.factor)))

    def window_of(self, layer: int) -> int:
        """Tokens that a query of this layer sees, itself included; 0: all.  Pure.  [LM-LAYER-4]"""
        if not self.layer_types:
            return 0
        return self.sliding_window if self.layer_types[layer] == SLIDING else 0

    def beyond_llama(self) -> tuple[str, ...]:
        """The fields by which this decoder computes more than a Llama with biases.  Pure.  [MD-CONFIG-4]"""
        return tuple(name for name, plain in _LLAMA_VALUES.items() if getattr(self, name) != plain)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {field.name: _json_ready(getattr(self, field.name)) for field in fields(self)}

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


def _json_ready(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _json_ready(each) for name, each in asdict(value).items()}
    if isinstance(value, (tuple, frozenset)):
        return sorted(value) if isinstance(value, frozenset) else list(value)
    return value


def quoted(value: object) -> str:
    """A file's value as it may stand in an error message: short, on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _MAX_QUOTED_CHARACTERS else text[:_MAX_QUOTED_CHARACTERS] + "..."
