"""The data of weight loading; see `weights`.  Clauses: WL-DATA-1..4 (specs/weights.md)."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import ClassVar

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.weights_address import public_address
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.record import F32, U8, U64, Json, Record, Usize, check_unsigned


class WeightSource(Record):
    """Where weights come from: `.File`, `.Url`, `.HuggingFace`, `.Memory` or `.S3`.  [WL-DATA-1]

    A source's `repr` hides what may be a secret: header values and the query and password of an address.
    """

    __slots__ = ()
    File: ClassVar[type[FileWeights]]
    Url: ClassVar[type[UrlWeights]]
    HuggingFace: ClassVar[type[HuggingFaceWeights]]
    Memory: ClassVar[type[MemoryWeights]]
    S3: ClassVar[type[S3Weights]]


@dataclass(frozen=True, slots=True)
class FileWeights(WeightSource):
    """A file on this machine and, for a container of several tensors, the tensor's name in it."""

    path: str
    tensor_name: str | None


@dataclass(frozen=True, slots=True, repr=False)
class UrlWeights(WeightSource):
    """An http(s) address, with the request headers it needs."""

    url: str
    headers: dict[str, str]

    def __repr__(self) -> str:
        return f"UrlWeights(url={public_address(self.url)!r}, headers={sorted(self.headers)})"


@dataclass(frozen=True, slots=True)
class HuggingFaceWeights(WeightSource):
    """A file in a repository of the Hugging Face hub; no revision means main."""

    repo_id: str
    filename: str
    revision: str | None
    cache_dir: str | None


@dataclass(frozen=True, slots=True)
class MemoryWeights(WeightSource):
    """Bytes in hand, and the format they are in."""

    data: bytes = field(repr=False)
    format: WeightFormat


@dataclass(frozen=True, slots=True, repr=False)
class S3Weights(WeightSource):
    """An object in a bucket; region and endpoint where they are not the client's own."""

    bucket: str
    key: str
    region: str | None
    endpoint: str | None

    def __repr__(self) -> str:
        endpoint = None if self.endpoint is None else public_address(self.endpoint)
        facts = f"bucket={self.bucket!r}, key={self.key!r}, region={self.region!r}, endpoint={endpoint!r}"
        return f"S3Weights({facts})"


WeightSource.File = FileWeights
WeightSource.Url = UrlWeights
WeightSource.HuggingFace = HuggingFaceWeights
WeightSource.Memory = MemoryWeights
WeightSource.S3 = S3Weights


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """A container format: `.PyTorch`, `.SafeTensors`, `.Numpy`, `.Raw`, `.Onnx` or `.Custom(code)`.  [WL-DATA-2]

    `Custom(code)` is the implementer's own; this project's loader reads GGUF under `WeightFormat.Gguf`.
    """

    name: str
    code: int | None = None

    PyTorch: ClassVar[WeightFormat]
    SafeTensors: ClassVar[WeightFormat]
    Numpy: ClassVar[WeightFormat]
    Raw: ClassVar[WeightFormat]
    Onnx: ClassVar[WeightFormat]
    Gguf: ClassVar[WeightFormat]

    def __post_init__(self) -> None:
        if self.name not in ("PyTorch", "SafeTensors", "Numpy", "Raw", "Onnx", "Custom"):
            raise InvalidParameterError(f"WeightFormat: got {self.name!r}, expected a format's name or Custom")
        if (self.code is not None) != (self.name == "Custom"):
            raise InvalidParameterError(f"WeightFormat: a code goes with Custom only, got {self!r}")
        if self.code is not None:
            check_unsigned(self.code, 2**32, "WeightFormat.Custom", "code")

    @staticmethod
    def Custom(code: int) -> WeightFormat:
        return WeightFormat("Custom", code)


WeightFormat.PyTorch = WeightFormat("PyTorch")
WeightFormat.SafeTensors = WeightFormat("SafeTensors")
WeightFormat.Numpy = WeightFormat("Numpy")
WeightFormat.Raw = WeightFormat("Raw")
WeightFormat.Onnx = WeightFormat("Onnx")
WeightFormat.Gguf = WeightFormat.Custom(0x46554747)  # "GGUF", little-endian


class QuantizationConfig(Record):
    """How `Quantize` packs weights: `.INT8`, `.INT4`, `.FP8`, `.GPTQ` or `.AWQ`.  [WL-QUANT-1..6]

    Beside `ferrum_types`' richer one in `types.models`; upstream has both.
    """

    __slots__ = ()
    INT8: ClassVar[type[Int8Weights]]
    INT4: ClassVar[type[Int4Weights]]
    FP8: ClassVar[type[Fp8Weights]]
    GPTQ: ClassVar[type[GptqWeights]]
    AWQ: ClassVar[type[AwqWeights]]


