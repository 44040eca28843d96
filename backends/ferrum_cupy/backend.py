"""CupyBackend: the ComputeBackend over one machine.  Clauses: BK-CUPY-1..3, BK-CUPY-12, BK-CUPY-15, BK-CUPY-47."""

from __future__ import annotations

import asyncio
import threading

import numpy as np

from ferrum_cupy.async_ops import CupyAsyncTensorOps
from ferrum_cupy.batch import CupyTensorBatchOps
from ferrum_cupy.decode import CupyDecodeBackend
from ferrum_cupy.factory import CupyTensorFactory
from ferrum_cupy.kernel_ops import CupyKernelOps
from ferrum_cupy.machine import Machine
from ferrum_cupy.memory import CupyMemoryManager
from ferrum_cupy.runtime import Runtime
from ferrum_cupy.storage import ARRAY_TYPES
from ferrum_cupy.tensor_ops import CupyTensorOps
from ferrum_ref.errors import BackendError, DeviceError
from ferrum_ref.interfaces.backend import BackendCapabilities, BackendStatus, ComputeBackend
from ferrum_ref.interfaces.transformer import TransformerWeights
from ferrum_ref.types.devices import Device

LARGEST_COUNT = 2**31 - 1


class CupyBackend(ComputeBackend):
    """One device; its tensors live there and nowhere else."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._runtime = Runtime(machine)
        self._tensor_ops = CupyTensorOps(self._runtime)
        self._tensor_factory = CupyTensorFactory(self._runtime)
        self._kernel_ops = CupyKernelOps(self._runtime)
        self._lock = threading.Lock()
        self._memory: CupyMemoryManager | None = None

    def name(self) -> str:
        return "cupy"

    def version(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._machine.describe().items())

    def capabilities(self) -> BackendCapabilities:
        """What is offered now; heads above 256 and values of another size than keys are refused.  [BK-CUPY-15]"""
        return BackendCapabilities(
            supported_dtypes=list(ARRAY_TYPES),
            supported_devices=[self._machine.device],
            max_tensor_dims=64,
            supports_fp16=True,
            supports_bf16=True,
            supports_int8=False,
            supports_flash_attention=True,
            supports_paged_attention=True,
            supports_tensor_parallelism=False,
            supports_pipeline_parallelism=False,
            max_batch_size=65535,
            max_sequence_length=LARGEST_COUNT,
            memory_alignment=512,
            supports_custom_kernels=False,
            supports_cuda_graphs=False,
            extra_capabilities={"quantized_linear": ["q4_0", "q8_0"], "max_head_dim": 256},
        )

    def tensor_ops(self) -> CupyTensorOps:
        self._check_open("tensor_ops")
        return self._tensor_ops

    def tensor_factory(self) -> CupyTensorFactory:
        self._check_open("tensor_factory")
        return self._tensor_factory

    def kernel_ops(self) -> CupyKernelOps:
        self._check_open("kernel_ops")
        return self._kernel_ops

    def tensor_batch_ops(self) -> CupyTensorBatchOps:
        """Operations over lists (extension).  [BK-CUPY-47..49]"""
        self._check_open("tensor_batch_ops")
        return CupyTensorBatchOps(self._runtime)

    def async_tensor_ops(self) -> CupyAsyncTensorOps:
        """Operations that are awaited, with a queue of their own (extension).  [BK-CUPY-50..51]"""
        self._check_open("async_tensor_ops")
        return CupyAsyncTensorOps(self._runtime)

    def make_decode_backend(
        self, weights: TransformerWeights, *, max_tokens: int | None = None, use_graphs: bool = False
    ) -> CupyDecodeBackend:
        """A decode loop by the same kernels at every step, over weights that are this backend's tensors (extension).

        `use_graphs`: recorded as a CUDA graph and replayed.  [BK-CUPY-17..19]
        """
        self._check_open("make_decode_backend")
        return CupyDecodeBackend(weights, use_graphs=use_graphs, max_tokens=max_tokens)

    def memory_manager(self) -> CupyMemoryManager:
        """The manager of the device's memory, made on the first call; its `streams` orders copies.  [BK-CUPY-20]"""
        self._check_open("memory_manager")
        with self._lock:
            if self._memory is None:
                self._memory = CupyMemoryManager(self._machine, check_open=self._check_open)
            return self._memory

    def supports_device(self, device: Device) -> bool:
        return device == self._machine.device

    async def initialize(self, device: Device) -> None:
        """Nothing to do on its own device; DeviceError for another: one backend drives one device."""
        self._check_open("initialize")
        self._check_device("initialize", device)

    async def synchronize(self, device: Device) -> None:
        """Return when all work queued on `device` is done."""
        self._check_open("synchronize")
        self._check_device("synchronize", device)
        await asyncio.to_thread(self._machine.synchronize)

    def status(self) -> BackendStatus:
        runtime = self._runtime
        return BackendStatus(
            is_initialized=True,
            is_ready=runtime.is_open,
            active_devices=[self._machine.device] if runtime.is_open else [],
            memory_usage={self._machine.device: self._machine.used_bytes()},
            operations_completed=runtime.num_operations,
            last_error=None,
            backend_specific={**self._machine.describe(), "numpy": np.__version__},
        )

    async def shutdown(self) -> None:
        """No further operation is accepted; tensors that others hold stay valid. Repeating it changes nothing."""
        self._runtime.is_open = False

    def _check_open(self, operation: str) -> None:
        if not self._runtime.is_open:
            raise BackendError(f"{operation}: the cupy backend was shut down; make a new one with make_backend")

    def _check_device(self, operation: str, device: Device) -> None:
        if not self.supports_device(device):
            raise DeviceError(f"{operation}: device: got {device}, expected {self._machine.device}")
