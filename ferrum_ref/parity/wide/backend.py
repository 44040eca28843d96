"""The judge's own ComputeBackend.   Clauses: PA-WIDE-1..4."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import DeviceError, ShapeError, UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.backend_data import BackendCapabilities, BackendStatus
from ferrum_ref.interfaces.kernel_ops import KernelOps
from ferrum_ref.interfaces.tensor import Shape, TensorFactory, TensorOps, TensorRef
from ferrum_ref.kernels.quant import FORMATS
from ferrum_ref.parity.units import Array
from ferrum_ref.parity.wide.arithmetic import WIDE, Arithmetic
from ferrum_ref.parity.wide.ops import WideKernelOps, WideTensorOps
from ferrum_ref.parity.wide.tensor import WideTensor, array_of
from ferrum_ref.types.devices import DataType, Device


class WideFactory(TensorFactory):
    """Takes arrays as they are; makes nothing random."""

    def from_numpy(self, array: Array, device: Device | None = None) -> TensorRef:
        """The array itself, of any float type of 32 bits or more, or integers."""
        if array.dtype.kind not in "iu" and array.dtype not in (np.float32, np.float64):
            raise DeviceError(f"from_numpy: {array.dtype} in a float64 run, expected float32, float64 or integers")
        return WideTensor(array)

    def from_ids(self, ids: Sequence[int] | Array, device: Device | None = None) -> TensorRef:
        return WideTensor(np.asarray(ids, dtype=np.uint32))

    def from_slice(
        self, data: Sequence[float] | NDArray[np.float32], shape: Shape, dtype: DataType, device: Device
    ) -> TensorRef:
        values = np.asarray(data, dtype=np.float32)
        if values.size != int(np.prod(shape)):
            raise ShapeError(f"from_slice: {values.size} values for shape {shape}")
        return WideTensor(values.reshape(shape)).to_dtype(dtype)

    def empty(self, shape: Shape, dtype: DataType, device: Device) -> TensorRef:
        return self.zeros(shape, dtype, device)

    def zeros(self, shape: Shape, dtype: DataType, device: Device) -> TensorRef:
        return WideTensor(np.zeros(shape, dtype=np.float64)).to_dtype(dtype)

    def ones(self, shape: Shape, dtype: DataType, device: Device) -> TensorRef:
        return WideTensor(np.ones(shape, dtype=np.float64)).to_dtype(dtype)

    def zeros_like(self, tensor: TensorRef) -> TensorRef:
        return WideTensor(np.zeros_like(array_of("zeros_like", tensor)))

    def from_tensor(self, tensor: TensorRef, device: Device) -> TensorRef:
        return WideTensor(array_of("from_tensor", tensor).copy()).to_device(device)

    def to_device(self, tensor: TensorRef, device: Device) -> TensorRef:
        return tensor.to_device(device)

    def narrow(self, tensor: TensorRef, dim: int, start: int, length: int) -> TensorRef:
        low, high = [0] * tensor.ndim(), list(tensor.shape())
        low[dim], high[dim] = start, start + length
        return tensor.view(tuple(low), tuple(high))

    def reshape(self, tensor: TensorRef, shape: Shape) -> TensorRef:
        return tensor.reshape(shape)

    def uniform(self, *_: object, rng: np.random.Generator | None = None) -> NoReturn:
        raise UnsupportedError("uniform: the float64 run draws nothing")

    def normal(self, *_: object, rng: np.random.Generator | None = None) -> NoReturn:
        raise UnsupportedError("normal: the float64 run draws nothing")


class WideBackend(ComputeBackend):
    """Runs what is written over the contracts in `arithmetic`: float64, or a float32 of the noise floor.

    Its tensors call themselves FP32. Tensors of one such backend may be used by another, whatever its arithmetic.
    """

    def __init__(self, arithmetic: Arithmetic = WIDE) -> None:
        self.arithmetic = arithmetic
        self._tensor_ops = WideTensorOps(arithmetic)
        self._kernel_ops = WideKernelOps(arithmetic)
        self._factory = WideFactory()

    def name(self) -> str:
        return f"{np.dtype(self.arithmetic.dtype).name} run"

    def version(self) -> str:
        return f"numpy {np.__version__}"

    def capabilities(self) -> BackendCapabilities:
        return BackendCapabilities(
            supported_dtypes=[DataType.FP32],
            supported_devices=[Device.CPU],
            max_tensor_dims=64,
            supports_fp16=False,
            supports_bf16=False,
            supports_int8=False,
            supports_flash_attention=False,
            supports_paged_attention=False,
            supports_tensor_parallelism=False,
            supports_pipeline_parallelism=False,
            max_batch_size=sys.maxsize,
            max_sequence_length=sys.maxsize,
            memory_alignment=16,
            supports_custom_kernels=False,
            supports_cuda_graphs=False,
            extra_capabilities={"quantized_linear": [name.lower() for name in FORMATS]},
        )

    def tensor_ops(self) -> TensorOps:
        return self._tensor_ops

    def tensor_factory(self) -> TensorFactory:
        return self._factory

    def kernel_ops(self) -> KernelOps:
        return self._kernel_ops

    async def initialize(self, device: Device) -> None:
        if not self.supports_device(device):
            raise DeviceError(f"initialize: device {device}, expected cpu; the float64 run has no other device")

    def supports_device(self, device: Device) -> bool:
        return device == Device.CPU

    async def synchronize(self, device: Device) -> None:
        """Nothing is queued."""

    def status(self) -> BackendStatus:
        return BackendStatus(True, True, [Device.CPU], {}, 0, None, {})

    async def shutdown(self) -> None:
        """Holds nothing."""
