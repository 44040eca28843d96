"""argmax and sample_token: ties, masks, every stage of the pipeline, and the frequencies of its draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from ferrum_torch.sampling import kept_probabilities, uniform_from_seed
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ferrum_ref.errors import BackendError, InvalidParameterError
from ferrum_ref.interfaces.kernel_ops import KernelSamplingParams

INF = math.inf


def parameters(**changes: Any) -> KernelSamplingParams:
    values: dict[str, Any] = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "repetition_token_ids": [],
        "repetition_token_freqs": [],
        "rng_seed": 0,
    }
    return KernelSamplingParams(**{**values, **changes})


@pytest.mark.clause("BK-TORCH-17")
def test_argmax_takes_the_first_of_equal_maxima(kernels: Any, tensor: Any) -> None:
    argmax = kernels.sampling_ops().argmax
    assert argmax(tensor([1, 3, 3])) == 1  # D-03: upstream 2
    assert argmax(tensor([[2, 2, 2]])) == 0
    assert argmax(tensor([-INF, INF, INF])) == 1
    assert argmax(tensor([-INF, -5.0])) == 1
    assert argmax(tensor([1, 3, 3], np.float16)) == 1
    row = np.zeros(50_000)
    for first in (1, 777, 31_000, 49_998):
        row[:] = 0
        row[[first, 49_999]] = 2.5
        assert argmax(tensor(row)) == first


@pytest.mark.clause("BK-TORCH-17", "BK-TORCH-18")
@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ([5, np.nan, 1], r"NaN logits \(index 1\)"),
        ([-INF, -INF], "No valid tokens"),
        ([], "expected"),
        ([[1], [2]], "expected"),
    ],
)
def test_bad_rows(kernels: Any, tensor: Any, row: Any, complaint: str) -> None:
    with pytest.raises(BackendError, match=complaint):
        kernels.sampling_ops().argmax(tensor(row))
    with pytest.raises(BackendError, match=complaint):
        kernels.sampling_ops().sample_token(tensor(row), parameters())


@pytest.mark.clause("BK-TORCH-18")
def test_each_stage_acts_and_in_this_order(kernels: Any, tensor: Any) -> None:
    sample = kernels.sampling_ops().sample_token
    row = tensor([2.0, 1.0, -1.0, 0.5])
    assert sample(row, parameters(temperature=0.0)) == 0
    assert sample(row, parameters(top_k=1, rng_seed=5)) == 0
    assert sample(row, parameters(top_p=1e-9, rng_seed=5)) == 0
    penalty = {"repetition_penalty": 4.0, "temperature": 0.0}
    assert sample(row, parameters(**penalty, repetition_token_ids=[0, 0], repetition_token_freqs=[2, 2])) == 1
    assert sample(row, parameters(**penalty, repetition_token_ids=[0], repetition_token_freqs=[0])) == 0
    # Negative logits are multiplied: -1 * 4 falls behind -2.
    assert (
        sample(tensor([-1.0, -2.0]), parameters(**penalty, repetition_token_ids=[0], repetition_token_freqs=[1])) == 1
    )
    # Once per distinct id: 8 / 2 = 4 stays ahead of 3; twice would be 2.
    once = parameters(
        temperature=0.0, repetition_penalty=2.0, repetition_token_ids=[0, 0], repetition_token_freqs=[1, 1]
    )
    assert sample(tensor([8.0, 3.0]), once) == 0
    with pytest.raises(BackendError, match=r"\+inf at index 1"):
        sample(tensor([0.0, INF]), parameters())


@pytest.mark.clause("BK-TORCH-18")
def test_top_k_keeps_ties_and_top_p_stops_at_equality() -> None:
    scores = torch.tensor([1.0, 3.0, 3.0, 0.0], dtype=torch.float64)
    assert (kept_probabilities(scores, 1, 1.0) > 0).tolist() == [False, True, True, False]
    even = torch.zeros(4, dtype=torch.float64)
    assert (kept_probabilities(even, 0, 0.5) > 0).tolist() == [True, True, False, False]
    assert (kept_probabilities(even, 0, 0.51) > 0).tolist() == [True, True, True, False]
    assert (kept_probabilities(even, 9, 2.0) > 0).all()
    # temperature comes before top-p (D-34): [3,2,1,0] at 0.9 keeps 4 ids at T=2, 2 at T=0.5
    ladder = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    assert int((kept_probabilities(ladder / 2, 0, 0.9) > 0).sum()) == 4
    assert int((kept_probabilities(ladder / 0.5, 0, 0.9) > 0).sum()) == 2


@pytest.mark.clause("BK-TORCH-18")
def test_draws_follow_the_distribution(kernels: Any, tensor: Any) -> None:
    logits = np.array([1.0, 0.0, -INF, 2.0, 0.5])
    row, draws = tensor(logits), 4000
    seen = [kernels.sampling_ops().sample_token(row, parameters(temperature=0.8, rng_seed=s)) for s in range(draws)]
    counts = np.bincount(seen, minlength=5)
    p = np.exp(logits / 0.8)
    p /= p.sum()
    assert counts[2] == 0
    kept = p > 0
    assert stats.chisquare(counts[kept], draws * p[kept]).pvalue > 1e-4


@pytest.mark.clause("BK-TORCH-18")
@settings(max_examples=60)
@given(
    row=st.lists(st.sampled_from([-INF, -3.0, 0.0, 0.0, 1.0, 2.5, 2.5, 7.0]), min_size=1, max_size=12),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_k=st.integers(0, 5),
    top_p=st.sampled_from([0.2, 0.9, 1.0]),
    penalty=st.sampled_from([0.5, 1.0, 1.7]),
    seed=st.integers(0, 2**32 - 1),
)
def test_one_seed_gives_the_numpy_backends_token(
    row: list[float], temperature: float, top_k: int, top_p: float, penalty: float, seed: int
) -> None:
    from ferrum_torch.sampling import sample_token as in_torch

    from ferrum_ref.kernels.sampling import sample_token as in_numpy

    if max(row) == -INF:
        return
    settings_ = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": penalty}
    listed = {"repetition_token_ids": [0, len(row) - 1], "repetition_token_freqs": [1, 0], "rng_seed": seed}
    values = np.array(row, np.float32)
    assert in_torch(torch.from_numpy(values), parameters(**settings_, **listed)) == in_numpy(
        values, **settings_, **listed
    )


@pytest.mark.clause("BK-TORCH-18")
def test_the_seed_is_mixed_by_murmurs_finaliser() -> None:
    # fmix32 of MurmurHash3: 0 -> 0, 1 -> 0x514E28B7, 2**32 - 1 -> 0x81F16F39
    assert uniform_from_seed(0) == 0.0
    assert uniform_from_seed(1) == 0x514E28B7 / 2**32
    assert uniform_from_seed(2**32 - 1) == 0x81F16F39 / 2**32


@pytest.mark.clause("BK-TORCH-18")
def test_the_running_sum_must_exceed_the_drawn_point(kernels: Any, tensor: Any) -> None:
    half = 2126943072  # the seed that is mixed to 2**31
    assert uniform_from_seed(half) == 0.5
    assert kernels.sampling_ops().sample_token(tensor([0.0, 0.0]), parameters(rng_seed=half)) == 1
    assert kernels.sampling_ops().sample_token(tensor([-INF, 0.0]), parameters(rng_seed=0)) == 1


@pytest.mark.clause("BK-TORCH-18", "BK-TORCH-21")
@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": INF},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": math.nan},
        {"repetition_penalty": 0.0},
        {"rng_seed": -1},
        {"rng_seed": 2**32},
        {"repetition_token_ids": [3], "repetition_token_freqs": [1]},
        {"repetition_token_ids": [0], "repetition_token_freqs": []},
    ],
)
def test_parameters_outside_their_domain(kernels: Any, tensor: Any, bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameterError, match=f"(sample_token|SamplingParams).*{next(iter(bad))}"):
        kernels.sampling_ops().sample_token(tensor([1.0, 2.0]), parameters(**bad))
