"""Bound of attention, whatever its schedule: two passes, online, split over keys.  Clauses: PA-ATTENTION-1..5."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferrum_ref.parity.bounds.dot import dot_error
from ferrum_ref.parity.bounds.softmax import weight_error
from ferrum_ref.parity.error_model import ErrorModel
from ferrum_ref.parity.units import Array

CHUNK_ELEMENTS = 1 << 21  # (rows, keys, elements) held at a time while summing p |v - o| E


def attention_errors(
    models: Sequence[ErrorModel],
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    visible: Array,
    softcap: float = 0.0,
    sinks: Array | None = None,
) -> tuple[Array, list[Array]]:
    """The float64 result o = softmax(cap(scale q k^T)) v of one head, and e for each of `models`.

    e_d = sum_j p_j |v_jd - o_d| E_j / (1 - sum_j p_j E_j) + (2 gamma_L + n_blk (tau_exp + 3u) + tau_div + u + u_P) A_d,
    A_d = sum_j p_j |v_jd|, E_j = scale gamma_{D+1} sum_d |q_d k_jd| + 2u |s_j| + u |s_j - max| + tau_exp
    (+ u_s |s_j| where scores are stored). L counts the row's visible keys, n_blk the blocks of a declared key_block.
    A sink is one more key, of the given logit, whose value is zero.

    q (T, D), k and v (S, D) float64, visible (T, S) bool, sinks (T,); a row that sees nothing is zero, exactly. Pure.
    """
    num_rows, num_keys = visible.shape
    value = np.zeros(q.shape)
    errors = [np.zeros(q.shape) for _ in models]
    step = max(1, CHUNK_ELEMENTS // max(1, num_keys * q.shape[1]))
    for start in range(0, num_rows if num_keys else 0, step):
        rows = slice(start, start + step)
        beside = None if sinks is None else sinks[rows, None]
        value[rows], parts = _rows(models, q[rows], k, v, scale, visible[rows], softcap, beside)
        for error, part in zip(errors, parts, strict=True):
            error[rows] = part
    return value, errors


def _rows(
    models: Sequence[ErrorModel],
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    visible: Array,
    softcap: float,
    sinks: Array | None,
) -> tuple[Array, list[Array]]:
    products = q @ k.T
    scaled = scale * products
    raw = softcap * np.tanh(scaled / softcap) if softcap else scaled
    scores = np.where(visible, raw, -np.inf)
    num_visible = visible.sum(axis=-1, keepdims=True)
    seen = num_visible > 0
    highest = np.where(seen, scores.max(axis=-1, keepdims=True), 0.0)
    if sinks is not None:
        highest = np.maximum(highest, sinks)
    weights = np.exp(scores - highest)
    unseen = 0.0 if sinks is None else np.exp(sinks - highest)
    total = weights.sum(axis=-1, keepdims=True) + unseen
    probabilities = weights / np.where(seen, total, 1.0)
    value = probabilities @ v
    magnitude = probabilities @ np.abs(v)
    distance = np.where(visible, highest - np.where(visible, raw, 0.0), 0.0)
    deviation = np.abs(v[None, :, :] - value[:, None, :])
    parts = []
    for model in models:
        error_of_score = _score_error(model, q, k, products, scale)
        if softcap:
            error_of_score = _capped_error(model, scaled, error_of_score, softcap)
        weighted = probabilities * weight_error(model, distance, error_of_score)
        shared = weighted.sum(axis=-1, keepdims=True)
        moved = np.einsum("tj,tjd->td", weighted, deviation)
        if sinks is not None:  # the sink's own weight errs too; its value is zero
            sunk = unseen / total * weight_error(model, highest - sinks)
            shared, moved = shared + sunk, moved + sunk * np.abs(value)
        moved = moved / np.maximum(1.0 - shared, model.unit)
        lost = np.where(visible, 1.0, 0.0) @ np.abs(v)
        num_terms = num_visible + (0 if sinks is None else 1)
        error = moved + _summation(model, num_terms) * magnitude + _lost_per_key(model) * lost
        parts.append(np.where(seen, error, 0.0))
    return value, parts


def _capped_error(model: ErrorModel, scaled: Array, error: Array, softcap: float) -> Array:
    """Error of c tanh(s / c): the slope 1 - tanh^2 where it is steepest, times the error of s; tanh's own claim.

    The quotient and the last product add u each.
    """
    error = error + model.unit * np.abs(scaled)
    nearest = np.maximum(np.abs(scaled) - error, 0.0) / softcap
    slope = 1.0 - np.square(np.tanh(nearest))
    own = (model.tau(model.algorithm.tanh_ulp) + model.unit) * softcap * np.abs(np.tanh(scaled / softcap))
    total: Array = slope * error + own
    return total


def _score_error(model: ErrorModel, q: Array, k: Array, products: Array, scale: float) -> Array:
    scores = np.abs(scale * products)
    stored = model.storage.unit if model.algorithm.rounds_scores else 0.0
    error: Array = abs(scale) * dot_error(model, q, k.T, products, more_roundings=2)
    return error + (2.0 * model.unit + stored) * scores


def _summation(model: ErrorModel, num_visible: Array) -> Array:
    """Relative growth of numerator and denominator, of the rescalings between blocks, and of rounded probabilities."""
    algorithm = model.algorithm
    growth = 2.0 * model.gamma(model.additions(num_visible) + 1.0)
    if algorithm.key_block is not None:
        num_blocks = np.ceil(num_visible / algorithm.key_block)
        growth = growth + num_blocks * (model.tau(algorithm.exp_ulp) + 3.0 * model.unit)
    rounded = model.storage.unit if algorithm.rounds_probabilities else 0.0
    total: Array = growth + model.tau(algorithm.div_ulp) + model.unit + rounded + model.extra
    return total


def _lost_per_key(model: ErrorModel) -> float:
    """What one key may lose, relative to |v|, because its probability falls below a normal range."""
    return model.flush + (model.storage.eta if model.algorithm.rounds_probabilities else 0.0)
