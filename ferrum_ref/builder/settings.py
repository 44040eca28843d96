"""What one build was asked for, read out of ModelConfig or BuildOptions and checked.

Nothing that was asked for is ignored: it is honoured, or refused by its name.  Clauses: MB-OPTIONS-1..6, MB-QUANT-1..2
(specs/model_builder.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ferrum_ref.errors import ConfigError, DeviceError, UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.model_builder import BuildOptions
from ferrum_ref.interfaces.weights import QuantizationConfig as WeightQuantization
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import ModelId
from ferrum_ref.types.models import ModelConfig, ModelType, QuantizationConfig

BLOCK_SIZE_TOKENS: Final = 16
DEFAULT_LEVEL: Final = 2
BUILD_DTYPES: Final = (DataType.FP32, DataType.FP16, DataType.BF16)
CONFIG_KEYS: Final = ("config", "num_blocks", "block_size")
OPTION_KEYS: Final = ("dtype", "device", "max_tokens", "max_batch_size", "model_id", *CONFIG_KEYS)
_MAX_COUNT: Final = 2**31


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """One build, as asked for.

    config: the model's configuration in Hugging Face's spelling, in place of its config.json. num_blocks None: enough
    for max_batch_size sequences of full length. device None: the backend's own. level: see `default_passes`.
    """

    model_id: ModelId
    dtype: DataType
    device: Device | None = None
    max_tokens: int | None = None
    max_batch_size: int = 1
    model_type: ModelType | None = None
    config: Mapping[str, Any] | None = None
    num_blocks: int | None = None
    block_size: int = BLOCK_SIZE_TOKENS
    quantization: WeightQuantization | None = None
    level: int = DEFAULT_LEVEL
    validates: bool = True
    timeout_s: float | None = None
    wants_flash_attention: bool = False
    wants_cuda_graphs: bool = False

    @staticmethod
    def from_config(config: ModelConfig) -> BuildSettings:
        """From explicit settings.  [MB-OPTIONS-1]

        Raises ConfigError (a value that cannot be), UnsupportedError (a scheme or parallelism that is not offered).
        """
        config.validate()
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            size = getattr(config, name)
            if size is not None and size > 1:
                raise UnsupportedError(f"ModelConfig: {name}: got {size}, expected 1 or None; a build has one device")
        extra = _Extra("ModelConfig.extra_config", config.extra_config)
        quantization = config.quantization
        return BuildSettings(
            model_id=config.model_id,
            dtype=build_dtype("ModelConfig", config.dtype),
            device=config.device,
            max_tokens=config.max_sequence_length,
            max_batch_size=config.max_batch_size,
            model_type=None if config.model_type == ModelType.Custom("unknown") else config.model_type,
            config=extra.object("config"),
            num_blocks=extra.count("num_blocks"),
            block_size=extra.count("block_size") or BLOCK_SIZE_TOKENS,
            quantization=None if quantization is None else weight_quantization(quantization),
            wants_flash_attention=config.use_flash_attention,
            wants_cuda_graphs=config.enable_cuda_graphs,
        )

    @staticmethod
    def from_options(options: BuildOptions, name: str) -> BuildSettings:
        """From the switches of `build_from_source`; `name` is the source's.  [MB-OPTIONS-2..6]

        Raises ConfigError (a level, an unknown or impossible option, quantization without a scheme), UnsupportedError
        (compression, a scheme).
        """
        if options.enable_compression:
            raise UnsupportedError("BuildOptions: enable_compression: weights are kept as they are; leave it off")
        if options.optimization_level > 3:
            raise ConfigError(f"BuildOptions: optimization_level: got {options.optimization_level}, expected 0..3")
        if options.enable_quantization and options.quantization_config is None:
            raise ConfigError("BuildOptions: enable_quantization: got no quantization_config, expected a scheme")
        given = options.additional_options
        unknown = sorted(set(given) - set(OPTION_KEYS))
        if unknown:
            raise ConfigError(
                f"BuildOptions: additional_options: got {unknown[0]!r:.80}, expected some of {', '.join(OPTION_KEYS)}"
            )
        extra = _Extra("BuildOptions.additional_options", given)
        scheme = options.quantization_config if options.enable_quantization else None
        return BuildSettings(
            model_id=ModelId.from_value(extra.text("model_id") or name),
            dtype=build_dtype("BuildOptions.additional_options", _data_type(extra)),
            device=None if extra.text("device") is None else Device.parse(extra.text("device") or ""),
            max_tokens=extra.count("max_tokens"),
            max_batch_size=extra.count("max_batch_size") or 1,
            config=extra.object("config"),
            num_blocks=extra.count("num_blocks"),
            block_size=extra.count("block_size") or BLOCK_SIZE_TOKENS,
            quantization=None if scheme is None else weight_quantization(scheme),
            level=options.optimization_level if options.enable_optimization else 0,
            validates=options.enable_validation,
            timeout_s=options.build_timeout_seconds,
        )

    def check_backend(self, backend: ComputeBackend) -> None:
        """What the backend must offer for this build. Pure.  [MB-OPTIONS-1]

        Raises DeviceError (no such device), UnsupportedError (element type, flash attention, CUDA graphs).
        """
        capabilities = backend.capabilities()
        if self.device is not None and not backend.supports_device(self.device):
            raise DeviceError(f"build: device: got {self.device}, which backend {backend.name()!r} does not have")
        if self.dtype not in capabilities.supported_dtypes:
            raise UnsupportedError(f"build: dtype: backend {backend.name()!r} does not compute in {self.dtype.name}")
        for wanted, offered, name in (
            (self.wants_flash_attention, capabilities.supports_flash_attention, "use_flash_attention"),
            (self.wants_cuda_graphs, capabilities.supports_cuda_graphs, "enable_cuda_graphs"),
        ):
            if wanted and not offered:
                raise UnsupportedError(
                    f"ModelConfig: {name}: backend {backend.name()!r} does not offer it; turn it off"
                )


def build_dtype(where: str, dtype: DataType) -> DataType:
    """The type itself.  Raises ConfigError unless weights can be kept in it."""
    if dtype not in BUILD_DTYPES:
        raise ConfigError(f"{where}: dtype: got {dtype.name}, expected FP32, FP16 or BF16")
    return dtype


def weight_quantization(scheme: QuantizationConfig) -> WeightQuantization:
    """The weight loader's scheme for the types crate's. Pure.  [MB-QUANT-1]

    GPTQ and AWQ round to nearest on their grids.  Raises UnsupportedError for INT8 per channel, INT4 with zero
    points, a quantised cache, and SmoothQuant, which needs activations.
    """
    match scheme:
        case QuantizationConfig.INT8(symmetric=symmetric, per_channel=False):
            return WeightQuantization.INT8(symmetric)
        case QuantizationConfig.INT4(symmetric=True, group_size=group_size):
            return WeightQuantization.INT4(group_size)
        case QuantizationConfig.FP8(e4m3=e4m3, kv_cache=False):
            return WeightQuantization.FP8(e4m3)
        case QuantizationConfig.GPTQ():
            return WeightQuantization.GPTQ(scheme.num_bits, scheme.group_size, scheme.desc_act)
        case QuantizationConfig.AWQ():
            return WeightQuantization.AWQ(scheme.num_bits, scheme.zero_point)
    raise UnsupportedError(
        f"quantization: got {scheme!r:.120}, expected INT8 per tensor, INT4 symmetric, FP8 of weights only, GPTQ or AWQ"
    )


@dataclass(frozen=True, slots=True)
class _Extra:
    """Free-form settings; getters give None for what is absent and raise ConfigError for what cannot be."""

    where: str
    values: Mapping[str, Any]

    def count(self, name: str) -> int | None:
        value = self.values.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _MAX_COUNT):
            raise ConfigError(f"{self.where}: {name}: got {value!r:.80}, expected a whole number of 1 or more")
        return value

    def text(self, name: str) -> str | None:
        value = self.values.get(name)
        if value is not None and not (isinstance(value, str) and value):
            raise ConfigError(f"{self.where}: {name}: got {value!r:.80}, expected text")
        return value

    def object(self, name: str) -> Mapping[str, Any] | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"{self.where}: {name}: got {value!r:.80}, expected an object as in config.json")
        return value


def _data_type(extra: _Extra) -> DataType:
    """FP32 unless the options name another type, as contracts (FP16) or model files (float16) spell it."""
    name = extra.text("dtype")
    if name is None:
        return DataType.FP32
    spelled = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}.get(name, name)
    found = next((kind for kind in BUILD_DTYPES if kind.value == spelled), None)
    if found is None:
        raise ConfigError(f"{extra.where}: dtype: got {name!r:.80}, expected FP32, FP16 or BF16")
    return found
