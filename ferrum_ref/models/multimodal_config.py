"""What a LLaVA model needs to know: its vision tower, its projector, its decoder.  Clauses: FM-LLAVA-1..2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from ferrum_ref.errors import ConfigError, InvalidFormatError, UnsupportedError
from ferrum_ref.models.config import DecoderConfig, quoted
from ferrum_ref.models.config_fields import flag
from ferrum_ref.models.hidden_activation import ACTIVATIONS
from ferrum_ref.models.vision_config import VisionConfig

# A LLaVA configuration leaves out what equals LlamaConfig's defaults.
_LLAMA_DEFAULTS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MultimodalConfig:
    """Vision tower, two-layer projector, decoder.  [FM-LLAVA-1]

    feature_layers: which hidden states of the tower the projector reads, side by side; keep_class_row: the class row
    is one of the visual rows.
    """

    vision: VisionConfig
    text: DecoderConfig
    image_token_id: int
    feature_layers: tuple[int, ...]
    keep_class_row: bool
    projector_act: str
    projector_bias: bool

    @property
    def num_visual_tokens(self) -> int:
        """Decoder rows of one picture."""
        return self.vision.num_patches + int(self.keep_class_row)

    @staticmethod
    def from_hf(config: Mapping[str, Any], source: str = "config.json") -> MultimodalConfig:
        """From a config.json of model_type "llava".  [FM-LLAVA-2]

        Raises InvalidFormatError on missing or impossible values, UnsupportedError on what is not offered; both begin
        with `source`.  Pure.
        """
        if config.get("model_type") != "llava":
            raise UnsupportedError(
                f"read {source}: model_type: got {quoted(config.get('model_type'))}, expected 'llava'"
            )
        activation = config.get("projector_hidden_act", "gelu")
        if activation not in ACTIVATIONS:
            found = quoted(activation)
            raise UnsupportedError(
                f"read {source}: projector_hidden_act: got {found}, expected one of {', '.join(ACTIVATIONS)}"
            )
        vision = VisionConfig.from_hf(_object(config, "vision_config", source), f"{source}: vision_config")
        tied = config.get("tie_word_embeddings")
        given = {**_LLAMA_DEFAULTS, **_object(config, "text_config", source)}
        if tied is True:
            given["tie_word_embeddings"] = True
        if given.get("model_type") != "llama":
            found = quoted(given.get("model_type"))
            raise UnsupportedError(f"read {source}: text_config: model_type: got {found}, expected 'llama'")
        text = DecoderConfig.from_hf(given, f"{source}: text_config")
        try:
            return MultimodalConfig(
                vision=vision,
                text=text,
                image_token_id=_image_token(config, text.vocab_size),
                feature_layers=_feature_layers(config.get("vision_feature_layer", -2), vision.num_layers),
                keep_class_row=_keep_class_row(config.get("vision_feature_select_strategy", "default")),
                projector_act=activation,
                projector_bias=flag(config.get("multimodal_projector_bias", True), "multimodal_projector_bias"),
            )
        except ConfigError as error:
            raise InvalidFormatError(f"read {source}: {error.message}") from None


def _object(config: Mapping[str, Any], field: str, source: str) -> dict[str, Any]:
    value = config.get(field)
    if not isinstance(value, Mapping):
        raise InvalidFormatError(f"read {source}: {field}: got {quoted(value)}, expected an object")
    return dict(value)


def _image_token(config: Mapping[str, Any], vocab_size: int) -> int:
    value = config.get("image_token_index", config.get("image_token_id", 32000))
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        raise ConfigError(f"image_token_index: got {quoted(value)}, expected a token id below vocab_size {vocab_size}")
    return value


def _feature_layers(value: Any, num_layers: int) -> tuple[int, ...]:
    """Counted from 0; a negative one counts from the end of the num_layers + 1 hidden states."""
    listed = value if isinstance(value, (list, tuple)) else [value]
    num_states = num_layers + 1
    if not listed or not all(
        isinstance(each, int) and not isinstance(each, bool) and -num_states <= each < num_states for each in listed
    ):
        raise ConfigError(
            f"vision_feature_layer: got {quoted(value)}, expected numbers in [-{num_states}, {num_states})"
        )
    return tuple(each % num_states for each in listed)


def _keep_class_row(strategy: Any) -> bool:
    if strategy not in ("default", "full"):
        raise ConfigError(f"vision_feature_select_strategy: got {quoted(strategy)}, expected 'default' or 'full'")
    return bool(strategy == "full")
