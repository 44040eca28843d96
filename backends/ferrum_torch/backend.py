"""TorchBackend: tensors, operations and kernels of torch on one device.

Clauses: BK-TORCH-1..3, BK-TORCH-11, BK-TORCH-20, BK-TORCH-26, BK-TORCH-33, BK-TORCH-37..38 (specs/backend_torch.md).
"""

from __future__ import annotations

import asyncio

import torch

from ferrum_ref.errors import BackendError, DeviceError, UnsupportedError
from ferrum_ref.interfaces.backend import BackendCapabilities, BackendStatus, ComputeBackend
from ferrum_ref.interfaces.transformer import TransformerWeights
from ferrum_ref.types.devices import Device
from ferrum_torch import conversion
from ferrum_torch.async_ops import TorchAsyncTensorOps
from ferrum_torch.batch import TorchTensorBatchOps
from ferrum_torch.decode import TorchDecodeBackend
from ferrum_torch.factory import TorchTensorFactory
from ferrum_torch.kernel_ops import TorchKernelOps
from ferrum_torch.packed_weights import KINDS
from ferrum_torch.runtime import Runtime
from ferrum_torch.tensor_ops import TorchTensorOps

LARGEST_COUNT = 2**31 - 1


class TorchBackend(ComputeBackend):
    """torch on one device; new tensors go there unless a call names another.

    It reads torch's global settings and changes none: threads, default type, precision and gradient mode stay the
    caller's.
    """

    def __init__(self, device: Device, compiled: bool = False, sdpa: bool = False) -> None:
        """`compiled` passes chains of small operations to torch.compile, `sdpa` attention to torch's fused kernels.

        [BK-TORCH-32, BK-TORCH-36]
        """
        self._compiled, self._sdpa = compiled, sdpa
        self._runtime = Runtime(device, compiled, sdpa)
        self._tensor_ops = TorchTensorOps(self._runtime)
        self._tensor_factory = TorchTensorFactory(self._runtime)
        self._kernel_ops = TorchKernelOps(self._runtime)

    @classmethod
    def on(cls, device: str, compiled: bool = False, sdpa: bool = False) -> TorchBackend:
        """The backend on the device of that name. Raises UnsupportedError when torch cannot use it or compile."""
        try:
            return cls(Device.parse(device), compiled, sdpa)
        except DeviceError as error:
            raise UnsupportedError(error.message) from error

    def name(self) -> str:
        return "torch"

    def version(self) -> str:
        return ", ".join((f"torch {torch.__version__}", *["compiled"] * self._compiled, *["sdpa"] * self._sdpa))

    def capabilities(self) -> BackendCapabilities:
        """Every limit below is torch's own; the devices are those it can use on this machine."""
        return BackendCapabilities(
            supported_dtypes=list(conversion.TORCH_TYPES),
            supported_devices=conversion.usable_devices(),
            max_tensor_dims=64,
            supports_fp16=True,
            supports_bf16=True,
            supports_int8=False,
            supports_flash_attention=self._sdpa,
            supports_paged_attention=True,
            supports_tensor_parallelism=False,
            supports_pipeline_parallelism=False,
            max_batch_size=LARGEST_COUNT,
            max_sequence_length=LARGEST_COUNT,
            memory_alignment=64,
            supports_custom_kernels=False,
            supports_cuda_graphs=self._runtime.torch_device.type == "cuda",
            extra_capabilities={"quantized_linear": list(KINDS), "compiled": self._compiled, "sdpa": self._sdpa},
        )

    def tensor_ops(self) -> TorchTensorOps:
        self._check_open("tensor_ops")
        return self._tensor_ops

    def tensor_factory(self) -> TorchTensorFactory:
        self._check_open("tensor_factory")
        return self._tensor_factory

    def kernel_ops(self) -> TorchKernelOps:
        self._check_open("kernel_ops")
        return self._kernel_ops

    def tensor_batch_ops(self) -> TorchTensorBatchOps:
        """Operations over lists (extension).  [BK-TORCH-26]"""
        self._check_open("tensor_batch_ops")
        return TorchTensorBatchOps(self._runtime)

    def async_tensor_ops(self) -> TorchAsyncTensorOps:
        """Operations that are awaited, with a queue of their own (extension).  [BK-TORCH-26]"""
        self._check_open("async_tensor_ops")
        return TorchAsyncTensorOps(self._runtime)

    def make_decode_backend(
        self, weights: TransformerWeights, *, max_tokens: int | None = None, mode: str | None = None
    ) -> TorchDecodeBackend:
        """A decode step as one function of torch over weights that are this backend's tensors (extension).

        `mode`: "eager", "compiled" or "graph"; by default "compiled" if the backend is, else "eager".  [BK-TORCH-38]
        """
        self._check_open("make_decode_backend")
        return TorchDecodeBackend(weights, mode or ("compiled" if self._compiled else "eager"), max_tokens)

    def supports_device(self, device: Device) -> bool:
        return device in conversion.usable_devices()

    async def initialize(self, device: Device) -> None:
        """Bind to `device`; repeating it changes nothing. Raises DeviceError with the reason if torch cannot use it."""
        self._check_open("initialize")
        self._runtime.torch_device = conversion.torch_device(device, "initialize")
        self._runtime.device = device

    async def synchronize(self, device: Device) -> None:
        """Return when all work queued on `device` is done; on the CPU nothing is ever queued."""
        self._check_open("synchronize")
        target = conversion.torch_device(device, "synchronize")
        if target.type == "cuda":
            await asyncio.to_thread(torch.cuda.synchronize, target)

    def status(self) -> BackendStatus:
        """Memory is reported for GPUs; torch does not count what it holds on the CPU."""
        runtime = self._runtime
        usage = {}
        if runtime.torch_device.type == "cuda":
            usage[runtime.device] = int(torch.cuda.memory_allocated(runtime.torch_device))
        return BackendStatus(
            is_initialized=True,
            is_ready=runtime.is_open,
            active_devices=[runtime.device] if runtime.is_open else [],
            memory_usage=usage,
            operations_completed=runtime.num_operations,
            last_error=None,
            backend_specific={"torch": torch.__version__, "num_threads": torch.get_num_threads()},
        )

    async def shutdown(self) -> None:
        """No further operation is accepted; tensors that others hold stay valid. Repeating it changes nothing."""
        self._runtime.is_open = False

    def _check_open(self, operation: str) -> None:
        if not self._runtime.is_open:
            raise BackendError(f"{operation}: the torch backend was shut down; make a new one with make_backend")
