"""What the fused operations are told beside their tensors.   Clauses: KN-PARAMS-* in specs/kernels.md."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from ferrum_ref.errors import BackendError
from ferrum_ref.interfaces.quant_schemes import QuantQ4_0 as QuantQ4_0
from ferrum_ref.interfaces.quant_schemes import QuantQ8_0 as QuantQ8_0
from ferrum_ref.interfaces.quant_schemes import QuantScheme as QuantScheme
from ferrum_ref.types.record import F32, U32, Record, Usize


@dataclass(frozen=True, slots=True)
class RoPEConfig(Record):
    """Parameters of a rotary table.  [KN-PARAMS-1]

    Raises BackendError unless head_dim is even and positive, max_seq_len >= 0 and theta > 0.
    """

    head_dim: Usize
    max_seq_len: Usize
    theta: F32

    def __post_init__(self) -> None:
        if self.head_dim <= 0 or self.head_dim % 2:
            raise BackendError(f"RoPEConfig: head_dim is {self.head_dim}, expected an even number above 0")
        if self.max_seq_len < 0:
            raise BackendError(f"RoPEConfig: max_seq_len is {self.max_seq_len}, expected at least 0")
        if not self.theta > 0:
            raise BackendError(f"RoPEConfig: theta is {self.theta}, expected a number above 0 (usually 10000)")
        Record.__post_init__(self)


@dataclass(frozen=True, slots=True)
class AttentionParams(Record):
    """What one attention call needs beside its tensors.  [KN-PARAMS-2]

    `softmax_scale` multiplies Q K^T and is honoured whatever it is (D-52). `sliding_window` (extension) w > 0 limits a
    causal query at position p to the keys p-w+1 .. p; 0 is off; a backend without windows raises UnsupportedError.
    `logit_softcap` (extension) c > 0 replaces every scaled score s by c tanh(s / c) before the mask; 0 is off; a
    backend without it raises UnsupportedError.
    Raises BackendError unless num_kv_heads divides num_heads and all counts are positive.
    """

    num_heads: Usize
    num_kv_heads: Usize
    head_dim: Usize
    softmax_scale: F32
    causal: bool
    sliding_window: Usize = 0
    logit_softcap: F32 = 0.0

    def __post_init__(self) -> None:
        if self.num_heads <= 0 or self.num_kv_heads <= 0 or self.head_dim <= 0:
            raise BackendError(
                f"AttentionParams: num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
                f"head_dim={self.head_dim}; expected all above 0"
            )
        if self.num_heads % self.num_kv_heads:
            raise BackendError(
                f"AttentionParams: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.sliding_window < 0 or (self.sliding_window and not self.causal):
            raise BackendError(
                f"AttentionParams: sliding_window={self.sliding_window} with causal={self.causal}; "
                "expected 0, or a positive window together with causal=True"
            )
        if not 0.0 <= self.logit_softcap < math.inf:
            raise BackendError(
                f"AttentionParams: logit_softcap={self.logit_softcap}; expected 0 (off) or a finite cap above"
            )
        Record.__post_init__(self)


@dataclass(frozen=True, slots=True)
class SamplingParams(Record):
    """A sampling request for the device; alias KernelSamplingParams.  [KN-PARAMS-3]

    Raises InvalidParameterError for a negative top_k or a seed outside 32 bits; `sample_token` checks the rest.
    """

    temperature: F32
    top_k: Usize
    top_p: F32
    repetition_penalty: F32
    repetition_token_ids: list[U32]
    repetition_token_freqs: list[U32]
    rng_seed: U32


KernelSamplingParams: TypeAlias = SamplingParams
