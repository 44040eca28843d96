"""argmax and sample_token: the token that the written pipeline gives, for one seed after another."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.kernel_ops import KernelSamplingParams


def params(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, **more: Any) -> Any:
    return KernelSamplingParams(
        temperature, top_k, top_p, more.get("penalty", 1.0), more.get("ids", []), more.get("counts", []), seed
    )


def pipeline(logits: Any, p: Any) -> int:
    """KN-SAMPLE-1..7 by sorting, in plain Python floats."""
    x = [float(value) for value in logits]
    for index, count in dict(zip(p.repetition_token_ids, p.repetition_token_freqs, strict=True)).items():
        if count:
            x[index] = x[index] / p.repetition_penalty if x[index] > 0 else x[index] * p.repetition_penalty
    if p.temperature < 1e-5:
        return x.index(max(x))
    x = [value / p.temperature for value in x]
    if 0 < p.top_k < len(x):
        floor = sorted(x, reverse=True)[p.top_k - 1]
        x = [value if value >= floor else -math.inf for value in x]
    weights = [math.exp(value - max(x)) for value in x]
    total, before, kept = sum(weights), 0.0, [0.0] * len(x)
    for index in sorted(range(len(x)), key=lambda i: (-weights[i], i)):
        if before < p.top_p * total or not any(kept):
            kept[index] = weights[index]
        before += weights[index]
    point = uniform(p.rng_seed) * sum(kept)
    running = 0.0
    for index, weight in enumerate(kept):
        running += weight
        if running > point and weight > 0.0:
            return index
    raise AssertionError("no token")


def uniform(seed: int) -> float:
    """MurmurHash3's finaliser over 2**32."""
    mixed = seed ^ (seed >> 16)
    mixed = mixed * 0x85EBCA6B & 0xFFFFFFFF
    mixed ^= mixed >> 13
    mixed = mixed * 0xC2B2AE35 & 0xFFFFFFFF
    return (mixed ^ (mixed >> 16)) / 2.0**32


SETTINGS = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "top k": {"temperature": 0.8, "top_k": 4},
    "top k with ties": {"top_k": 2},
    "top p": {"top_p": 0.6},
    "both": {"temperature": 1.5, "top_k": 9, "top_p": 0.8},
    "greedy": {"temperature": 0.0, "ids": [3, 7], "counts": [1, 0], "penalty": 3.0},
    "penalty": {"ids": [0, 3, 5], "counts": [2, 1, 0], "penalty": 1.7, "top_p": 0.9},
}


@pytest.mark.clause("BK-NCUDA-15")
@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_token_is_the_one_of_the_written_pipeline(kernels: Any, tensor: Any, name: str, dtype: Any) -> None:
    rng = np.random.default_rng(11)
    logits = (2.0 * rng.standard_normal(37)).astype(dtype)
    logits[[4, 9, 20]] = logits.max()
    logits[30:33] = -np.inf
    sampling, device = kernels.sampling_ops(), tensor(logits, dtype)
    for seed in (0, 2**31):
        settings = params(seed=seed, **SETTINGS[name])
        assert sampling.sample_token(device, settings) == pipeline(logits, settings)


@pytest.mark.clause("BK-NCUDA-15")
def test_every_token_can_be_drawn_and_masked_ones_cannot(kernels: Any, tensor: Any) -> None:
    logits = tensor([0.0, -np.inf, 0.0, 0.0])
    drawn = {kernels.sampling_ops().sample_token(logits, params(seed=seed)) for seed in range(12)}
    assert drawn == {0, 2, 3}
    half = {kernels.sampling_ops().sample_token(tensor([0.0, 0.0]), params(top_p=0.5, seed=s)) for s in range(4)}
    assert half == {0}


@pytest.mark.clause("BK-NCUDA-15")
@pytest.mark.parametrize("size", [1, 31, 33, 5000])
def test_argmax_is_the_first_maximum(kernels: Any, tensor: Any, size: int) -> None:
    logits = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    for winners in ([size // 2], [size - 1], [0, size - 1], [size // 3, size // 2]):
        row = logits.copy()
        row[winners] = 9.0
        assert kernels.sampling_ops().argmax(tensor(row)) == min(winners)
    assert kernels.sampling_ops().argmax(tensor(np.full((1, size), -3.0))) == 0


@pytest.mark.clause("BK-NCUDA-15")
def test_rows_without_a_token_are_errors(kernels: Any, tensor: Any) -> None:
    sampling = kernels.sampling_ops()
    for call in (sampling.argmax, lambda row: sampling.sample_token(row, params())):
        with pytest.raises(BackendError, match=r"NaN logits \(index 1\)"):
            call(tensor([0.0, np.nan, np.inf, np.nan]))
        with pytest.raises(BackendError, match="No valid tokens"):
            call(tensor([-np.inf] * 3))
        with pytest.raises(ShapeError, match="one row at a time"):
            call(tensor(np.zeros((2, 3))))
        with pytest.raises(ShapeError, match="V > 0"):
            call(tensor(np.zeros(0)))
    assert sampling.argmax(tensor([0.0, np.inf, 1.0])) == 1
    with pytest.raises(BackendError, match=r"got \+inf at index 1"):
        sampling.sample_token(tensor([0.0, np.inf]), params())
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"penalty": 0.0}, {"ids": [5], "counts": [1]}, {"ids": [1]}):
        with pytest.raises(InvalidParameterError, match="sample_token"):
            sampling.sample_token(tensor([0.0, 1.0]), params(**bad))
