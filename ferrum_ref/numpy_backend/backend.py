"""The numpy ComputeBackend.   Clauses: BK-COMPUTE-1..8, BK-NUMPY-1..10."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

import numpy as np

from ferrum_ref.errors import BackendError, DeviceError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.backend_data import BackendCapabilities, BackendConfig, BackendStatus
from ferrum_ref.interfaces.kernel_ops import (
    ActivationOps,
    AttentionOps,
    KernelOps,
    LinearOps,
    NormOps,
    PositionOps,
    SamplingOps,
)
from ferrum_ref.interfaces.tensor import AsyncTensorOps, TensorBatchOps, TensorFactory, TensorOps
from ferrum_ref.numpy_backend.async_ops import NumpyAsyncTensorOps
from ferrum_ref.numpy_backend.batch import NumpyTensorBatchOps
from ferrum_ref.numpy_backend.factory import NumpyTensorFactory
from ferrum_ref.numpy_backend.kernel_ops import NumpyKernelOps
from ferrum_ref.numpy_backend.ledger import Ledger, counted, guarded
from ferrum_ref.numpy_backend.quantized import KINDS
from ferrum_ref.numpy_backend.tensor_ops import NumpyTensorOps
from ferrum_ref.types.algorithm import Algorithm
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.record import Json

if TYPE_CHECKING:
    from ferrum_ref.numpy_backend.memory import NumpyMemoryManager
    from ferrum_ref.numpy_backend.user_kernels import NumpyKernelExecutor


class NumpyBackend(ComputeBackend):
    """Everything on the CPU, finished when a call returns. `rng` feeds the factory's uniform and normal."""

    def __init__(self, rng: np.random.Generator | None = None) -> None:
        self._ledger = Ledger()
        self._tensor_ops = counted(NumpyTensorOps(), self._ledger)
        self._tensor_factory = counted(NumpyTensorFactory(rng), self._ledger, computes=False)
        self._kernel_ops = CountedKernelOps(NumpyKernelOps(), self._ledger)
        self._memory: NumpyMemoryManager | None = None
        self._kernels: NumpyKernelExecutor | None = None
        self._async_ops: NumpyAsyncTensorOps | None = None
        self._config: BackendConfig | None = None
        self._initialized = False
        self._lock = threading.Lock()

    def name(self) -> str:
        return "numpy"

    def version(self) -> str:
        return f"numpy {np.__version__}"

    def capabilities(self) -> BackendCapabilities:
        return BackendCapabilities(
            supported_dtypes=list(DataType),
            supported_devices=[Device.CPU],
            max_tensor_dims=64,
            supports_fp16=True,
            supports_bf16=True,
            supports_int8=False,
            supports_flash_attention=True,
            supports_paged_attention=True,
            supports_tensor_parallelism=False,
            supports_pipeline_parallelism=False,
            max_batch_size=sys.maxsize,
            max_sequence_length=sys.maxsize,
            memory_alignment=16,
            supports_custom_kernels=True,
            supports_cuda_graphs=False,
            extra_capabilities={"accumulation": "fp32", "fp8": "e4m3fn", "quantized_linear": list(KINDS)},
        )

    def tensor_ops(self) -> TensorOps:
        self._ledger.check_open("tensor_ops")
        return self._tensor_ops

    def tensor_batch_ops(self) -> TensorBatchOps:
        """Operations over lists of tensors (extension).  [BK-NUMPY-11]"""
        self._ledger.check_open("tensor_batch_ops")
        return NumpyTensorBatchOps(self._tensor_ops)

    def async_tensor_ops(self) -> AsyncTensorOps:
        """Operations to be awaited, on a thread of their own until `shutdown` (extension).  [BK-NUMPY-11]"""
        self._ledger.check_open("async_tensor_ops")
        with self._lock:
            if self._async_ops is None:
                self._async_ops = NumpyAsyncTensorOps()
            return self._async_ops

    def tensor_factory(self) -> TensorFactory:
        self._ledger.check_open("tensor_factory")
        return self._tensor_factory

    def kernel_ops(self) -> KernelOps:
        self._ledger.check_open("kernel_ops")
        return self._kernel_ops

    def memory_manager(self) -> NumpyMemoryManager:
        """The manager of this backend's arena, made on the first call.  [BK-NUMPY-7]"""
        self._ledger.check_open("memory_manager")
        from ferrum_ref.numpy_backend.backend_memory import make_memory_manager

        with self._lock:
            if self._memory is None:
                self._memory = guarded(make_memory_manager(self._config), self._ledger)
            return self._memory

    def kernel_executor(self) -> NumpyKernelExecutor:
        """The runner of kernels written in Python; it EXECUTES the text it is given.  [BK-KERNEL-1]"""
        self._ledger.check_open("kernel_executor")
        from ferrum_ref.numpy_backend.user_kernels import NumpyKernelExecutor

        with self._lock:
            if self._kernels is None:
                self._kernels = NumpyKernelExecutor(self.memory_manager, done=self._ledger.done)
            return self._kernels

    def configure(self, config: BackendConfig) -> None:
        """Size and growth of the memory pool, and debugging: every new NaN is an error.  [BK-NUMPY-8..9]

        Raises BackendError once the memory manager has been made; what `make_memory_manager` raises.
        """
        self._ledger.check_open("configure")
        from ferrum_ref.numpy_backend.backend_memory import make_memory_manager

        with self._lock:
            if self._memory is not None:
                raise BackendError("configure: the memory manager is in use; configure the backend before")
            self._memory = guarded(make_memory_manager(config), self._ledger)
            self._config = config
            self._ledger.is_debug = config.enable_debug

    async def initialize(self, device: Device) -> None:
        self._ledger.check_open("initialize")
        self._check_device("initialize", device)
        self._initialized = True

    def supports_device(self, device: Device) -> bool:
        return device == Device.CPU

    async def synchronize(self, device: Device) -> None:
        """Return when the queued launches of kernels have run; operations are finished when they return."""
        self._ledger.check_open("synchronize")
        self._check_device("synchronize", device)
        if self._kernels is not None:
            await self._kernels.drain()

    def status(self) -> BackendStatus:
        """What was counted: operations, their last error, bytes lent by the memory manager.  [BK-NUMPY-6..7]"""
        ledger, memory, kernels = self._ledger, self._memory, self._kernels
        lent = memory.memory_info_now(Device.CPU) if memory is not None else None
        specific: dict[str, Json] = {
            "num_allocations": lent.active_allocations if lent is not None else 0,
            "num_kernels": kernels.num_kernels if kernels is not None else 0,
            "optimization_level": self._config.optimization_level if self._config is not None else 0,
        }
        if ledger.is_debug:
            specific["calls"] = dict(sorted(ledger.calls.items()))
        return BackendStatus(
            is_initialized=self._initialized,
            is_ready=ledger.is_open,
            active_devices=[Device.CPU] if ledger.is_open else [],
            memory_usage={Device.CPU: lent.used_bytes if lent is not None else 0} if ledger.is_open else {},
            operations_completed=ledger.num_operations,
            last_error=ledger.last_error,
            backend_specific=specific,
        )

    async def shutdown(self) -> None:
        """Stop kernels, drop the arena, refuse everything from now on; also what was handed out before."""
        with self._lock:
            kernels, self._kernels, self._memory = self._kernels, None, None
            awaited, self._async_ops = self._async_ops, None
            self._ledger.is_open = False
            self._initialized = False
        if awaited is not None:
            awaited.close()
        if kernels is not None:
            await kernels.close()

    def _check_device(self, operation: str, device: Device) -> None:
        if not self.supports_device(device):
            raise DeviceError(f"{operation}: device {device}, expected cpu; the numpy backend has no other device")


class CountedKernelOps(KernelOps):
    """The six parts, their operations entered in the ledger."""

    def __init__(self, kernels: NumpyKernelOps, ledger: Ledger) -> None:
        self._kernels = kernels
        self._norm = counted(kernels.norm_ops(), ledger)
        self._position = counted(kernels.position_ops(), ledger)
        self._attention = counted(kernels.attention_ops(), ledger)
        self._activation = counted(kernels.activation_ops(), ledger)
        self._linear = counted(kernels.linear_ops(), ledger)
        self._sampling = counted(kernels.sampling_ops(), ledger)

    def backend_name(self) -> str:
        return self._kernels.backend_name()

    def norm_ops(self) -> NormOps:
        return self._norm

    def position_ops(self) -> PositionOps:
        return self._position

    def attention_ops(self) -> AttentionOps:
        return self._attention

    def activation_ops(self) -> ActivationOps:
        return self._activation

    def linear_ops(self) -> LinearOps:
        return self._linear

    def sampling_ops(self) -> SamplingOps:
        return self._sampling

    def declared_algorithm(self, op: str) -> Algorithm:
        return self._kernels.declared_algorithm(op)
