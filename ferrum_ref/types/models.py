"""Facts about models: family, size, where their files are, how they are quantised, and token counts.

Upstream: `ferrum_types::models`.  Clauses: TY-MODEL-1..5 (specs/types.md).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar, Literal

from ferrum_ref.errors import ConfigError, InvalidParameterError
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import ModelId
from ferrum_ref.types.record import F32, U8, U64, Json, Record, Usize

Family = Literal["llama", "mistral", "qwen", "phi", "gemma", "embedding", "clip", "code", "custom"]


@dataclass(frozen=True, slots=True)
class ModelType:
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


class ModelSource:
    """Where a model is: one of `ModelSource.Local`, `.HuggingFace`, `.Url`, `.S3`."""

    __slots__ = ()
    Local: ClassVar[type[LocalSource]]
    HuggingFace: ClassVar[type[HuggingFaceSource]]
    Url: ClassVar[type[UrlSource]]
    S3: ClassVar[type[S3Source]]


@dataclass(frozen=True, slots=True)
class LocalSource(ModelSource):
    """A path on this machine."""

    path: str


@dataclass(frozen=True, slots=True)
class HuggingFaceSource(ModelSource):
    """A repository of the Hugging Face hub."""

    repo_id: str
    revision: str | None
    cache_dir: str | None


@dataclass(frozen=True, slots=True)
class UrlSource(ModelSource):
    """An address, with the request headers it needs."""

    url: str
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class S3Source(ModelSource):
    """An object in an S3 bucket."""

    bucket: str
    key: str
    region: str | None
    endpoint: str | None


ModelSource.Local = LocalSource
ModelSource.HuggingFace = HuggingFaceSource
ModelSource.Url = UrlSource
ModelSource.S3 = S3Source


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


class QuantizationConfig(Record):
    """How weights are quantised: `.GPTQ`, `.AWQ`, `.FP8`, `.INT8`, `.INT4` or `.SmoothQuant`.  [TY-MODEL-5]"""

    __slots__ = ()
    GPTQ: ClassVar[type[GptqConfig]]
    AWQ: ClassVar[type[AwqConfig]]
    FP8: ClassVar[type[Fp8Config]]
    INT8: ClassVar[type[Int8Config]]
    INT4: ClassVar[type[Int4Config]]
    SmoothQuant: ClassVar[type[SmoothQuantConfig]]

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

    num_bits: U8
    group_size: Usize
    desc_act: bool


@dataclass(frozen=True, slots=True)
class AwqConfig(QuantizationConfig):
    """AWQ; the field upstream calls `bits` is `num_bits` here, beside the method `bits()`."""

    num_bits: U8
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
        """Add to completion_tokens and recompute the total."""
        self.completion_tokens += tokens
        self.total_tokens = self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Scaling of rotary positions."""

    scaling_type: str
    factor: F32


@dataclass(frozen=True, slots=True)
class AttentionConfig(Record):
    """What config.json says about attention."""

    attention_bias: bool = False
    sliding_window: Usize | None = None
