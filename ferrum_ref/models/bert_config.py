"""What a BERT encoder needs to know about its architecture.  Clauses: FM-BERT-1..2 (specs/families.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from ferrum_ref.errors import ConfigError, InvalidFormatError, UnsupportedError
from ferrum_ref.models.config import quoted
from ferrum_ref.models.config_fields import positive_number, size
from ferrum_ref.models.hidden_activation import ACTIVATIONS

# Fields that make another model of it: name -> the values that leave a BERT encoder as it is.
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "position_embedding_type": (None, "absolute"),
        "is_decoder": (None, False),
        "add_cross_attention": (None, False),
        "is_encoder_decoder": (None, False),
        "embedding_size": (None,),
        "quantization_config": (None,),
        "pruned_heads": (None, {}),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BertConfig:
    """A BERT encoder: sizes and constants.  [FM-BERT-1]  Raises ConfigError, naming the field."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"

    def __post_init__(self) -> None:
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        for name in (*names, "max_position_embeddings", "type_vocab_size"):
            size(getattr(self, name), name)
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size: got {self.hidden_size}, expected a multiple of the {self.num_heads} heads")
        object.__setattr__(self, "layer_norm_eps", positive_number(self.layer_norm_eps, "layer_norm_eps"))

    @staticmethod
    def from_hf(config: Mapping[str, Any], source: str = "config.json") -> BertConfig:
        """From a Hugging Face config.json of model_type "bert".  [FM-BERT-2; D-81]

        Raises InvalidFormatError on missing or impossible values, UnsupportedError on a field that means more than this
        encoder does; both begin with `source`.  Pure.
        """
        if config.get("model_type") != "bert":
            raise UnsupportedError(
                f"read {source}: model_type: got {quoted(config.get('model_type'))}, expected 'bert'"
            )
        for field, neutral in _NEUTRAL.items():
            if config.get(field) not in neutral:
                raise UnsupportedError(
                    f"read {source}: {field}: got {quoted(config[field])}, expected {quoted(neutral[-1])} or absent"
                )
        activation = config.get("hidden_act", "gelu")
        if activation not in ACTIVATIONS:
            raise UnsupportedError(
                f"read {source}: hidden_act: got {quoted(activation)}, expected one of {', '.join(ACTIVATIONS)}"
            )
        try:
            return BertConfig(
                vocab_size=size(config.get("vocab_size"), "vocab_size"),
                hidden_size=size(config.get("hidden_size"), "hidden_size"),
                intermediate_size=size(config.get("intermediate_size"), "intermediate_size"),
                num_layers=size(config.get("num_hidden_layers"), "num_hidden_layers"),
                num_heads=size(config.get("num_attention_heads"), "num_attention_heads"),
                max_position_embeddings=size(config.get("max_position_embeddings"), "max_position_embeddings"),
                type_vocab_size=config.get("type_vocab_size", 2),
                layer_norm_eps=config.get("layer_norm_eps", 1e-12),
                hidden_act=activation,
            )
        except ConfigError as error:
            raise InvalidFormatError(f"read {source}: {error.message}") from None
