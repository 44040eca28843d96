"""The fused operations of a language model, in six optional parts, and a dispatcher that falls back to TensorOps.

Upstream: `ferrum_interfaces::kernel_ops`, with documented extensions: `write_kv`, `embedding`, `context_lens`,
`sliding_window`, `declared_algorithm`. Dims: B batch, T new tokens, S cached positions, H query heads, G kv heads,
D head size, E hidden size, V vocabulary.  Clauses: KN-* in specs/kernels.md.
"""

from __future__ import annotations

from ferrum_ref.interfaces.kernel_ops_data import (
    AttentionParams,
    KernelSamplingParams,
    QuantQ4_0,
    QuantQ8_0,
    QuantScheme,
    RoPEConfig,
    SamplingParams,
)
from ferrum_ref.interfaces.kernel_ops_dispatch import KernelOpsDispatch
from ferrum_ref.interfaces.kernel_ops_traits import (
    ActivationOps,
    AttentionOps,
    Ints,
    KernelOps,
    LinearOps,
    NormOps,
    PositionOps,
    SamplingOps,
)

__all__ = [
    "ActivationOps",
    "AttentionOps",
    "AttentionParams",
    "Ints",
    "KernelOps",
    "KernelOpsDispatch",
    "KernelSamplingParams",
    "LinearOps",
    "NormOps",
    "PositionOps",
    "QuantQ4_0",
    "QuantQ8_0",
    "QuantScheme",
    "RoPEConfig",
    "SamplingOps",
    "SamplingParams",
]