@dataclass(frozen=True, slots=True)
class Int8Weights(QuantizationConfig):
    """8-bit integers, one scale per tensor; symmetric, or affine with a zero point."""

    symmetric: bool


@dataclass(frozen=True, slots=True)
class Int4Weights(QuantizationConfig):
    """4-bit integers, one scale per `group_size` elements of the input axis."""

    group_size: Usize


@dataclass(frozen=True, slots=True)
class Fp8Weights(QuantizationConfig):
    """8-bit floats: E4M3 if true, else E5M2."""

    e4m3: bool


@dataclass(frozen=True, slots=True)
class GptqWeights(QuantizationConfig):
    """GPTQ: bits, group size, activation order."""

    bits: U8
    group_size: Usize
    desc_act: bool


@dataclass(frozen=True, slots=True)
class AwqWeights(QuantizationConfig):
    """AWQ: bits, and whether zero points are stored."""

    bits: U8
    zero_point: bool


QuantizationConfig.INT8 = Int8Weights
QuantizationConfig.INT4 = Int4Weights
QuantizationConfig.FP8 = Fp8Weights
QuantizationConfig.GPTQ = GptqWeights
QuantizationConfig.AWQ = AwqWeights


class TensorTransformation(Record):
    """A step after reading: `.Transpose`, `.Reshape`, `.Cast`, `.Quantize`, `.Scale` or `.Slice`.  [WL-STEP-1..8]"""

    __slots__ = ()
    Transpose: ClassVar[type[Transpose]]
    Reshape: ClassVar[type[Reshape]]
    Cast: ClassVar[type[Cast]]
    Quantize: ClassVar[type[Quantize]]
    Scale: ClassVar[type[Scale]]
    Slice: ClassVar[type[Slice]]


@dataclass(frozen=True, slots=True)
class Transpose(TensorTransformation):
    """Two axes swapped."""

    dim0: Usize
    dim1: Usize


@dataclass(frozen=True, slots=True)
class Reshape(TensorTransformation):
    """The same elements in row-major order under another shape."""

    shape: list[int]


@dataclass(frozen=True, slots=True)
class Cast(TensorTransformation):
    """Rounded to another element type."""

    dtype: DataType


@dataclass(frozen=True, slots=True)
class Quantize(TensorTransformation):
    """Rounded to the values that a scheme can represent."""

    config: QuantizationConfig


@dataclass(frozen=True, slots=True)
class Scale(TensorTransformation):
    """Multiplied by a float32 factor."""

    factor: F32


@dataclass(frozen=True, slots=True)
class Slice(TensorTransformation):
    """`start:end` of one axis; None is the axis's own end."""

    dim: Usize
    start: Usize | None
    end: Usize | None


TensorTransformation.Transpose = Transpose
TensorTransformation.Reshape = Reshape
TensorTransformation.Cast = Cast
TensorTransformation.Quantize = Quantize
TensorTransformation.Scale = Scale
TensorTransformation.Slice = Slice


class WeightSourceType(enum.Enum):
    """The tag of a WeightSource."""

    File = "File"
    Url = "Url"
    HuggingFace = "HuggingFace"
    Memory = "Memory"
    S3 = "S3"


class TransformationType(enum.Enum):
    """The tag of a TensorTransformation."""

    Transpose = "Transpose"
    Reshape = "Reshape"
    Cast = "Cast"
    Quantize = "Quantize"
    Scale = "Scale"
    Slice = "Slice"


@dataclass(frozen=True, slots=True)
class TensorSpec(Record):
    """A request for one tensor: its final shape, element type and place, and how to get there.  [WL-DATA-3]"""

    name: str
    shape: list[int]
    dtype: DataType
    device: Device
    source: WeightSource
    transformations: list[TensorTransformation]


@dataclass(frozen=True, slots=True)
class WeightMetadata(Record):
    """What a source contains: name -> shape, container, bytes of all tensors, distinct element types.  [WL-META-1]"""

    tensors: dict[str, list[int]]
    format: WeightFormat
    total_size_bytes: U64
    dtypes: list[DataType]
    extra: dict[str, Json]


@dataclass(frozen=True, slots=True)
class WeightLoaderCapabilities(Record):
    """What a loader can do; the largest tensor in bytes.  [WL-LOAD-8]"""

    supported_formats: list[WeightFormat]
    supported_sources: list[WeightSourceType]
    max_tensor_size: U64
    supports_streaming: bool
    supports_concurrent: bool
    supported_transformations: list[TransformationType]


@dataclass(frozen=True, slots=True)
class WeightLoaderConfig(Record):
    """A loader's settings; the cache's size in bytes, None without limit.  [WL-DATA-4]"""

    enable_caching: bool
    cache_dir: str | None
    max_cache_size: U64 | None
    max_concurrent_downloads: Usize
    download_timeout_seconds: U64
    enable_integrity_checks: bool
    default_headers: dict[str, str] = field(repr=False)
