"""The data of compute backends; see `backend`.  Clauses: BK-CAPS-*, BK-DATA-* in specs/backend.md."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.parity_mode import ParityMode
from ferrum_ref.types.record import U8, U64, Json, Record, Usize
from ferrum_ref.types.text_form import Displayed


class BackendType(Displayed, enum.Enum):
    """Upstream's six kinds of backend; `str()` is the display name.  [BK-DATA-1]

    `types.config.BackendType` is another enum, with four of them (D-30).
    """

    Candle = "Candle"
    OnnxRuntime = "OnnxRuntime"
    TensorRT = "TensorRT"
    Metal = "Metal"
    CPU = "CPU"
    Custom = "Custom"

    def __str__(self) -> str:
        return "onnx_runtime" if self is BackendType.OnnxRuntime else self.value.lower()


class MemoryGrowthStrategy(enum.Enum):
    """How a memory pool grows: everything up front, on demand, or some up front and then in steps."""

    Static = "Static"
    Dynamic = "Dynamic"
    Incremental = "Incremental"


@dataclass(frozen=True, slots=True)
class BackendMemoryConfig(Record):
    """A backend's memory pool: its size in bytes (None: the backend's own choice) and alignment in bytes."""

    pool_size: U64 | None
    alignment: Usize
    enable_pooling: bool
    growth_strategy: MemoryGrowthStrategy


@dataclass(frozen=True, slots=True)
class BackendConfig(Record):
    """What a factory is asked to build.  [BK-DATA-2]

    `types.config.BackendConfig` is another record, the engine's; the crate root exports that one (D-30).
    """

    backend_type: BackendType
    device: Device
    optimization_level: U8
    enable_debug: bool
    memory_config: BackendMemoryConfig
    backend_options: dict[str, Json]


@dataclass(frozen=True, slots=True)
class BackendRequirements(Record):
    """What a caller needs of a backend."""

    required_devices: list[Device]
    required_dtypes: list[DataType]
    min_batch_size: Usize
    min_sequence_length: Usize
    requires_flash_attention: bool
    requires_paged_attention: bool
    extra_requirements: dict[str, Json]


@dataclass(frozen=True, slots=True)
class BackendCapabilities(Record):
    """What a backend can do; lengths in tokens, alignment in bytes."""

    supported_dtypes: list[DataType]
    supported_devices: list[Device]
    max_tensor_dims: Usize
    supports_fp16: bool
    supports_bf16: bool
    supports_int8: bool
    supports_flash_attention: bool
    supports_paged_attention: bool
    supports_tensor_parallelism: bool
    supports_pipeline_parallelism: bool
    max_batch_size: Usize
    max_sequence_length: Usize
    memory_alignment: Usize
    supports_custom_kernels: bool
    supports_cuda_graphs: bool
    extra_capabilities: dict[str, Json]

    def meets_requirements(
        self, requirements: BackendRequirements, *, parity_mode: ParityMode = ParityMode.REFERENCE
    ) -> bool:
        """True when every need is met, the attention flags and extra requirements included (D-19).  [BK-CAPS-1..3]

        Devices are compared exactly: CUDA(0) is not CUDA(1). An extra requirement is met when the capability of the
        same key has an equal value. Under UPSTREAM flags and extras are ignored. Pure.
        """
        sizes_fit = (
            all(device in self.supported_devices for device in requirements.required_devices)
            and all(dtype in self.supported_dtypes for dtype in requirements.required_dtypes)
            and requirements.min_batch_size <= self.max_batch_size
            and requirements.min_sequence_length <= self.max_sequence_length
        )
        if parity_mode is ParityMode.UPSTREAM:
            return sizes_fit
        return (
            sizes_fit
            and (self.supports_flash_attention or not requirements.requires_flash_attention)
            and (self.supports_paged_attention or not requirements.requires_paged_attention)
            and all(
                key in self.extra_capabilities and same_json(self.extra_capabilities[key], value)
                for key, value in requirements.extra_requirements.items()
            )
        )


@dataclass(frozen=True, slots=True)
class BackendStatus(Record):
    """A snapshot of a backend at work; memory in bytes. In JSON a device is its `str()` (D-35).  [BK-DATA-3]"""

    is_initialized: bool
    is_ready: bool
    active_devices: list[Device]
    memory_usage: dict[Device, U64]
    operations_completed: U64
    last_error: str | None
    backend_specific: dict[str, Json]


def same_json(one: Json, two: Json) -> bool:
    """Equality of JSON values: as Python's, but true and false are no numbers, at any depth. Pure.  [BK-CAPS-2]"""
    if isinstance(one, bool) or isinstance(two, bool):
        return one is two
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same_json(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return len(one) == len(two) and all(map(same_json, one, two))
    return bool(one == two)
