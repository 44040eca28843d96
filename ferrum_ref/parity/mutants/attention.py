"""Bugs of attention over contiguous keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from ferrum_ref.parity.honest.attention import (
    Sequence,
    attend_online,
    attend_whole,
    attended,
    attention,
    part_of,
    pieces,
    seen,
    with_arrays,
    with_settings,
)
from ferrum_ref.parity.honest.sums import F32, Kernel, stored
from ferrum_ref.parity.mutants.mutant import SIXTEEN_BITS, Mutant
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.units import Array

Outputs = tuple[Array, ...]
HONEST = attention("plain")


def changed(change: Callable[[Sequence], Sequence]) -> Kernel:
    """The honest kernel on a sequence that is not the one asked for."""
    return lambda inputs: attended(inputs, attend_whole, change)


def with_params(**changes: object) -> Kernel:
    """The honest kernel with parameters that are not those asked for."""

    def run(inputs: Inputs) -> Outputs:
        params = replace(inputs.settings["params"], **changes)
        return HONEST(with_settings(inputs, params=params))

    return run


def _causal(one: Sequence) -> bool:
    return not bool(one.visible.all()) or one.q.shape[1] == 1


def mask_off_by_one(one: Sequence) -> Sequence:
    """The newest visible key is lost, unless it is the only one."""
    newest = one.visible & ~np.pad(one.visible, ((0, 0), (0, 1)))[:, 1:]
    kept = one.visible & ~newest
    return replace(one, visible=kept | (~kept.any(axis=-1, keepdims=True) & one.visible))


def mask_top_left(inputs: Inputs) -> Outputs:
    params = inputs.settings["params"]

    def change(one: Sequence) -> Sequence:
        num_tokens, num_keys = one.visible.shape
        if not params.causal:
            return one
        return replace(one, visible=np.arange(num_keys)[None, :] <= np.arange(num_tokens)[:, None])

    return attended(inputs, attend_whole, change)


def heads_interleaved(inputs: Inputs) -> Outputs:
    """Query head h reads kv head h % G."""
    params = inputs.settings["params"]
    group = params.num_heads // params.num_kv_heads
    wrong = np.arange(params.num_heads) % params.num_kv_heads * group
    return attended(inputs, attend_whole, lambda one: replace(one, k=one.k[wrong], v=one.v[wrong]))


def scale_of_padded_head(one: Sequence) -> Sequence:
    size = one.q.shape[-1]
    padded = 1 << (size - 1).bit_length()
    return replace(one, scale=one.scale * (size / padded) ** 0.5)


def first_64_of_head(one: Sequence) -> Sequence:
    """The scores' inner loop stops after 64 elements of a head."""
    return replace(one, q=np.concatenate([one.q[..., :64], 0 * one.q[..., 64:]], axis=-1))


def last_tile_of_keys_dropped(one: Sequence) -> Sequence:
    whole = one.k.shape[1] // 16 * 16
    visible = one.visible.copy()
    if whole:
        visible[:, whole:] = False
    return replace(one, visible=visible)


def first_key_dropped(one: Sequence) -> Sequence:
    visible = one.visible.copy()
    visible[visible.sum(axis=-1) > 1, :1] = False
    return replace(one, visible=visible)


def window_one_wider(inputs: Inputs) -> Outputs:
    params = inputs.settings["params"]
    wider = replace(params, sliding_window=params.sliding_window + 1) if params.sliding_window else params
    return HONEST(with_settings(inputs, params=wider))


def window_one_narrower(inputs: Inputs) -> Outputs:
    params = inputs.settings["params"]
    narrower = replace(params, sliding_window=params.sliding_window - 1) if params.sliding_window > 1 else params
    return HONEST(with_settings(inputs, params=narrower))


def window_from_the_last_query(inputs: Inputs) -> Outputs:
    """All rows of a tile take the window of its last row."""
    params = inputs.settings["params"]

    def change(one: Sequence) -> Sequence:
        rows = seen(one.q.shape[1], one.k.shape[1], params)
        if not params.sliding_window or not rows.size:
            return one
        first = int(rows[-1].argmax()) if rows[-1].any() else 0
        causal = seen(one.q.shape[1], one.k.shape[1], replace(params, sliding_window=0))
        return replace(one, visible=causal & (np.arange(one.k.shape[1]) >= first))

    return attended(inputs, attend_whole, change)


