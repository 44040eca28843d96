"""A backend's operations as the parts of a decoder use them.  Clauses: LM-FORWARD-4, LM-LAYER-1..3 (specs/llm.md)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.forward import Ints
from ferrum_ref.interfaces.kernel_ops import ActivationOps, KernelOps, LinearOps, NormOps, PositionOps
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.config import FULL, SLIDING, DecoderConfig
from ferrum_ref.models.decoder_rope import Table, inverse_frequencies, position_table, rope_tables, scaled_tables
from ferrum_ref.models.matrix import Weight, apply_matrix
from ferrum_ref.models.rope_config import RopeSettings
from ferrum_ref.types.devices import DataType

Part = TypeVar("Part")
Tables = tuple[TensorRef, TensorRef]
_PLAIN: Final = "silu"


class DecoderOps:
    """Kernels of one backend, for tensors of one element type, and the rotary tables of one model."""

    def __init__(self, backend: ComputeBackend, dtype: DataType, config: DecoderConfig, max_tokens: int) -> None:
        """Raises UnsupportedError if the backend lacks a kernel that every decoder needs."""
        kernels = backend.kernel_ops() or _NoKernels()
        self.backend = backend
        self.dtype = dtype
        self.max_tokens = max_tokens
        self.norm: NormOps = _required(kernels.norm_ops(), "norm", backend)
        self.position: PositionOps = _required(kernels.position_ops(), "rotary", backend)
        self.activation: ActivationOps = _required(kernels.activation_ops(), "activation", backend)
        self.linear: LinearOps = _required(kernels.linear_ops(), "linear", backend)
        self.tensor = backend.tensor_ops()
        self._factory = backend.tensor_factory()
        self._tables: dict[str, Tables] = {}
        for kind, rope in rope_by_type(config).items():
            shared = next((k for k in self._tables if rope_by_type(config)[k] == rope), None)
            self._tables[kind] = self._tables[shared] if shared else self._on_backend(_tables(rope, config, max_tokens))

    def tables(self, config: DecoderConfig, layer: int) -> Tables:
        """cos and sin `[max_tokens, rotary_dim/2]` of a layer, on the backend.  Pure."""
        return self._tables[config.layer_types[layer] if config.layer_types else FULL]

    def row_tables(self, rope: RopeSettings, positions: Ints, lengths: Ints) -> Tables:
        """cos and sin of each row, `[N, rotary_dim/2]`, where they depend on its sequence's length.  Pure.

        [LM-ROPE-5, LM-ROPE-8]
        """
        found = {int(length): inverse_frequencies(rope, int(length)) for length in np.unique(lengths)}
        frequencies = np.stack([found[int(length)] for length in lengths])
        return self._on_backend(position_table(frequencies, positions, rope.attention_factor))

    def project(self, x: TensorRef, weight: Weight, bias: TensorRef | None) -> TensorRef:
        """x @ weight.T + bias.  Pure."""
        y = apply_matrix(self.linear, x, weight)
        return y if bias is None else self.tensor.add(y, bias)

    def constant(self, value: float) -> TensorRef:
        """A tensor `(1,)` of the decoder's element type."""
        return self._factory.from_numpy(np.array([value], dtype=np.float32)).to_dtype(self.dtype)

    def activate(self, name: str) -> Callable[[TensorRef], TensorRef]:
        """The activation of that name.  Raises UnsupportedError for another."""
        known: dict[str, Callable[[TensorRef], TensorRef]] = {
            "silu": self.tensor.silu,
            "gelu": self.activation.gelu,
            "gelu_tanh": partial(self.tensor.gelu, approximate="tanh"),
            "relu": self.tensor.relu,
        }
        if name not in known:
            raise UnsupportedError(f"Decoder: hidden_act: got {name!r:.40}, expected one of {', '.join(known)}")
        return known[name]

    def gate(self, name: str) -> Callable[[TensorRef, TensorRef], TensorRef]:
        """act(gate) * up.  Raises UnsupportedError for another activation."""
        if name == _PLAIN:
            return self.activation.silu_mul
        act = self.activate(name)
        return lambda gate, up: self.tensor.mul(act(gate), up)

    def capped(self, scores: TensorRef, cap: float) -> TensorRef:
        """cap * tanh(scores / cap), on the host: in float64, rounded once.  Pure.  [LM-FORWARD-7]"""
        values = scores.to_numpy()
        capped = np.tanh(values.astype(np.float64) / cap) * cap
        return self._factory.from_numpy(capped.astype(host_float(values))).to_dtype(scores.dtype())

    def _on_backend(self, tables: tuple[Table, Table]) -> Tables:
        cos, sin = (self._factory.from_numpy(table).to_dtype(self.dtype) for table in tables)
        return cos, sin


def host_float(values: npt.NDArray[Any]) -> np.dtype[Any]:
    """In which type the host hands numbers back to the backend that gave `values`: float32, or its own wider one.

    Pure.  [LM-FORWARD-7]
    """
    return np.dtype(np.promote_types(values.dtype, np.float32))


def rope_by_type(config: DecoderConfig) -> dict[str, RopeSettings]:
    """The rotary settings of each layer type; none where positions are learned.  Pure.  [LM-ROPE-3]"""
    if config.learned_positions:
        return {}
    rope = config.rope or RopeSettings(rotary_dim=config.head_dim, theta=config.rope_theta)
    return {FULL: rope, SLIDING: config.local_rope or rope}


def _tables(rope: RopeSettings, config: DecoderConfig, max_tokens: int) -> tuple[Table, Table]:
    if rope.kind == "default" and config.rope is None:
        return rope_tables(config.head_dim, max_tokens, config.rope_theta)
    return scaled_tables(rope, max_tokens)


class Norm(Protocol):
    """A norm over the last axis, with its weights."""

    def __call__(self, x: TensorRef) -> TensorRef:
        """Pure."""

    def after_add(self, update: TensorRef, residual: TensorRef) -> tuple[TensorRef, TensorRef]:
        """(norm(r), r) with r = update + residual.  Pure."""


class RmsNorm:
    """x / sqrt(mean(x**2) + eps) * weight."""

    def __init__(self, ops: DecoderOps, weight: TensorRef, eps: float) -> None:
        self._norm = ops.norm
        self._weight = weight
        self._eps = eps

    def __call__(self, x: TensorRef) -> TensorRef:
        return self._norm.rms_norm(x, self._weight, self._eps)

    def after_add(self, update: TensorRef, residual: TensorRef) -> tuple[TensorRef, TensorRef]:
        return self._norm.rms_norm_residual(update, residual, self._weight, self._eps)


class LayerNorm:
    """(x - mean) / sqrt(var + eps) * weight + bias."""

    def __init__(self, ops: DecoderOps, weight: TensorRef, bias: TensorRef | None, eps: float) -> None:
        self._tensor = ops.tensor
        self._weight = weight
        self._bias = bias
        self._eps = eps

    def __call__(self, x: TensorRef) -> TensorRef:
        return self._tensor.layer_norm(x, self._weight, self._bias, self._eps)

    def after_add(self, update: TensorRef, residual: TensorRef) -> tuple[TensorRef, TensorRef]:
        total = self._tensor.add(update, residual)
        return self(total), total


class _NoKernels(KernelOps):
    """Stands for a backend without fused kernels."""

    def backend_name(self) -> str:
        return "none"


def _required(part: Part | None, kind: str, backend: ComputeBackend) -> Part:
    """The part itself.  Raises UnsupportedError if the backend has none."""
    if part is None:
        raise UnsupportedError(f"Decoder: backend {backend.name()!r} offers no {kind} kernels; choose another backend")
    return part
