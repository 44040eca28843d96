"""Compute backends: the bundle of one framework's parts, the factory that makes them, the registry that keeps them.

Upstream: `ferrum_interfaces::backend`. Data are in `backend_data`, custom kernels in `backend_kernels`, weight loading
in `weights`; all their names are this module's too.  Clauses: BK-* in specs/backend.md, WL-* in specs/weights.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.backend_data import (
    BackendCapabilities,
    BackendConfig,
    BackendMemoryConfig,
    BackendRequirements,
    BackendStatus,
    BackendType,
    MemoryGrowthStrategy,
)
from ferrum_ref.interfaces.backend_kernels import KernelArg, KernelExecutor, KernelHandle, KernelInfo
from ferrum_ref.interfaces.backend_scalar import ScalarValue
from ferrum_ref.interfaces.kernel_ops import KernelOps
from ferrum_ref.interfaces.tensor import TensorFactory, TensorOps
from ferrum_ref.interfaces.weights import (
    QuantizationConfig,
    TensorSpec,
    TensorTransformation,
    TransformationType,
    WeightFormat,
    WeightLoader,
    WeightLoaderCapabilities,
    WeightLoaderConfig,
    WeightMetadata,
    WeightSource,
    WeightSourceType,
)
from ferrum_ref.types.devices import Device

if TYPE_CHECKING:
    from ferrum_ref.interfaces.memory import DeviceMemoryManager

__all__ = [
    "BackendCapabilities",
    "BackendConfig",
    "BackendFactory",
    "BackendMemoryConfig",
    "BackendRegistry",
    "BackendRequirements",
    "BackendStatus",
    "BackendType",
    "ComputeBackend",
    "KernelArg",
    "KernelExecutor",
    "KernelHandle",
    "KernelInfo",
    "MemoryGrowthStrategy",
    "QuantizationConfig",
    "ScalarValue",
    "TensorSpec",
    "TensorTransformation",
    "TransformationType",
    "WeightFormat",
    "WeightLoader",
    "WeightLoaderCapabilities",
    "WeightLoaderConfig",
    "WeightMetadata",
    "WeightSource",
    "WeightSourceType",
]


class ComputeBackend(ABC):
    """One framework's way to compute; may be shared between threads (D-47).  [BK-COMPUTE-1..8]

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

    def memory_manager(self) -> DeviceMemoryManager:
        """Its device memory manager. Raises UnsupportedError (this default body): none is offered.  [BK-COMPUTE-4]"""
        raise UnsupportedError(
            f"memory_manager: backend {self.name()!r} has none; allocate tensors through tensor_factory()"
        )

    def kernel_executor(self) -> KernelExecutor | None:
        """Its runner of custom kernels, or None (this default body).  [BK-COMPUTE-4]"""
        return None

    def kernel_ops(self) -> KernelOps | None:
        """Its fused operations, or None (this default body)."""
        return None

    def configure(self, config: BackendConfig) -> None:
        """Take over a factory's settings, before the first use (extension).  [BK-COMPUTE-8]

        This default body takes what asks for nothing: an `optimization_level` is a hint and changes no result, an
        alignment that its memory has anyhow is met. Raises UnsupportedError for a pool size or debugging, which it
        cannot give, and for a larger alignment.
        """
        memory, granted = config.memory_config, self.capabilities().memory_alignment
        for setting, wanted in (("memory_config.pool_size", memory.pool_size), ("enable_debug", config.enable_debug)):
            if wanted:
                raise UnsupportedError(
                    f"configure: {setting}: got {wanted}, and backend {self.name()!r} has no such setting; leave it out"
                )
        if memory.alignment and granted % memory.alignment:
            raise UnsupportedError(
                f"configure: memory_config.alignment: got {memory.alignment}, expected a divisor of {granted}, "
                f"to which backend {self.name()!r} aligns"
            )

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


class BackendFactory(ABC):
    """Makes backends and weight loaders from settings.  [BK-FACTORY-1..7]"""

    @abstractmethod
    async def create_compute_backend(self, config: BackendConfig) -> ComputeBackend:
        """A new backend, configured and initialised on `config.device`.

        Raises what `validate_config` raises; UnsupportedError (with the remedy) when it is not installed.
        """

    @abstractmethod
    async def create_weight_loader(self, config: WeightLoaderConfig) -> WeightLoader:
        """A new loader. Raises ConfigError for settings that cannot work."""

    @abstractmethod
    def supported_backend_types(self) -> list[BackendType]:
        """The kinds it can build here, in the order of BackendType. Pure."""

    @abstractmethod
    def validate_config(self, config: BackendConfig) -> None:
        """Raises ConfigError (settings), UnsupportedError (kind), DeviceError (device) where no backend can come of it.

        Pure.
        """


class BackendRegistry(ABC):
    """Keeps backends and weight loaders by name; a backend and a loader may share one.  [BK-REGISTRY-1..5]"""

    @abstractmethod
    def register_compute_backend(self, name: str, backend: ComputeBackend) -> None:
        """Keep it under `name`. Raises AlreadyExistsError (name taken), InvalidParameterError (empty name)."""

    @abstractmethod
    def register_weight_loader(self, name: str, loader: WeightLoader) -> None:
        """Keep it under `name`. Raises AlreadyExistsError (name taken), InvalidParameterError (empty name)."""

    @abstractmethod
    def get_compute_backend(self, name: str) -> ComputeBackend | None:
        """The backend of that name, or None. Pure."""

    @abstractmethod
    def get_weight_loader(self, name: str) -> WeightLoader | None:
        """The loader of that name, or None. Pure."""

    @abstractmethod
    def find_best_compute_backend(self, requirements: BackendRequirements) -> ComputeBackend | None:
        """The first registered one that is ready and meets the requirements, or None. Pure."""

    @abstractmethod
    def list_backend_names(self) -> tuple[list[str], list[str]]:
        """(names of backends, names of loaders), each in the order of registration. Pure."""