def cap_after_mask(inputs: Inputs) -> Outputs:
    """A masked score of -inf is capped to -c and takes part."""

    def change(one: Sequence) -> Sequence:
        return one

    def attend(one: Sequence) -> Array:
        if not one.softcap or not one.k.shape[1]:
            return attend_whole(one)
        scores = replace(one, softcap=0.0).scores()
        scores = np.tanh(scores / F32(one.softcap)) * F32(one.softcap)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return np.asarray(weights @ one.v / weights.sum(axis=-1, keepdims=True))

    return attended(inputs, attend, change)


def sinks_ignored(inputs: Inputs) -> Outputs:
    return attended(inputs, attend_whole, lambda one: replace(one, sinks=None))


def sinks_scaled(one: Sequence) -> Sequence:
    return one if one.sinks is None else replace(one, sinks=one.sinks * F32(one.scale))


def sinks_of_neighbour(one: Sequence) -> Sequence:
    return one if one.sinks is None else replace(one, sinks=np.roll(one.sinks, 1, axis=0))


def batch_zero_for_all(inputs: Inputs) -> Outputs:
    k, v = (np.broadcast_to(inputs.arrays[name][:1], inputs.arrays[name].shape) for name in "kv")
    return HONEST(with_arrays(inputs, k=k, v=v))


