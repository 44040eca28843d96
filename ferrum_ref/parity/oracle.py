"""What each operation means: its float64 value on the stored inputs.

The kernels compute in float64 throughout when they are given float64, so every oracle is one call; each is compared
with an independent float64 formula in the tests, because kernels and oracle share code.  Clauses: PA-ORACLE-1..2.

All arguments and results are float64 arrays unless named otherwise; every function is pure.
"""

from __future__ import annotations

import numpy as np

from ferrum_ref.interfaces.kernel_ops import AttentionParams, SamplingParams
from ferrum_ref.kernels import activation as _activation
from ferrum_ref.kernels import attention as _attention
from ferrum_ref.kernels import linear as _linear
from ferrum_ref.kernels import norm as _norm
from ferrum_ref.kernels import quant as _quant
from ferrum_ref.kernels import rope as _rope
from ferrum_ref.kernels import sampling as _sampling
from ferrum_ref.kernels import softmax as _softmax
from ferrum_ref.parity.units import Array

GREEDY_BELOW = 1e-5  # temperatures below take the first maximum


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    return _norm.rms_norm(x, weight, eps)


def layer_norm(x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, biased variance."""
    return _norm.layer_norm(x, weight, bias, eps)


def rotary_embedding(x: Array, cos: Array, sin: Array, positions: Array) -> Array:
    """(x1 c - x2 s, x2 c + x1 s), halves x1 and x2; the tables' stored values are exact inputs."""
    return _rope.rotary_embedding(x, cos, sin, positions)


def attention(q: Array, k: Array, v: Array, params: AttentionParams, sinks: Array | None = None) -> Array:
    """softmax(cap(scale q k^T) + mask) v; query i sees keys j <= S - T + i if causal; seeing nothing: zero."""
    return _attention.attention(
        q, k, v, params.softmax_scale, params.causal, params.sliding_window, softcap=params.logit_softcap, sinks=sinks
    )


def paged_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    table: Array,
    params: AttentionParams,
    lens: Array,
    sinks: Array | None = None,
) -> Array:
    """`attention` of each sequence over the keys and values that its row of the block table names."""
    scale, causal, window = params.softmax_scale, params.causal, params.sliding_window
    cap = params.logit_softcap
    return _attention.paged_attention(q, k_cache, v_cache, table, lens, scale, causal, window, softcap=cap, sinks=sinks)


def silu(x: Array) -> Array:
    """x / (1 + exp(-x))."""
    return _activation.silu(x)


def silu_mul(gate: Array, up: Array) -> Array:
    """gate / (1 + exp(-gate)) * up."""
    return _activation.silu_mul(gate, up)


def gelu(x: Array) -> Array:
    """x / 2 (1 + erf(x / sqrt(2)))."""
    return _activation.gelu(x)


def gelu_tanh(x: Array) -> Array:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return _activation.gelu(x, "tanh")


def linear(x: Array, weight: Array) -> Array:
    """x @ weight.T; a sum over nothing is zero."""
    return np.asarray(np.matmul(x, weight.T))


def matmul(a: Array, b: Array) -> Array:
    """a @ b, leading axes broadcast."""
    return np.asarray(np.matmul(a, b))


def softmax(x: Array, axis: int) -> Array:
    """exp(x - max) / sum along `axis`; a lane of -inf only is NaN."""
    return _softmax.softmax(x, axis)


def embedding(table: Array, ids: Array) -> Array:
    """table[ids], in the table's own type: exact."""
    return _linear.embedding(table, ids)


def argmax(logits: Array) -> int:
    """Index of the first maximum."""
    return int(np.argmax(logits))


def unpacked(packed_format: str, packed: Array) -> Array:
    """The weights (out, in) of packed rows: every one is a float32 number, hence exact."""
    return np.asarray(_quant.decode(packed_format, np.ascontiguousarray(packed))).astype(np.float64)


def sampling_law(logits: Array, params: SamplingParams) -> tuple[Array, Array]:
    """(scaled logits, probabilities): penalty, temperature, top-k, top-p. Greedy: all mass on the first maximum."""
    x = np.array(logits, dtype=np.float64)
    listed = np.asarray(params.repetition_token_ids, dtype=np.int64)
    active = np.unique(listed[np.asarray(params.repetition_token_freqs, dtype=np.int64) != 0])
    x[active] = np.where(x[active] > 0, x[active] / params.repetition_penalty, x[active] * params.repetition_penalty)
    if params.temperature < GREEDY_BELOW:
        chosen = np.zeros(x.size)
        chosen[int(np.argmax(x))] = 1.0
        return x, chosen
    scores = x / params.temperature
    p = _sampling.kept_probabilities(scores, params.top_k, params.top_p)
    return scores, p / p.sum()


def uniforms(seeds: Array) -> Array:
    """u in [0, 1) of each 32-bit seed."""
    return np.array([_sampling.uniform_from_seed(int(seed)) for seed in seeds])


def drawn_between(p: Array, uniform: Array, error: float) -> tuple[Array, Array]:
    """For each u the first and the last index that it may draw when running sums are off by `error` of the total.

    An index is drawn when its running sum is the first to exceed u times the total; it must be possible itself.
    """
    possible = np.flatnonzero(p > 0.0)
    running = np.cumsum(p[possible])
    low = np.searchsorted(running, uniform * running[-1] - error, side="right")
    high = np.searchsorted(running, uniform * running[-1] + error, side="right")
    last = possible.size - 1
    return possible[np.minimum(low, last)], possible[np.minimum(high, last)]
