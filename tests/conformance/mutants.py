"""Realistic kernel bugs, each a variant of an honest kernel; the judge must reject every one of them on every seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import honest
import honest_attention
import numpy as np
from honest_sums import F32, Array, dot_blas, dot_sequential, stored, total_pairwise, wide

from ferrum_ref.parity.ops.operation import Inputs

Kernel = Callable[[Inputs], tuple[Array, ...]]
EVERY_DTYPE = ("fp32", "fp16", "bf16")
SIXTEEN_BITS = ("fp16", "bf16")


@dataclass(frozen=True)
class Mutant:
    operation: str
    name: str
    run: Kernel
    dtypes: tuple[str, ...] = EVERY_DTYPE


def with_settings(inputs: Inputs, **changes: Any) -> Inputs:
    return replace(inputs, settings={**inputs.settings, **changes})


def with_arrays(inputs: Inputs, **changes: Array) -> Inputs:
    return replace(inputs, arrays={**inputs.arrays, **changes})


# Norms ----------------------------------------------------------------------------------------------------------------


def eps_outside_root(inputs: Inputs) -> tuple[Array, ...]:
    x, weight = wide(inputs, "x", "weight")
    root = np.sqrt((x * x).mean(axis=-1, keepdims=True)) + F32(inputs.settings["eps"])
    return stored(inputs, x / root * weight)


def mean_over_padded_size(inputs: Inputs) -> tuple[Array, ...]:
    x, weight = wide(inputs, "x", "weight")
    padded = -(-x.shape[-1] // 16) * 16
    mean = (x * x).sum(axis=-1, keepdims=True) / F32(padded)
    return stored(inputs, x / np.sqrt(mean + F32(inputs.settings["eps"])) * weight)


def without_variance(inputs: Inputs) -> tuple[Array, ...]:
    x, weight = wide(inputs, "x", "weight")
    return stored(inputs, x * weight)


def residual_rounded_before_norm(inputs: Inputs) -> tuple[Array, ...]:
    x, residual, weight = wide(inputs, "x", "residual", "weight")
    (joined,) = stored(inputs, x + residual)
    root = honest.root_mean(joined.astype(F32), inputs.settings["eps"], total_pairwise, False)
    return (*stored(inputs, joined.astype(F32) * root * weight), joined)


def residual_not_returned(inputs: Inputs) -> tuple[Array, ...]:
    normed, _ = honest.rms_norm_residual(total_pairwise, "plain")(inputs)
    return normed, inputs.arrays["residual"].copy()


# Rotary embedding -----------------------------------------------------------------------------------------------------


def adjacent_pairs(inputs: Inputs) -> tuple[Array, ...]:
    x, cos, sin = wide(inputs, "x", "cos", "sin")
    c, s = (table[inputs.settings["positions"]][:, None, :] for table in (cos, sin))
    y = np.empty_like(x)
    y[..., 0::2] = x[..., 0::2] * c - x[..., 1::2] * s
    y[..., 1::2] = x[..., 1::2] * c + x[..., 0::2] * s
    return stored(inputs, y)


def position_off_by_one(inputs: Inputs) -> tuple[Array, ...]:
    positions = np.maximum(inputs.settings["positions"] - 1, 0)
    return honest.rope("plain")(with_settings(inputs, positions=positions))


def first_position_for_all(inputs: Inputs) -> tuple[Array, ...]:
    positions = inputs.settings["positions"]
    start = positions[0] if len(positions) else 0
    rows = np.minimum(start + np.arange(len(positions)), len(inputs.arrays["cos"]) - 1)
    return honest.rope("plain")(with_settings(inputs, positions=rows))


# Attention ------------------------------------------------------------------------------------------------------------


def attention_with(change: Callable[..., tuple[Any, ...]]) -> Kernel:
    """`change(q, k, v, visible, params)` of one sequence, heads apart, alters what the honest kernel then gets."""

    def run(inputs: Inputs) -> tuple[Array, ...]:
        q, k, v = wide(inputs, "q", "k", "v")
        params = inputs.settings["params"]
        out = np.zeros(q.shape, dtype=F32)
        for batch in range(q.shape[0]):
            visible = honest_attention.seen(q.shape[1], k.shape[1], params)
            parts = change(*honest_attention.heads(q[batch], k[batch], v[batch]), visible, params)
            out[batch] = honest_attention.attend_whole(*parts, "plain", None).swapaxes(0, 1)
        return stored(inputs, out)

    return run


def mask_off_by_one(q: Array, k: Array, v: Array, visible: Array, params: Any) -> tuple[Any, ...]:
    shifted = visible.copy()
    if params.causal and visible.shape[1]:
        shifted[:, :-1] &= visible[:, 1:]  # the newest visible key is lost ...
        shifted[:, -1] = False
        shifted |= ~shifted.any(axis=-1, keepdims=True) & visible  # ... unless it is the only one
    return q, k, v, shifted, params.softmax_scale


def mask_top_left(q: Array, k: Array, v: Array, visible: Array, params: Any) -> tuple[Any, ...]:
    if params.causal:
        visible = np.arange(k.shape[1])[None, :] <= np.arange(q.shape[1])[:, None]
    return q, k, v, visible, params.softmax_scale


def heads_interleaved(q: Array, k: Array, v: Array, visible: Array, params: Any) -> tuple[Any, ...]:
    group = params.num_heads // params.num_kv_heads
    wrong = np.arange(params.num_heads) % params.num_kv_heads * group
    return q, k[wrong], v[wrong], visible, params.softmax_scale


def scale_of_padded_head(q: Array, k: Array, v: Array, visible: Array, params: Any) -> tuple[Any, ...]:
    padded = 1 << (params.head_dim - 1).bit_length()
    return q, k, v, visible, params.softmax_scale * (params.head_dim / padded) ** 0.5


def mean_of_values(q: Array, k: Array, v: Array, visible: Array, params: Any) -> tuple[Any, ...]:
    return np.zeros_like(q), k, v, visible, params.softmax_scale


def no_rescale(inputs: Inputs) -> tuple[Array, ...]:
    """Online softmax whose accumulators are not scaled down when the running maximum rises."""
    q, k, v = wide(inputs, "q", "k", "v")
    params = inputs.settings["params"]
    out = np.zeros(q.shape, dtype=F32)
    for batch in range(q.shape[0]):
        qs, ks, vs = honest_attention.heads(q[batch], k[batch], v[batch])
        visible = honest_attention.seen(q.shape[1], k.shape[1], params)
        total, mixed = np.zeros((*qs.shape[:2], 1), dtype=F32), np.zeros(qs.shape, dtype=F32)
        top = np.full_like(total, -np.inf)
        for start in range(0, k.shape[1], 8):
            piece = slice(start, start + 8)
            scores = qs @ ks[:, piece].swapaxes(1, 2) * F32(params.softmax_scale)
            scores = np.where(visible[:, piece], scores, -np.inf)
            top = np.maximum(top, scores.max(axis=-1, keepdims=True))
            weights = np.exp(scores - np.where(np.isfinite(top), top, F32(0.0)))
            total = total + weights.sum(axis=-1, keepdims=True)
            mixed = mixed + weights @ vs[:, piece]
        out[batch] = np.where(total > 0, mixed / np.where(total > 0, total, F32(1.0)), F32(0.0)).swapaxes(0, 1)
    return stored(inputs, out)


# Paged attention ------------------------------------------------------------------------------------------------------


def paged_with(change: Callable[[Inputs], Inputs]) -> Kernel:
    return lambda inputs: honest_attention.paged_attention("plain")(change(inputs))


def last_partial_block_dropped(inputs: Inputs) -> tuple[Array, ...]:
    queries, pairs = honest_attention.gathered(inputs)
    params, block = inputs.settings["params"], inputs.case.sizes["block"]
    out = np.zeros(queries.shape, dtype=F32)
    for batch, (k, v) in enumerate(pairs):
        visible = honest_attention.seen(queries.shape[1], k.shape[0], params).copy()
        whole = k.shape[0] // block * block
        if whole:
            visible[:, whole:] = False
        arguments = (*honest_attention.heads(queries[batch], k, v), visible, params.softmax_scale)
        out[batch] = honest_attention.attend_whole(*arguments, "plain", None).swapaxes(0, 1)
    return stored(inputs, out.reshape(inputs.arrays["q"].shape))


def wrong_page_at_one_block(inputs: Inputs) -> Inputs:
    """The second block of every sequence that has one is read where the first lies."""
    table = inputs.settings["table"].copy()
    block = inputs.case.sizes["block"]
    longer = inputs.settings["lens"] > block
    table[longer, 1:2] = table[longer, 0:1]
    return with_settings(inputs, table=table)


def stale_slot_read(inputs: Inputs) -> tuple[Array, ...]:
    """Every sequence reads one slot beyond its length; unused slots are zero here, as in a cleared cache."""
    caches = {name: np.nan_to_num(inputs.arrays[name].astype(F32)) for name in ("k_cache", "v_cache")}
    lens, block = inputs.settings["lens"], inputs.case.sizes["block"]
    room = inputs.settings["table"].shape[1] * block if len(lens) else 0
    longer = np.where(lens > 0, np.minimum(lens + 1, room), 0)
    return honest_attention.paged_attention("plain")(with_arrays(with_settings(inputs, lens=longer), **caches))


def unused_slots_multiplied_by_zero(inputs: Inputs) -> tuple[Array, ...]:
    """Whole blocks are read and masked with probability zero: harmless until an unused slot holds NaN."""
    queries = inputs.arrays["q"].astype(F32)
    queries = queries if queries.ndim == 4 else queries[:, None]
    params, block = inputs.settings["params"], inputs.case.sizes["block"]
    out = np.zeros(queries.shape, dtype=F32)
    for batch, length in enumerate(inputs.settings["lens"]):
        count = -(-int(length) // block)
        blocks = inputs.settings["table"][batch, :count]
        k, v = (inputs.arrays[name][blocks].astype(F32) for name in ("k_cache", "v_cache"))
        k, v = (part.reshape(-1, *part.shape[2:]) for part in (k, v))
        visible = np.zeros((queries.shape[1], k.shape[0]), dtype=bool)
        visible[:, : int(length)] = honest_attention.seen(queries.shape[1], int(length), params)
        arguments = (*honest_attention.heads(queries[batch], k, v), visible, params.softmax_scale)
        out[batch] = honest_attention.attend_whole(*arguments, "plain", None).swapaxes(0, 1)
    return stored(inputs, out.reshape(inputs.arrays["q"].shape))


# Activations, linear, softmax, choices --------------------------------------------------------------------------------


def gate_and_up_swapped(inputs: Inputs) -> tuple[Array, ...]:
    return honest.silu_mul("plain")(with_arrays(inputs, gate=inputs.arrays["up"], up=inputs.arrays["gate"]))


def silu_rounded_before_product(inputs: Inputs) -> tuple[Array, ...]:
    gate, up = wide(inputs, "gate", "up")
    (activated,) = stored(inputs, gate * honest.sigmoid(gate, "plain"))
    return stored(inputs, activated.astype(F32) * up)


def tanh_for_erf(inputs: Inputs) -> tuple[Array, ...]:
    return honest.gelu_tanh("plain")(inputs)


def tail_of_k_dropped(inputs: Inputs) -> tuple[Array, ...]:
    size = inputs.arrays["x"].shape[-1]
    whole = size // 8 * 8 or size
    cut = with_arrays(inputs, x=inputs.arrays["x"][..., :whole], weight=inputs.arrays["weight"][:, :whole])
    return honest.linear(dot_blas)(cut)


def sixteen_bit_accumulator(inputs: Inputs) -> tuple[Array, ...]:
    narrow = np.float16 if inputs.storage.name == "fp32" else inputs.storage.numpy_dtype
    x, weight = inputs.arrays["x"].astype(narrow), inputs.arrays["weight"].astype(narrow)
    rows = x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])
    total = dot_sequential(rows, weight.T)
    return stored(inputs, total.astype(F32).reshape(*x.shape[:-1], weight.shape[0]))


def undeclared_tf32(inputs: Inputs) -> tuple[Array, ...]:
    def cut(values: Array) -> Array:
        bits = values.astype(F32).view(np.uint32)
        return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(F32)

    x, weight = (cut(np.ascontiguousarray(part)) for part in wide(inputs, "x", "weight"))
    return honest.linear(dot_blas)(with_arrays(inputs, x=x, weight=weight))


def weight_not_transposed(inputs: Inputs) -> tuple[Array, ...]:
    x, weight = inputs.arrays["x"], inputs.arrays["weight"]
    wrong = np.ascontiguousarray(weight).reshape(weight.shape[::-1]).T
    return honest.linear(dot_blas)(with_arrays(inputs, x=x, weight=wrong))


def maximum_not_subtracted(inputs: Inputs) -> tuple[Array, ...]:
    axis = inputs.case.sizes["axis"]
    weights = np.exp(wide(inputs, "x")[0])
    return stored(inputs, weights / weights.sum(axis=axis, keepdims=True))


def last_of_ties(inputs: Inputs) -> tuple[Array, ...]:
    logits = inputs.arrays["logits"].reshape(-1).astype(np.float64)
    return (np.array(logits.size - 1 - np.argmax(logits[::-1]), dtype=np.int64),)


def padded_vocabulary_in_argmax(inputs: Inputs) -> tuple[Array, ...]:
    """A last block filled up with zeros: wrong as soon as every logit is negative."""
    logits = inputs.arrays["logits"].reshape(-1).astype(np.float64)
    padded = np.concatenate([logits, np.zeros(-logits.size % 64)])
    return (np.array(np.argmax(padded), dtype=np.int64),)


def negative_slot_wraps(inputs: Inputs) -> tuple[Array, ...]:
    cache = inputs.arrays["cache"].copy()
    cache.reshape(-1, *cache.shape[2:])[inputs.settings["slots"]] = inputs.arrays["rows"]
    return (cache,)


def id_off_by_one(inputs: Inputs) -> tuple[Array, ...]:
    table = inputs.arrays["table"]
    return (table[np.minimum(inputs.settings["ids"] + 1, len(table) - 1)],)


MUTANTS: tuple[Mutant, ...] = (
    Mutant("rms_norm", "eps outside the square root", eps_outside_root),
    Mutant("rms_norm", "variance over the padded size", mean_over_padded_size),
    Mutant("rms_norm", "variance never computed", without_variance),
    Mutant("rms_norm_residual", "residual rounded before the norm", residual_rounded_before_norm, SIXTEEN_BITS),
    Mutant("rms_norm_residual", "sum not handed back", residual_not_returned),
    Mutant("rotary_embedding", "GPT-J pairs for NeoX pairs", adjacent_pairs),
    Mutant("rotary_embedding", "position off by one", position_off_by_one),
    Mutant("rotary_embedding", "first position for all", first_position_for_all),
    Mutant("attention", "causal mask off by one", attention_with(mask_off_by_one)),
    Mutant("attention", "causal mask top-left", attention_with(mask_top_left)),
    Mutant("attention", "kv head h % G", attention_with(heads_interleaved)),
    Mutant("attention", "scale from the padded head size", attention_with(scale_of_padded_head)),
    Mutant("attention", "mean of V", attention_with(mean_of_values)),
    Mutant("attention", "online softmax without rescale", no_rescale),
    Mutant("attention", "probabilities rounded, undeclared", honest_attention.attention("rounded P"), ("bf16",)),
    Mutant("paged_attention", "last partial block dropped", last_partial_block_dropped),
    Mutant("paged_attention", "wrong page at one block", paged_with(wrong_page_at_one_block)),
    Mutant("paged_attention", "stale slot read", stale_slot_read),
    Mutant("paged_attention", "unused slots multiplied by zero", unused_slots_multiplied_by_zero),
    Mutant("write_kv", "negative slot wraps round", negative_slot_wraps),
    Mutant("silu_mul", "gate and up swapped", gate_and_up_swapped),
    Mutant("silu_mul", "rounded before the product", silu_rounded_before_product, SIXTEEN_BITS),
    Mutant("gelu", "tanh form for erf form", tanh_for_erf),
    Mutant("linear", "tail of K dropped", tail_of_k_dropped),
    Mutant("linear", "16-bit accumulator", sixteen_bit_accumulator),
    Mutant("linear", "TF32, undeclared", undeclared_tf32, ("fp32",)),
    Mutant("linear", "weight not transposed", weight_not_transposed),
    Mutant("softmax", "maximum not subtracted", maximum_not_subtracted),
    Mutant("argmax", "last of the ties", last_of_ties),
    Mutant("argmax", "padding of zeros wins", padded_vocabulary_in_argmax),
    Mutant("embedding", "id off by one", id_off_by_one),
)
