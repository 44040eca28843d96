"""The numpy ComputeBackend.   Clauses: BK-COMPUTE-1..5, BK-NUMPY-1..5."""

from __future__ import annotations

import sys

import numpy as np

from ferrum_ref.errors import BackendError, DeviceError
from ferrum_ref.interfaces.backend import BackendCapabilities, BackendStatus, ComputeBackend
from ferrum_ref.interfaces.kernel_ops import KernelOps
from ferrum_ref.interfaces.tensor import TensorFactory, TensorOps
from ferrum_ref.numpy_backend.factory import NumpyTensorFactory
from ferrum_ref.numpy_backend.kernel_ops import NumpyKernelOps
from ferrum_ref.numpy_backend.tensor_ops import NumpyTensorOps
from ferrum_ref.types.devices import DataType, Device


class NumpyBackend(ComputeBackend):
    """Everything on the CPU, finished when a call returns. `rng` feeds the factory's uniform and normal."""

    def __init__(self, rng: np.random.Generator | None = None) -> None:
        self._tensor_ops = NumpyTensorOps()
        self._tensor_factory = NumpyTensorFactory(rng)
        self._kernel_ops = NumpyKernelOps()
        self._initialized = False
        self._shut_down = False

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
            supports_custom_kernels=False,
            supports_cuda_graphs=False,
            extra_capabilities={"accumulation": "fp32", "fp8": "e4m3fn"},
        )

    def tensor_ops(self) -> TensorOps:
        self._check_open("tensor_ops")
        return self._tensor_ops

    def tensor_factory(self) -> TensorFactory:
        self._check_open("tensor_factory")
        return self._tensor_factory

    def kernel_ops(self) -> KernelOps:
        self._check_open("kernel_ops")
        return self._kernel_ops

    async def initialize(self, device: Device) -> None:
        self._check_open("initialize")
        self._check_device("initialize", device)
        self._initialized = True

    def supports_device(self, device: Device) -> bool:
        return device == Device.CPU

    async def synchronize(self, device: Device) -> None:
        self._check_open("synchronize")
        self._check_device("synchronize", device)

    def status(self) -> BackendStatus:
        """Memory and operations are numpy's own and not counted here."""
        return BackendStatus(
            is_initialized=self._initialized,
            is_ready=not self._shut_down,
            active_devices=[] if self._shut_down else [Device.CPU],
            memory_usage={},
            operations_completed=0,
            last_error=None,
            backend_specific={"operations_counted": False, "memory_counted": False},
        )

    async def shutdown(self) -> None:
        self._shut_down = True
        self._initialized = False

    def _check_open(self, operation: str) -> None:
        if self._shut_down:
            raise BackendError(f"{operation}: the numpy backend has been shut down; make a new one with make_backend()")

    def _check_device(self, operation: str, device: Device) -> None:
        if not self.supports_device(device):
            raise DeviceError(f"{operation}: device {device}, expected cpu; the numpy backend has no other device")
