"""Facts about models: family, size, where their files are, how they are quantised, and token counts.

Upstream: `ferrum_types::models`.  Clauses: TY-MODEL-1..8 (specs/types.md).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from ferrum_ref.errors import ConfigError, InvalidFormatError, InvalidParameterError
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import ModelId
from ferrum_ref.types.model_source import HuggingFaceSource, LocalSource, ModelSource, S3Source, UrlSource
from ferrum_ref.types.quantization import (
    AwqConfig,
    Fp8Config,
    GptqConfig,
    Int4Config,
    Int8Config,
    QuantizationConfig,
    SmoothQuantConfig,
)
from ferrum_ref.types.record import F32, U64, Json, Record, Usize, check_unsigned
from ferrum_ref.types.text_form import Displayed

__all__ = [
    "Activation",
    "AttentionConfig",
    "AwqConfig",
    "Fp8Config",
    "GptqConfig",
    "HuggingFaceSource",
    "Int4Config",
    "Int8Config",
    "LocalSource",
    "ModelConfig",
    "ModelInfo",
    "ModelMemoryRequirements",
    "ModelSource",
    "ModelType",
    "NormType",
    "QuantizationConfig",
    "RopeScaling",
    "S3Source",
    "SmoothQuantConfig",
    "TokenUsage",
    "UrlSource",
]

Family = Literal["llama", "mistral", "qwen", "phi", "gemma", "embedding", "clip", "code", "custom"]


@dataclass(frozen=True, slots=True)
class ModelType(Displayed):
    """Model family: `ModelType.Llama` ... `.Clip`, `.Code(name)`, `.Custom(name)`.  [TY-MODEL-1]"""

    family: Family
    name: str | None = None

    Llama: ClassVar[ModelType]
    Mistral: ClassVar[ModelType]
    Qwen: ClassVar[ModelType]
    Phi: ClassVar[ModelType]
    Gemma: ClassVar[ModelType]
    Embedding: ClassVar[ModelType]
    Clip: ClassVar[ModelType]

    def __post_init__(self) -> None:
        if self.family not in get_args(Family):
            raise InvalidParameterError(
                f"ModelType: unknown family {self.family!r}; expected {', '.join(get_args(Family))}"
            )
        if (self.name is not None) != (self.family in ("code", "custom")):
            raise InvalidParameterError(f"ModelType: a name goes with code and custom only, got {self!r}")

    @staticmethod
    def Code(name: str) -> ModelType:
        return ModelType("code", name)

    @staticmethod
    def Custom(name: str) -> ModelType:
        return ModelType("custom", name)

    def __str__(self) -> str:
        return self.family if self.name is None else f"{self.family}-{self.name}"


ModelType.Llama = ModelType("llama")
ModelType.Mistral = ModelType("mistral")
ModelType.Qwen = ModelType("qwen")
ModelType.Phi = ModelType("phi")
ModelType.Gemma = ModelType("gemma")
ModelType.Embedding = ModelType("embedding")
ModelType.Clip = ModelType("clip")


class NormType(enum.Enum):
    """Normalisation."""

    LayerNorm = "LayerNorm"
    RMSNorm = "RMSNorm"


class Activation(enum.Enum):
    """Activation function; Swish is another name of SiLU's function."""

    GELU = "GELU"
    SiLU = "SiLU"
    ReLU = "ReLU"
    Swish = "Swish"


@dataclass(frozen=True, slots=True)
class ModelMemoryRequirements(Record):
    """Estimated bytes."""

    parameter_memory: U64
    kv_cache_memory: U64
    activation_memory: U64
    total_estimated: U64


