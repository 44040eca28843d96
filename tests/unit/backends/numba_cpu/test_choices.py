"""argmax and the sampling pipeline against a plain float64 one, and where it is delicate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.kernel_ops import KernelSamplingParams


def params(seed: int = 0, **changes: Any) -> KernelSamplingParams:
    settings: dict[str, Any] = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "repetition_token_ids": [],
        "repetition_token_freqs": [],
        "rng_seed": seed,
        **changes,
    }
    return KernelSamplingParams(**settings)


def unit(seed: int) -> float:
    """MurmurHash3's fmix32 over 2**32."""
    h = seed
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
    return (h ^ (h >> 16)) / 2**32


@pytest.mark.clause("BK-NCPU-15")
def test_argmax(kernels: Any, tensor: Any) -> None:
    argmax = kernels.sampling_ops().argmax
    assert argmax(tensor([1, 3, 3])) == 1
    assert argmax(tensor([[-np.inf, 2, np.inf]], np.float16)) == 2
    for bad, words in (([1.0, np.nan], "NaN logits"), ([-np.inf], "No valid tokens")):
        with pytest.raises(BackendError, match=words):
            argmax(tensor(bad))
        with pytest.raises(BackendError, match=words):
            kernels.sampling_ops().sample_token(tensor(bad), params())
    with pytest.raises(ShapeError):
        argmax(tensor(np.ones((2, 3))))


@pytest.mark.clause("BK-NCPU-15")
@given(
    logits=st.lists(st.integers(-40, 40), min_size=1, max_size=40),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.05, 1.2),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 7.0]),
    penalty=st.sampled_from([0.5, 1.0, 1.7]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_whole_pipeline(
    logits: list[int], top_k: int, top_p: float, temperature: float, penalty: float, seed: int
) -> None:
    from ferrum_numba.cpu import make_backend

    x = np.array(logits, np.float64) / 7.0
    stored = x.astype(np.float32)
    listed, counts = list(range(0, len(x), 3)) * 2, [index % 4 for index in range(0, len(x), 3)] * 2
    wanted = params(
        seed,
        top_k=top_k,
        top_p=top_p,
        temperature=temperature,
        repetition_penalty=penalty,
        repetition_token_ids=listed,
        repetition_token_freqs=counts,
    )
    backend = make_backend()
    found = backend.kernel_ops().sampling_ops().sample_token(backend.tensor_factory().from_numpy(stored), wanted)
    x = stored.astype(np.float64)
    for index in {id_ for id_, count in zip(listed, counts, strict=True) if count}:
        x[index] = x[index] / wanted.repetition_penalty if x[index] > 0 else x[index] * wanted.repetition_penalty
    if temperature == 0.0:
        assert found == int(x.argmax())
        return
    x /= wanted.temperature
    if 0 < top_k < len(x):
        x[x < np.sort(x)[-top_k]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda index: (-p[index], index))
    before, kept, near = 0.0, np.zeros(len(p), bool), False
    for rank, index in enumerate(order):
        kept[index] = rank == 0 or before < wanted.top_p or wanted.top_p >= 1.0
        near |= abs(before - wanted.top_p) < 1e-12
        before += p[index]
    running = np.cumsum(np.where(kept, p, 0.0))
    point = unit(seed) * running[-1]
    near |= bool(np.min(np.abs(running - point)) < 1e-12 * running[-1])
    if not near:
        assert found == int(np.searchsorted(running, point, side="right"))


@pytest.mark.clause("BK-NCPU-15")
def test_ties_and_masks(kernels: Any, tensor: Any) -> None:
    sample = kernels.sampling_ops().sample_token
    seeds = range(200)
    assert {sample(tensor([0, 0]), params(seed, top_p=0.5)) for seed in seeds} == {0}
    assert {sample(tensor([1, 2, 2, 0]), params(seed, top_k=1)) for seed in seeds} == {1, 2}
    assert {sample(tensor([-np.inf, 0, -np.inf, 0]), params(seed)) for seed in seeds} == {1, 3}
    assert sample(tensor([-np.inf, 0.0]), params(0)) == 1  # u = 0 draws no masked id
    logits = np.zeros(1000)
    logits[700] = 30.0
    assert {sample(tensor(logits), params(seed, top_k=3)) for seed in seeds if seed} == {700}  # u = 0 draws id 0
    assert {sample(tensor([-0.0, 0.0, -1.0]), params(seed, top_k=1)) for seed in seeds} == {0, 1}


@pytest.mark.clause("BK-NCPU-15")
def test_parameters_outside_their_domain(kernels: Any, tensor: Any) -> None:
    sample = kernels.sampling_ops().sample_token
    for changes in (
        {"temperature": -1.0},
        {"temperature": np.nan},
        {"top_p": 0.0},
        {"repetition_penalty": 0.0},
        {"repetition_token_ids": [2], "repetition_token_freqs": [1]},
        {"repetition_token_ids": [1], "repetition_token_freqs": []},
    ):
        with pytest.raises(InvalidParameterError):
            sample(tensor([0.0, 1.0]), params(**changes))
    with pytest.raises(BackendError, match=r"\+inf at index 1"):
        sample(tensor([0.0, np.inf]), params())
