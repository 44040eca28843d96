"""A compute backend: the bundle of tensor operations, factory and fused kernels of one framework.

Upstream: `ferrum_interfaces::backend`. Its weight-loading and registry contracts are not part of this module yet.
Clauses: BK-* in specs/backend.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.kernel_ops import KernelOps
from ferrum_ref.interfaces.tensor import TensorFactory, TensorOps
from ferrum_ref.types.devices import DataType, Device


@dataclass(frozen=True, slots=True)
class BackendRequirements:
    """What a caller needs of a backend."""

    required_devices: list[Device]
    required_dtypes: list[DataType]
    min_batch_size: int
    min_sequence_length: int
    requires_flash_attention: bool
    requires_paged_attention: bool
    extra_requirements: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BackendCapabilities:
    """What a backend can do; lengths in tokens, alignment in bytes."""

    supported_dtypes: list[DataType]
    supported_devices: list[Device]
    max_tensor_dims: int
    supports_fp16: bool
    supports_bf16: bool
    supports_int8: bool
    supports_flash_attention: bool
    supports_paged_attention: bool
    supports_tensor_parallelism: bool
    supports_pipeline_parallelism: bool
    max_batch_size: int
    max_sequence_length: int
    memory_alignment: int
    supports_custom_kernels: bool
    supports_cuda_graphs: bool
    extra_capabilities: dict[str, Any]

    def meets_requirements(self, requirements: BackendRequirements) -> bool:
        """True when every need is met, the attention flags and extra requirements included (D-19).  [BK-CAPS-1..2]

        Devices are compared exactly: CUDA(0) is not CUDA(1). An extra requirement is met when the capability of the
        same key has an equal value. Pure.
        """
        return (
            all(device in self.supported_devices for device in requirements.required_devices)
            and all(dtype in self.supported_dtypes for dtype in requirements.required_dtypes)
            and requirements.min_batch_size <= self.max_batch_size
            and requirements.min_sequence_length <= self.max_sequence_length
            and (self.supports_flash_attention or not requirements.requires_flash_attention)
            and (self.supports_paged_attention or not requirements.requires_paged_attention)
            and all(
                key in self.extra_capabilities and self.extra_capabilities[key] == value
                for key, value in requirements.extra_requirements.items()
            )
        )


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """A snapshot of a backend at work; memory in bytes."""

    is_initialized: bool
    is_ready: bool
    active_devices: list[Device]
    memory_usage: dict[Device, int]
    operations_completed: int
    last_error: str | None
    backend_specific: dict[str, Any]


class ComputeBackend(ABC):
    """One framework's way to compute.  [BK-COMPUTE-1..5]

    The synchronous accessors work from construction on; `initialize` binds to a device and may be called repeatedly.
    """

    @abstractmethod
    def name(self) -> str:
        """Identifier, e.g. "numpy"."""

    @abstractmethod
    def capabilities(self) -> BackendCapabilities:
        """What it can do. Pure."""

    @abstractmethod
    def tensor_ops(self) -> TensorOps:
        """Its primitive operations."""

    @abstractmethod
    def tensor_factory(self) -> TensorFactory:
        """Its tensor maker."""

    def memory_manager(self) -> Any:
        """Its device memory manager. Raises UnsupportedError (this default body): none is offered.  [BK-COMPUTE-4]"""
        raise UnsupportedError(
            f"memory_manager: backend {self.name()!r} has none; allocate tensors through tensor_factory()"
        )

    def kernel_executor(self) -> Any | None:
        """Its runner of custom kernels, or None (this default body).  [BK-COMPUTE-4]"""
        return None

    def kernel_ops(self) -> KernelOps | None:
        """Its fused operations, or None (this default body)."""
        return None

    @abstractmethod
    async def initialize(self, device: Device) -> None:
        """Bind to `device`; repeating it changes nothing. Raises DeviceError for a device it does not support."""

    @abstractmethod
    def supports_device(self, device: Device) -> bool:
        """True if tensors may live there. Pure."""

    @abstractmethod
    def version(self) -> str:
        """Free-form version text."""

    @abstractmethod
    async def synchronize(self, device: Device) -> None:
        """Return when all work queued on `device` is done."""

    @abstractmethod
    def status(self) -> BackendStatus:
        """A snapshot. Pure."""

    @abstractmethod
    async def shutdown(self) -> None:
        """Release everything; afterwards `status().is_ready` is False and operations raise BackendError."""
