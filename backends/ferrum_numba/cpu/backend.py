"""NumbaCpuBackend: tensors, operations and kernels compiled for this machine's processor.

Clauses: BK-NCPU-1..3, BK-NCPU-16 (specs/backend_numba.md).
"""

from __future__ import annotations

import numba
import numpy as np

from ferrum_numba.cpu import conversion
from ferrum_numba.cpu.batch import NumbaAsyncTensorOps, NumbaTensorBatchOps
from ferrum_numba.cpu.decode import NumbaDecodeBackend
from ferrum_numba.cpu.factory import NumbaTensorFactory
from ferrum_numba.cpu.kernel_ops import NumbaKernelOps
from ferrum_numba.cpu.packing import FORMATS
from ferrum_numba.cpu.runtime import Runtime
from ferrum_numba.cpu.tensor import check_device
from ferrum_numba.cpu.tensor_ops import NumbaTensorOps
from ferrum_numba.cpu.vector import STORED_KINDS
from ferrum_ref.errors import BackendError, DeviceError, UnsupportedError
from ferrum_ref.interfaces.backend import BackendCapabilities, BackendStatus, ComputeBackend
from ferrum_ref.interfaces.transformer import TransformerWeights
from ferrum_ref.types.devices import Device

LARGEST_COUNT = 2**31 - 1


class NumbaCpuBackend(ComputeBackend):
    """Numba on the CPU. It reads Numba's number of threads at every call and changes no setting of Numba."""

    def __init__(self) -> None:
        self._runtime = Runtime()
        self._tensor_ops = NumbaTensorOps(self._runtime)
        self._tensor_factory = NumbaTensorFactory(self._runtime)
        self._kernel_ops = NumbaKernelOps(self._runtime)

    @classmethod
    def on(cls, device: str) -> NumbaCpuBackend:
        """The backend on the device of that name. Raises UnsupportedError for any but "cpu"."""
        try:
            check_device(Device.parse(device), "make_backend")
        except DeviceError as error:
            raise UnsupportedError(error.message) from error
        return cls()

    def name(self) -> str:
        return "numba-cpu"

    def version(self) -> str:
        return f"numba {numba.__version__}"

    def capabilities(self) -> BackendCapabilities:
        """Element types are those that can be stored; 8-bit weights are multiplied, 8-bit activations are not."""
        return BackendCapabilities(
            supported_dtypes=list(conversion.NUMPY_TYPES),
            supported_devices=[Device.CPU],
            max_tensor_dims=int(getattr(np, "MAXDIMS", 64)),
            supports_fp16=True,
            supports_bf16=True,
            supports_int8=True,
            supports_flash_attention=True,
            supports_paged_attention=True,
            supports_tensor_parallelism=False,
            supports_pipeline_parallelism=False,
            max_batch_size=LARGEST_COUNT,
            max_sequence_length=LARGEST_COUNT,
            memory_alignment=16,
            supports_custom_kernels=False,
            supports_cuda_graphs=False,
            extra_capabilities={
                "quantized_linear": list(STORED_KINDS),
                "decode_weights": list(FORMATS),
            },
        )

    def tensor_ops(self) -> NumbaTensorOps:
        self._check_open("tensor_ops")
        return self._tensor_ops

    def tensor_factory(self) -> NumbaTensorFactory:
        self._check_open("tensor_factory")
        return self._tensor_factory

    def kernel_ops(self) -> NumbaKernelOps:
        self._check_open("kernel_ops")
        return self._kernel_ops

    def tensor_batch_ops(self) -> NumbaTensorBatchOps:
        """Operations over lists (extension).  [BK-NCPU-21]"""
        self._check_open("tensor_batch_ops")
        return NumbaTensorBatchOps(self._runtime, self._tensor_ops)

    def async_tensor_ops(self) -> NumbaAsyncTensorOps:
        """Operations that are awaited, with a queue of their own (extension).  [BK-NCPU-21]"""
        self._check_open("async_tensor_ops")
        return NumbaAsyncTensorOps(self._runtime)

    def make_decode_backend(
        self, weights: TransformerWeights, *, max_tokens: int | None = None, weights_format: str = "stored"
    ) -> NumbaDecodeBackend:
        """A decode loop of one kernel a step, over weights that are this backend's tensors (extension).

        `weights_format`: "stored", as they lie, packed ones too; "float32" unpacks those; "int8", "q8_0", "q4_0"
        quantise now.  [BK-NCPU-18..20, BK-NCPU-23..24]
        """
        self._check_open("make_decode_backend")
        return NumbaDecodeBackend(weights, weights_format=weights_format, max_tokens=max_tokens)

    def supports_device(self, device: Device) -> bool:
        return device == Device.CPU

    async def initialize(self, device: Device) -> None:
        """Nothing to do on the CPU, its only device. Raises DeviceError for another."""
        self._check_open("initialize")
        check_device(device, "initialize")

    async def synchronize(self, device: Device) -> None:
        """Return at once: no work is ever queued."""
        self._check_open("synchronize")
        check_device(device, "synchronize")

    def status(self) -> BackendStatus:
        """Memory is numpy's and the caller's; nothing is said of it."""
        runtime = self._runtime
        return BackendStatus(
            is_initialized=True,
            is_ready=runtime.is_open,
            active_devices=[Device.CPU] if runtime.is_open else [],
            memory_usage={},
            operations_completed=runtime.num_operations,
            last_error=None,
            backend_specific={"numba": numba.__version__, "num_threads": numba.get_num_threads()},
        )

    async def shutdown(self) -> None:
        """No further operation is accepted; tensors that others hold stay valid. Repeating it changes nothing."""
        self._runtime.is_open = False

    def _check_open(self, operation: str) -> None:
        if not self._runtime.is_open:
            raise BackendError(f"{operation}: the numba-cpu backend was shut down; make a new one with make_backend")
