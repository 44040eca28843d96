"""What a Whisper model needs to know: sizes from config.json, or from a CTranslate2 file's own shapes.

Clauses: FM-WHISPER-1..2 (specs/audio.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from ferrum_ref.errors import ConfigError, InvalidFormatError, UnsupportedError
from ferrum_ref.models.audio.mel import HOP_SAMPLES, SAMPLE_RATE, WINDOW_SAMPLES
from ferrum_ref.models.config import quoted
from ferrum_ref.models.config_fields import size
from ferrum_ref.models.hidden_activation import ACTIVATIONS

_SIZES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "vocab_size": "vocab_size",
        "d_model": "hidden_size",
        "num_mel_bins": "num_mel_bins",
        "encoder_layers": "num_encoder_layers",
        "encoder_attention_heads": "num_encoder_heads",
        "encoder_ffn_dim": "encoder_ffn_size",
        "decoder_layers": "num_decoder_layers",
        "decoder_attention_heads": "num_decoder_heads",
        "decoder_ffn_dim": "decoder_ffn_size",
        "max_source_positions": "max_source_positions",
        "max_target_positions": "max_target_positions",
    }
)
# Fields that make another model of it: name -> the values that leave Whisper as it is.
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {"scale_embedding": (None, False), "tie_word_embeddings": (None, True), "quantization_config": (None,)}
)
_FRONT_END: Final[Mapping[str, int]] = MappingProxyType(
    {"sampling_rate": SAMPLE_RATE, "hop_length": HOP_SAMPLES, "n_fft": WINDOW_SAMPLES}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WhisperConfig:
    """A Whisper model's sizes.  [FM-WHISPER-1]  Raises ConfigError, naming the field."""

    vocab_size: int
    hidden_size: int
    num_mel_bins: int
    num_encoder_layers: int
    num_encoder_heads: int
    encoder_ffn_size: int
    num_decoder_layers: int
    num_decoder_heads: int
    decoder_ffn_size: int
    max_source_positions: int
    max_target_positions: int
    hidden_act: str = "gelu"

    def __post_init__(self) -> None:
        for name in _SIZES.values():
            size(getattr(self, name), name)
        for name in ("num_encoder_heads", "num_decoder_heads"):
            if self.hidden_size % getattr(self, name):
                heads = getattr(self, name)
                raise ConfigError(f"hidden_size: got {self.hidden_size}, expected a multiple of the {heads} heads")

    @property
    def num_frames(self) -> int:
        """Frames of a window: two for each encoded position."""
        return 2 * self.max_source_positions

    @property
    def window_samples(self) -> int:
        """Samples of a window: 480000 (30 s) in every published model."""
        return self.num_frames * HOP_SAMPLES

    @staticmethod
    def from_hf(config: Mapping[str, Any], source: str = "config.json") -> WhisperConfig:
        """From a Hugging Face config.json of model_type "whisper".  Pure.  [FM-WHISPER-2]

        Raises InvalidFormatError (missing or impossible values), UnsupportedError; both begin with `source`.
        """
        if config.get("model_type") != "whisper":
            found = quoted(config.get("model_type"))
            raise UnsupportedError(f"read {source}: model_type: got {found}, expected 'whisper'")
        for field, neutral in _NEUTRAL.items():
            if config.get(field) not in neutral:
                raise UnsupportedError(
                    f"read {source}: {field}: got {quoted(config[field])}, expected {quoted(neutral[-1])} or absent"
                )
        activation = config.get("activation_function", "gelu")
        if activation not in ACTIVATIONS:
            raise UnsupportedError(
                f"read {source}: activation_function: got {quoted(activation)}, "
                f"expected one of {', '.join(ACTIVATIONS)}"
            )
        try:
            sizes = {ours: size(config.get(theirs), theirs) for theirs, ours in _SIZES.items()}
            return WhisperConfig(**sizes, hidden_act=activation)
        except ConfigError as error:
            raise InvalidFormatError(f"read {source}: {error.message}") from None


def require_front_end(preprocessor: Mapping[str, Any], config: WhisperConfig, source: str) -> None:
    """Refuse a preprocessor_config.json that describes other pictures of sound than `log_mel` makes.  [FM-WHISPER-2]

    Raises UnsupportedError, naming the field.
    """
    expected = {**_FRONT_END, "feature_size": config.num_mel_bins, "n_samples": config.window_samples}
    for field, value in expected.items():
        if preprocessor.get(field, value) != value:
            raise UnsupportedError(f"read {source}: {field}: got {quoted(preprocessor[field])}, expected {value}")
