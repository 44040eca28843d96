"""NumbaCudaBackend: tensors, operations and kernels on one GPU, or under the simulator.

Clauses: BK-NCUDA-1..3, BK-NCUDA-18 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

import asyncio
from importlib.metadata import version

from ferrum_numba.gpu.async_ops import NumbaAsyncTensorOps
from ferrum_numba.gpu.batch import NumbaTensorBatchOps
from ferrum_numba.gpu.decode import NumbaCudaDecodeBackend
from ferrum_numba.gpu.factory import NumbaTensorFactory
from ferrum_numba.gpu.kernel_ops import NumbaKernelOps
from ferrum_numba.gpu.machine import Machine, open_machine, usable_devices, why_unusable
from ferrum_numba.gpu.runtime import Runtime, Tuning
from ferrum_numba.gpu.storage import HOST_TYPES
from ferrum_numba.gpu.tensor_ops import NumbaTensorOps
from ferrum_ref.errors import BackendError, DeviceError, UnsupportedError
from ferrum_ref.interfaces.backend import BackendCapabilities, BackendStatus, ComputeBackend
from ferrum_ref.interfaces.transformer import TransformerWeights
from ferrum_ref.types.devices import Device

LARGEST_COUNT = 2**31 - 1
MOST_DIMS = 32


class NumbaCudaBackend(ComputeBackend):
    """Kernels written in Python for one machine. Work is queued on a stream of the backend's own."""

    def __init__(self, machine: Machine, tuning: Tuning | None = None) -> None:
        self._runtime = Runtime(machine, tuning or Tuning())
        self._tensor_ops = NumbaTensorOps(self._runtime)
        self._tensor_factory = NumbaTensorFactory(self._runtime)
        self._kernel_ops = NumbaKernelOps(self._runtime)
        self._async_ops = NumbaAsyncTensorOps(self._runtime)

    @classmethod
    def on(cls, device: str) -> NumbaCudaBackend:
        """The backend on the device of that name. Raises UnsupportedError when numba-cuda cannot use it here."""
        try:
            return cls(open_machine(device))
        except DeviceError as error:
            raise UnsupportedError(error.message) from error

    def name(self) -> str:
        return "numba-cuda"

    def version(self) -> str:
        return f"numba-cuda {version('numba-cuda')} ({self._runtime.machine.description})"

    def capabilities(self) -> BackendCapabilities:
        """One device; attention is online and keeps no matrix of scores."""
        return BackendCapabilities(
            supported_dtypes=list(HOST_TYPES),
            supported_devices=[self._runtime.machine.device],
            max_tensor_dims=MOST_DIMS,
            supports_fp16=True,
            supports_bf16=True,
            supports_int8=False,
            supports_flash_attention=True,
            supports_paged_attention=True,
            supports_tensor_parallelism=False,
            supports_pipeline_parallelism=False,
            max_batch_size=LARGEST_COUNT,
            max_sequence_length=LARGEST_COUNT,
            memory_alignment=256,
            supports_custom_kernels=False,
            supports_cuda_graphs=False,
            extra_capabilities={
                "quantized_linear": ["q4_0", "q8_0"],
                "machine": self._runtime.machine.description,
                "decode_backend": ["launches", "graph"] if self._runtime.machine.records_graphs else ["launches"],
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
        """Operations over lists (extension).  [BK-NCUDA-45]"""
        self._check_open("tensor_batch_ops")
        return NumbaTensorBatchOps(self._runtime, self._tensor_ops)

    def async_tensor_ops(self) -> NumbaAsyncTensorOps:
        """Operations that are awaited, all in one queue (extension).  [BK-NCUDA-46]"""
        self._check_open("async_tensor_ops")
        return self._async_ops

    def make_decode_backend(
        self, weights: TransformerWeights, *, max_tokens: int | None = None, use_graphs: bool = False
    ) -> NumbaCudaDecodeBackend:
        """A decode loop by a fixed sequence of kernels, over weights that are this backend's tensors (extension).

        `use_graphs`: replayed as a CUDA graph where the GPU records one.  [BK-NCUDA-21..23]
        """
        self._check_open("make_decode_backend")
        return NumbaCudaDecodeBackend(self._runtime, weights, max_tokens=max_tokens, use_graphs=use_graphs)

    def supports_device(self, device: Device) -> bool:
        return device == self._runtime.machine.device

    async def initialize(self, device: Device) -> None:
        """Nothing for the backend's own device. Raises DeviceError for another, with what could be used instead."""
        self._check_open("initialize")
        self._check_device("initialize", device)

    async def synchronize(self, device: Device) -> None:
        """Return when all work queued on the device is done. Raises DeviceError for another device."""
        self._check_device("synchronize", device)
        await asyncio.to_thread(self._runtime.machine.synchronize)

    def status(self) -> BackendStatus:
        """Memory is that in use on the whole GPU, by whomever; under the simulator it is not told."""
        machine = self._runtime.machine
        used = machine.used_bytes() if self._runtime.is_open else None
        return BackendStatus(
            is_initialized=True,
            is_ready=self._runtime.is_open,
            active_devices=[machine.device] if self._runtime.is_open else [],
            memory_usage={} if used is None else {machine.device: used},
            operations_completed=self._runtime.num_operations,
            last_error=None,
            backend_specific={"machine": machine.description},
        )

    async def shutdown(self) -> None:
        """No further operation is accepted; tensors that others hold stay valid. Repeating it changes nothing."""
        self._runtime.is_open = False
        await asyncio.to_thread(self._async_ops.close)

    def _check_open(self, operation: str) -> None:
        if not self._runtime.is_open:
            raise BackendError(f"{operation}: the numba-cuda backend was shut down; make a new one with make_backend")

    def _check_device(self, operation: str, device: Device) -> None:
        own = self._runtime.machine.device
        if device != own:
            usable = ", ".join(str(one) for one in usable_devices()) or "none"
            raise DeviceError(
                f"{operation}: device: got {device}, expected {own}, the device of this backend; make another backend "
                f"(GPUs here: {usable}; {why_unusable(device) or 'this device can be used'})"
            )