@dataclass(frozen=True, slots=True)
class ModelInfo(Record):
    """Facts about a loaded model.  [TY-MODEL-2..3]"""

    model_id: ModelId
    model_type: ModelType
    num_parameters: U64
    hidden_size: Usize
    num_layers: Usize
    num_heads: Usize
    num_kv_heads: Usize
    vocab_size: Usize
    max_sequence_length: Usize
    dtype: DataType
    device: Device
    version: str | None
    license: str | None
    metadata: dict[str, Json]

    def estimated_size_bytes(self) -> int:
        """floor(num_parameters * size_bytes(dtype) * 1.2), computed in float64 as upstream.  [TY-MODEL-2]"""
        return int(float(self.num_parameters * self.dtype.size_bytes()) * 1.2)

    def supports_sequence_length(self, length: int) -> bool:
        return length <= self.max_sequence_length

    def memory_requirements(self, batch_size: int, sequence_length: int) -> ModelMemoryRequirements:
        """Upstream's estimate.  [TY-MODEL-3]

        kv = L*G*(E//H)*2*dtype*seq*batch, activations = E*seq*batch*dtype*4, parameters = estimated_size_bytes().
        Pure. Raises InvalidParameterError when num_heads is 0 (upstream divides by zero).
        """
        if self.num_heads == 0:
            raise InvalidParameterError("ModelInfo.memory_requirements: num_heads must be >= 1, got 0")
        element, tokens = self.dtype.size_bytes(), sequence_length * batch_size
        head_dim = self.hidden_size // self.num_heads
        kv_cache = self.num_layers * self.num_kv_heads * head_dim * 2 * element * tokens
        activation = self.hidden_size * tokens * element * 4
        parameters = self.estimated_size_bytes()
        return ModelMemoryRequirements(parameters, kv_cache, activation, parameters + kv_cache + activation)


@dataclass(frozen=True, slots=True)
class ModelConfig(Record):
    """How a model is to be run.  [TY-MODEL-4]"""

    model_id: ModelId
    model_path: str
    model_type: ModelType
    dtype: DataType
    device: Device
    max_batch_size: Usize
    max_sequence_length: Usize
    tensor_parallel_size: Usize | None
    pipeline_parallel_size: Usize | None
    quantization: QuantizationConfig | None
    use_flash_attention: bool
    use_paged_attention: bool
    enable_cuda_graphs: bool
    extra_config: dict[str, Json]

    @staticmethod
    def new(model_id: ModelId | str, model_path: str) -> ModelConfig:
        """Custom("unknown"), FP16, CPU, batch 1, 2048 tokens, everything else off."""
        return ModelConfig(
            ModelId.from_value(model_id), model_path, ModelType.Custom("unknown"), DataType.FP16, Device.CPU,
            1, 2048, None, None, None, False, False, False, {},
        )  # fmt: skip

    def validate(self) -> None:
        """Raises ConfigError when the path is empty, or a batch, length or parallel size is 0."""
        if not self.model_path:
            raise ConfigError("ModelConfig: model_path must not be empty")
        for name in ("max_batch_size", "max_sequence_length", "tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) == 0:
                raise ConfigError(f"ModelConfig: {name} must be >= 1, got 0")


@dataclass(slots=True)
class TokenUsage(Record):
    """Token counts of one answer; mutable."""

    prompt_tokens: Usize
    completion_tokens: Usize
    total_tokens: Usize

    @staticmethod
    def new(prompt_tokens: int, completion_tokens: int) -> TokenUsage:
        return TokenUsage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens)

    def add_completion_tokens(self, tokens: int) -> None:
        """Add to completion_tokens and recompute the total.  Raises InvalidParameterError for a negative count."""
        self.completion_tokens += check_unsigned(tokens, 2**64, "TokenUsage.add_completion_tokens", "tokens")
        self.total_tokens = self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Scaling of rotary positions.  [TY-MODEL-7; D-29]"""

    scaling_type: str = field(metadata={"json_aliases": ("rope_type", "type")})
    factor: F32

    @staticmethod
    def from_config(settings: Mapping[str, Json]) -> RopeScaling:
        """`rope_scaling` of a config.json: the type under `rope_type`, `type` or `scaling_type`.  [TY-MODEL-7; D-29]

        Further keys (of llama3, yarn, ...) belong to the model and are ignored here. Pure.
        Raises InvalidFormatError when the type is no text or the factor no number.
        """
        named = [settings[key] for key in ("rope_type", "type", "scaling_type") if key in settings]
        factor = settings.get("factor")
        if not named or not isinstance(named[0], str):
            raise InvalidFormatError(f"rope_scaling: rope_type must be a text, got {named[0] if named else None!r}")
        if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not math.isfinite(factor):
            raise InvalidFormatError(f"rope_scaling: factor must be a finite number, got {factor!r}")
        return RopeScaling(named[0], float(factor))


@dataclass(frozen=True, slots=True)
class AttentionConfig(Record):
    """What config.json says about attention."""

    attention_bias: bool = False
    sliding_window: Usize | None = None
