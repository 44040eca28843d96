"""What a VITS voice needs to know about its architecture.  Clauses: FM-VITS-1..2 (specs/audio.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from ferrum_ref.errors import ConfigError, InvalidFormatError, UnsupportedError
from ferrum_ref.models.config import quoted
from ferrum_ref.models.config_fields import finite_number, positive_number, size
from ferrum_ref.models.hidden_activation import ACTIVATIONS

_MAX_STAGES: Final = 16
_SIZES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "vocab_size": 38,
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "window_size": 4,
        "ffn_dim": 768,
        "ffn_kernel_size": 3,
        "flow_size": 192,
        "upsample_initial_channel": 512,
        "depth_separable_num_layers": 3,
        "duration_predictor_flow_bins": 10,
        "duration_predictor_kernel_size": 3,
        "duration_predictor_num_flows": 4,
        "prior_encoder_num_flows": 4,
        "prior_encoder_num_wavenet_layers": 4,
        "wavenet_kernel_size": 5,
        "wavenet_dilation_rate": 1,
        "sampling_rate": 16_000,
    }
)  # config.json's fields and their defaults there
_OPTIONAL: Final = (
    "hidden_act",
    "layer_norm_eps",
    "leaky_relu_slope",
    "duration_predictor_tail_bound",
    "speaking_rate",
    "noise_scale",
    "noise_scale_duration",
)
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "num_speakers": (None, 1),
        "speaker_embedding_size": (None, 0),
        "use_stochastic_duration_prediction": (None, True),
        "use_bias": (None, True),
        "depth_separable_channels": (None, 2),
        "quantization_config": (None,),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VitsConfig:
    """A VITS voice: sizes and constants, by transformers' names.  [FM-VITS-1]  Raises ConfigError, naming the field.

    `paired_resblocks`: each dilated convolution is followed by an undilated one (HiFi-GAN's first kind); without it the
    dilated ones stand alone (the second kind, as Piper's medium voices have it).
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    window_size: int
    ffn_dim: int
    ffn_kernel_size: int
    flow_size: int
    upsample_initial_channel: int
    depth_separable_num_layers: int
    duration_predictor_flow_bins: int
    duration_predictor_kernel_size: int
    duration_predictor_num_flows: int
    prior_encoder_num_flows: int
    prior_encoder_num_wavenet_layers: int
    wavenet_kernel_size: int
    wavenet_dilation_rate: int
    sampling_rate: int
    upsample_rates: tuple[int, ...]
    upsample_kernel_sizes: tuple[int, ...]
    resblock_kernel_sizes: tuple[int, ...]
    resblock_dilation_sizes: tuple[tuple[int, ...], ...]
    paired_resblocks: bool = True
    hidden_act: str = "relu"
    layer_norm_eps: float = 1e-5
    leaky_relu_slope: float = 0.1
    duration_predictor_tail_bound: float = 5.0
    speaking_rate: float = 1.0
    noise_scale: float = 0.667
    noise_scale_duration: float = 0.8

    def __post_init__(self) -> None:
        for name in _SIZES:
            size(getattr(self, name), name)
        _require_multiple(self.hidden_size, self.num_attention_heads, "hidden_size")
        _require_multiple(self.flow_size, 2, "flow_size")
        for name in ("ffn_kernel_size", "duration_predictor_kernel_size", "wavenet_kernel_size"):
            if getattr(self, name) > 64:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at most 64")
        for name in ("duration_predictor_kernel_size", "wavenet_kernel_size"):
            _require_odd(getattr(self, name), name)
        if self.duration_predictor_flow_bins >= 1000:  # a bin takes a thousandth of the interval at least
            raise ConfigError(
                f"duration_predictor_flow_bins: got {self.duration_predictor_flow_bins}, expected below 1000"
            )
        self._check_dilations()
        self._check_vocoder()
        for name in ("layer_norm_eps", "duration_predictor_tail_bound", "speaking_rate"):
            object.__setattr__(self, name, positive_number(getattr(self, name), name))
        for name in ("leaky_relu_slope", "noise_scale", "noise_scale_duration"):
            value = finite_number(getattr(self, name), name)
            if value < 0:
                raise ConfigError(f"{name}: got {value}, expected 0 or more")
            object.__setattr__(self, name, value)

    def _check_dilations(self) -> None:
        """Dilations grow as powers: keep the zeros around a convolution within reason."""
        for field, base, count in (
            ("depth_separable_num_layers", self.duration_predictor_kernel_size, self.depth_separable_num_layers),
            ("prior_encoder_num_wavenet_layers", self.wavenet_dilation_rate, self.prior_encoder_num_wavenet_layers),
        ):
            if base > 1 and (count - 1) * math.log2(base) > 16:
                raise ConfigError(f"{field}: got {count}, expected dilations up to {2**16}")

    def _check_vocoder(self) -> None:
        rates, taps = self.upsample_rates, self.upsample_kernel_sizes
        for name in ("upsample_rates", "upsample_kernel_sizes", "resblock_kernel_sizes"):
            _sizes(getattr(self, name), name)
        _lists(self.resblock_dilation_sizes)
        if not 1 <= len(rates) <= _MAX_STAGES or len(rates) != len(taps):
            raise ConfigError(
                f"upsample_kernel_sizes: got {len(taps)} for {len(rates)} upsample_rates, expected as many"
            )
        if not 1 <= len(self.resblock_kernel_sizes) <= _MAX_STAGES:
            raise ConfigError(
                f"resblock_kernel_sizes: got {len(self.resblock_kernel_sizes)}, expected 1 to {_MAX_STAGES}"
            )
        if len(self.resblock_dilation_sizes) != len(self.resblock_kernel_sizes):
            raise ConfigError("resblock_dilation_sizes: expected one list for each of resblock_kernel_sizes")
        _require_multiple(self.upsample_initial_channel, 2 ** len(rates), "upsample_initial_channel")
        for rate, kernel in zip(rates, taps, strict=True):
            if kernel < rate or (kernel - rate) % 2:
                raise ConfigError(
                    f"upsample_kernel_sizes: got {kernel} for rate {rate}, expected rate + an even number"
                )
        for kernel in self.resblock_kernel_sizes:
            _require_odd(kernel, "resblock_kernel_sizes")

    @property
    def samples_per_row(self) -> int:
        """Samples that one row of the flow becomes."""
        return math.prod(self.upsample_rates)

    @staticmethod
    def from_hf(config: Mapping[str, Any], source: str = "config.json") -> VitsConfig:
        """From a Hugging Face config.json of model_type "vits".  Pure.  [FM-VITS-2]

        What it leaves out is transformers' default. Raises InvalidFormatError (impossible values), UnsupportedError;
        both begin with `source`.
        """
        if config.get("model_type") != "vits":
            raise UnsupportedError(
                f"read {source}: model_type: got {quoted(config.get('model_type'))}, expected 'vits'"
            )
        for field, neutral in _NEUTRAL.items():
            if config.get(field) not in neutral:
                raise UnsupportedError(
                    f"read {source}: {field}: got {quoted(config[field])}, expected {quoted(neutral[-1])} or absent"
                )
        if config.get("hidden_act", "relu") not in ACTIVATIONS:
            found = quoted(config["hidden_act"])
            raise UnsupportedError(f"read {source}: hidden_act: got {found}, expected one of {', '.join(ACTIVATIONS)}")
        given: dict[str, Any] = {name: config[name] for name in _OPTIONAL if name in config}
        try:
            given |= {name: size(config.get(name, default), name) for name, default in _SIZES.items()}
            return VitsConfig(
                **given,
                upsample_rates=_sizes(config.get("upsample_rates", (8, 8, 2, 2)), "upsample_rates"),
                upsample_kernel_sizes=_sizes(
                    config.get("upsample_kernel_sizes", (16, 16, 4, 4)), "upsample_kernel_sizes"
                ),
                resblock_kernel_sizes=_sizes(config.get("resblock_kernel_sizes", (3, 7, 11)), "resblock_kernel_sizes"),
                resblock_dilation_sizes=_lists(config.get("resblock_dilation_sizes", ((1, 3, 5),) * 3)),
            )
        except ConfigError as error:
            raise InvalidFormatError(f"read {source}: {error.message}") from None


def _sizes(value: Any, field: str) -> tuple[int, ...]:
    """Counts from 1 to 1024: factors of a length, taps, dilations."""
    if not isinstance(value, (list, tuple)) or not all(type(each) is int and 1 <= each <= 1024 for each in value):
        raise ConfigError(f"{field}: got {quoted(value)}, expected a list of numbers from 1 to 1024")
    return tuple(value)


def _lists(value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, (list, tuple)) or len(value) > _MAX_STAGES:
        raise ConfigError(f"resblock_dilation_sizes: got {quoted(value)}, expected a list of lists")
    lists = tuple(_sizes(each, "resblock_dilation_sizes") for each in value)
    if not all(1 <= len(each) <= _MAX_STAGES for each in lists):
        raise ConfigError(
            f"resblock_dilation_sizes: got {quoted(value)}, expected 1 to {_MAX_STAGES} dilations in each"
        )
    return lists


def _require_multiple(value: int, factor: int, field: str) -> None:
    if value % factor:
        raise ConfigError(f"{field}: got {value}, expected a multiple of {factor}")


def _require_odd(value: int, field: str) -> None:
    if value % 2 == 0:
        raise ConfigError(f"{field}: got {value}, expected an odd number of taps")
