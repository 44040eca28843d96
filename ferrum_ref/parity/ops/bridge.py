"""Reaching a backend through its contracts: arrays in, arrays out."""

from __future__ import annotations

from typing import TypeVar

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.decode_backend import DecodeBackend
from ferrum_ref.interfaces.kernel_ops import (
    ActivationOps,
    AttentionOps,
    KernelOps,
    LinearOps,
    NormOps,
    PositionOps,
    SamplingOps,
)
from ferrum_ref.interfaces.tensor import AsyncTensorOps, TensorBatchOps, TensorRef
from ferrum_ref.interfaces.transformer import TransformerWeights
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.units import Array

Part = TypeVar("Part")


def tensor(backend: ComputeBackend, inputs: Inputs, name: str) -> TensorRef:
    """One input array as the backend's tensor, on its own device."""
    return backend.tensor_factory().from_numpy(inputs.arrays[name])


def host(*tensors: TensorRef) -> tuple[Array, ...]:
    """The results as arrays on the host, in their own element type."""
    return tuple(result.to_numpy() for result in tensors)


def batch_ops(backend: ComputeBackend) -> TensorBatchOps:
    """Operations over lists: what the backend's `tensor_batch_ops()` gives, or its TensorOps if they are that too."""
    give = getattr(backend, "tensor_batch_ops", None)
    offered = give() if callable(give) else backend.tensor_ops()
    return _offered(offered if isinstance(offered, TensorBatchOps) else None, backend, "TensorBatchOps")


def async_ops(backend: ComputeBackend) -> AsyncTensorOps:
    """Operations that are awaited: what `async_tensor_ops()` gives, or the TensorOps if they are that too."""
    give = getattr(backend, "async_tensor_ops", None)
    offered = give() if callable(give) else backend.tensor_ops()
    return _offered(offered if isinstance(offered, AsyncTensorOps) else None, backend, "AsyncTensorOps")


def own_decode_backend(backend: ComputeBackend, weights: TransformerWeights, max_tokens: int) -> DecodeBackend:
    """The decode fast path that a backend offers as `make_decode_backend(weights, max_tokens)`."""
    make = getattr(backend, "make_decode_backend", None)
    if not callable(make):
        raise UnsupportedError(f"backend {backend.name()!r} offers no decode backend of its own")
    made: DecodeBackend = make(weights, max_tokens=max_tokens)
    return made


def _kernels(backend: ComputeBackend) -> KernelOps:
    return _offered(backend.kernel_ops(), backend, "kernel_ops")


def _offered(part: Part | None, backend: ComputeBackend, name: str) -> Part:
    if part is None:
        raise UnsupportedError(f"backend {backend.name()!r} offers no {name}")
    return part


def norm_ops(backend: ComputeBackend) -> NormOps:
    return _offered(_kernels(backend).norm_ops(), backend, "norm_ops")


def position_ops(backend: ComputeBackend) -> PositionOps:
    return _offered(_kernels(backend).position_ops(), backend, "position_ops")


def attention_ops(backend: ComputeBackend) -> AttentionOps:
    return _offered(_kernels(backend).attention_ops(), backend, "attention_ops")


def activation_ops(backend: ComputeBackend) -> ActivationOps:
    return _offered(_kernels(backend).activation_ops(), backend, "activation_ops")


def linear_ops(backend: ComputeBackend) -> LinearOps:
    return _offered(_kernels(backend).linear_ops(), backend, "linear_ops")


def sampling_ops(backend: ComputeBackend) -> SamplingOps:
    return _offered(_kernels(backend).sampling_ops(), backend, "sampling_ops")