def scores_rounded(one: Sequence, inputs: Inputs) -> Array:
    """Scores stored in the storage type before the softmax."""
    if not one.k.shape[1]:
        return attend_whole(one)
    (scores,) = stored(inputs, one.scores())
    wide_scores = scores.astype(F32)
    top = wide_scores.max(axis=-1, keepdims=True)
    top = np.where(np.isneginf(top), F32(0.0), top if one.sinks is None else np.maximum(top, one.sinks))
    weights = np.exp(wide_scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    if one.sinks is not None:
        total = total + np.exp(one.sinks - top)
    empty = np.isneginf(wide_scores.max(axis=-1, keepdims=True))
    return np.asarray(weights @ one.v / np.where(empty, F32(1.0), total))


def with_scores_rounded(inputs: Inputs) -> Outputs:
    return attended(inputs, lambda one: scores_rounded(one, inputs))


def values_mixed_in_half(one: Sequence) -> Array:
    """P V is accumulated in half precision."""
    if not one.k.shape[1]:
        return attend_whole(one)
    eye = np.broadcast_to(np.eye(one.k.shape[1], dtype=F32), (one.k.shape[0], one.k.shape[1], one.k.shape[1]))
    p = attend_whole(replace(one, v=eye)).astype(np.float16)
    total = np.zeros(one.q.shape, dtype=np.float16)
    for key in range(one.k.shape[1]):
        total = total + p[..., key : key + 1] * one.v[:, key : key + 1].astype(np.float16)
    return np.asarray(total.astype(F32))


def parts_averaged(one: Sequence) -> Array:
    """Split-KV whose parts are averaged instead of weighed by their sums."""
    outputs = []
    for piece in pieces(one.k.shape[1], 8):
        _, total, mixed = part_of(one, piece)
        outputs.append(np.where(total > 0, mixed / np.where(total > 0, total, F32(1.0)), F32(0.0)))
    if not outputs:
        return attend_whole(one)
    return np.asarray(np.mean(outputs, axis=0, dtype=F32))


def maximum_not_subtracted(one: Sequence) -> Array:
    weights = np.exp(one.scores())
    total = weights.sum(axis=-1, keepdims=True)
    if one.sinks is not None:
        total = total + np.exp(one.sinks)
    empty = ~one.visible.any(axis=-1, keepdims=True)
    return np.where(empty, F32(0.0), weights @ one.v / np.where(empty, F32(1.0), total))


def maximum_from_zero(one: Sequence) -> Array:
    """The running maximum starts at zero: where every score lies far below, nothing is left."""
    if not one.k.shape[1]:
        return attend_whole(one)
    scores = one.scores()
    top = np.maximum(scores.max(axis=-1, keepdims=True), F32(0.0))
    return _softmax_mix(one, scores, top)


def finite_mask(one: Sequence) -> Array:
    """A masked score is -10,000, not minus infinity."""
    if not one.k.shape[1]:
        return attend_whole(one)
    scores = np.where(one.visible, replace(one, visible=np.ones_like(one.visible)).scores(), F32(-1e4))
    return _softmax_mix(one, scores, scores.max(axis=-1, keepdims=True))


def _softmax_mix(one: Sequence, scores: Array, top: Array) -> Array:
    """V mixed by exp(scores - top); a row that sees nothing is zero."""
    if one.sinks is not None:
        top = np.maximum(top, one.sinks)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    if one.sinks is not None:
        total = total + np.exp(one.sinks - top)
    empty = ~one.visible.any(axis=-1, keepdims=True)
    return np.where(empty, F32(0.0), weights @ one.v / np.where(empty, F32(1.0), total))


def second_tile_late(one: Sequence) -> Sequence:
    """Of 64 queries a tile, those of the second and later ones take their mask one key too short."""
    visible = one.visible.copy()
    visible[64:, :-1] &= one.visible[64:, 1:]
    return replace(one, visible=visible | (~visible.any(axis=-1, keepdims=True) & one.visible))


def only_16_heads(inputs: Inputs) -> Outputs:
    (o,) = HONEST(inputs)
    o[..., 16:, :] = 0
    return (o,)


def _in(attend: Callable[[Sequence], Array]) -> Kernel:
    return lambda inputs: attended(inputs, attend)


def _name(operation: str, name: str, run: Kernel, dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")) -> Mutant:
    return Mutant("attention" if operation == "attention" else "paged cache", operation, name, run, dtypes)


_mutant = partial(_name, "attention")
ATTENTION: tuple[Mutant, ...] = (
    _mutant("causal mask off by one", changed(mask_off_by_one)),
    _mutant("causal mask top-left", mask_top_left),
    _mutant("causal mask ignored", with_params(causal=False, sliding_window=0)),
    _mutant("kv head h % G", heads_interleaved),
    _mutant("scale from the padded head size", changed(scale_of_padded_head)),
    _mutant("scale applied twice", changed(lambda one: replace(one, scale=one.scale * one.q.shape[-1] ** -0.5))),
    _mutant("only 64 elements of a head", changed(first_64_of_head)),
    _mutant("mean of V", changed(lambda one: replace(one, q=0 * one.q))),
    _mutant("last tile of keys dropped", changed(last_tile_of_keys_dropped)),
    _mutant("first key dropped", changed(first_key_dropped)),
    _mutant("online softmax without rescale", _in(lambda one: attend_online(one, 8, rescales=False))),
    _mutant("split parts averaged", _in(parts_averaged)),
    _mutant("maximum not subtracted", _in(maximum_not_subtracted)),
    _mutant("probabilities rounded, undeclared", attention("rounded P"), SIXTEEN_BITS),
    _mutant("scores rounded, undeclared", with_scores_rounded, SIXTEEN_BITS),
    _mutant("P V in half precision", _in(values_mixed_in_half)),
    _mutant("window one wider", window_one_wider),
    _mutant("window one narrower", window_one_narrower),
    _mutant("window ignored", with_params(sliding_window=0)),
    _mutant("window of the tile's last row", window_from_the_last_query),
    _mutant("soft cap ignored", with_params(logit_softcap=0.0)),
    _mutant("soft cap after the mask", cap_after_mask),
    _mutant("sinks ignored", sinks_ignored),
    _mutant("sinks scaled", changed(sinks_scaled)),
    _mutant("sinks of the next head", changed(sinks_of_neighbour)),
    _mutant("keys of the first batch for all", batch_zero_for_all),
    _mutant("running maximum starts at zero", _in(maximum_from_zero)),
    _mutant("-10,000 for a masked score", _in(finite_mask)),
    _mutant("mask of the second tile of queries", changed(second_tile_late)),
    _mutant("only 16 heads", only_16_heads),
)  # fmt: skip
