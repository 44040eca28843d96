"""How a model's weights are quantised; `ferrum_ref.types.models` re-exports these names.

Upstream: `ferrum_types::models::QuantizationConfig`.  Clauses: TY-MODEL-5, TY-MODEL-8 (specs/types.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from ferrum_ref.errors import InvalidFormatError, InvalidParameterError, UnsupportedError
from ferrum_ref.types.record import F32, U8, Json, Record, Usize


class QuantizationConfig(Record):
    """How weights are quantised: `.GPTQ`, `.AWQ`, `.FP8`, `.INT8`, `.INT4` or `.SmoothQuant`.  [TY-MODEL-5]"""

    __slots__ = ()
    GPTQ: ClassVar[type[GptqConfig]]
    AWQ: ClassVar[type[AwqConfig]]
    FP8: ClassVar[type[Fp8Config]]
    INT8: ClassVar[type[Int8Config]]
    INT4: ClassVar[type[Int4Config]]
    SmoothQuant: ClassVar[type[SmoothQuantConfig]]

    @staticmethod
    def from_checkpoint(settings: Mapping[str, Json]) -> QuantizationConfig:
        """The scheme that `quantize_config.json` or config.json's `quantization_config` describes.  [TY-MODEL-8; D-75]

        `settings` is the object of either file, or a whole config.json. The method stands under `quant_method` or
        `method`; without either it is gptq, as AutoGPTQ writes it. A group size of -1 (one group) becomes 0. Pure.
        Raises UnsupportedError for another method, InvalidFormatError for a setting that is missing or no such value.
        """
        return read_checkpoint(settings)

    def bits(self) -> int:
        """Own value for GPTQ and AWQ, 4 for INT4, 8 for the rest."""
        if isinstance(self, (GptqConfig, AwqConfig)):
            return self.num_bits
        return 4 if isinstance(self, Int4Config) else 8

    def is_high_accuracy(self) -> bool:
        """True for FP8, INT8 and SmoothQuant."""
        return isinstance(self, (Fp8Config, Int8Config, SmoothQuantConfig))


@dataclass(frozen=True, slots=True)
class GptqConfig(QuantizationConfig):
    """GPTQ; the field upstream calls `bits` is `num_bits` here, beside the method `bits()`."""

    num_bits: U8 = field(metadata={"json": "bits"})
    group_size: Usize
    desc_act: bool


@dataclass(frozen=True, slots=True)
class AwqConfig(QuantizationConfig):
    """AWQ; the field upstream calls `bits` is `num_bits` here, beside the method `bits()`."""

    num_bits: U8 = field(metadata={"json": "bits"})
    zero_point: bool
    version: str


@dataclass(frozen=True, slots=True)
class Fp8Config(QuantizationConfig):
    """8-bit floats: E4M3 (else E5M2), for the KV cache too or not."""

    e4m3: bool
    kv_cache: bool


@dataclass(frozen=True, slots=True)
class Int8Config(QuantizationConfig):
    """8-bit integers."""

    symmetric: bool
    per_channel: bool


@dataclass(frozen=True, slots=True)
class Int4Config(QuantizationConfig):
    """4-bit integers in groups."""

    symmetric: bool
    group_size: Usize


@dataclass(frozen=True, slots=True)
class SmoothQuantConfig(QuantizationConfig):
    """SmoothQuant with migration strength alpha."""

    alpha: F32
    calibration_size: Usize


QuantizationConfig.GPTQ = GptqConfig
QuantizationConfig.AWQ = AwqConfig
QuantizationConfig.FP8 = Fp8Config
QuantizationConfig.INT8 = Int8Config
QuantizationConfig.INT4 = Int4Config
QuantizationConfig.SmoothQuant = SmoothQuantConfig


def read_checkpoint(settings: Mapping[str, Json]) -> QuantizationConfig:
    """See QuantizationConfig.from_checkpoint."""
    nested = settings.get("quantization_config")
    if isinstance(nested, Mapping):
        settings = nested
    method = settings.get("quant_method", settings.get("method", "gptq"))
    try:
        if method in ("gptq", "gptq_v2"):
            group_size = _whole(settings, "group_size")
            flag = _flag(settings, "desc_act", False)
            return GptqConfig(_whole(settings, "bits"), 0 if group_size == -1 else group_size, flag)
        if method == "awq":
            version = settings.get("version", "gemm")
            if not isinstance(version, str):
                raise InvalidFormatError(f"quantize_config: version must be a text, got {version!r}")
            return AwqConfig(_whole(settings, "bits"), _flag(settings, "zero_point", True), version)
    except InvalidParameterError as error:
        raise InvalidFormatError(f"quantize_config: {error.message}") from None
    raise UnsupportedError(f"quantize_config: method {method!r} is not known; expected gptq, gptq_v2 or awq")


def _whole(settings: Mapping[str, Json], key: str) -> int:
    value = settings.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidFormatError(f"quantize_config: {key} must be an integer, got {value!r}")
    return value


def _flag(settings: Mapping[str, Json], key: str, default: bool) -> bool:
    value = settings.get(key, default)
    if not isinstance(value, bool):
        raise InvalidFormatError(f"quantize_config: {key} must be true or false, got {value!r}")
    return value
