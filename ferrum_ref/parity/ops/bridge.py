"""Reaching a backend through its contracts: arrays in, arrays out."""

from __future__ import annotations

from typing import TypeVar

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.kernel_ops import (
    ActivationOps,
    AttentionOps,
    KernelOps,
    LinearOps,
    NormOps,
    PositionOps,
    SamplingOps,
)
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.units import Array

Part = TypeVar("Part")


def tensor(backend: ComputeBackend, inputs: Inputs, name: str) -> TensorRef:
    """One input array as the backend's tensor, on its own device."""
    return backend.tensor_factory().from_numpy(inputs.arrays[name])


def host(*tensors: TensorRef) -> tuple[Array, ...]:
    """The results as arrays on the host, in their own element type."""
    return tuple(result.to_numpy() for result in tensors)


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
