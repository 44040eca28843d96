"""The tokens of one request: random source, penalties over its history, failure without a trace."""

from __future__ import annotations

import numpy as np
import pytest

from ferrum_ref.errors import BackendError
from ferrum_ref.sampling import RequestRandom, RequestSampler
from ferrum_ref.types.sampling import SamplingParams

FLAT = np.zeros(50, dtype=np.float32)


@pytest.mark.clause("SA-RNG-1")
def test_draws_are_the_upper_halves_of_pcg64() -> None:
    random = RequestRandom(42)
    raw = np.random.PCG64(42).random_raw(5)
    assert [random.next_u32() for _ in range(4)] == [int(x) >> 32 for x in raw[:4]]
    assert random.next_u64() == int(raw[4])
    assert RequestRandom(42).next_u32() == int(0.7739560485559633 * 2**32)  # default_rng(42).random() of numpy's manual


@pytest.mark.clause("SA-RNG-2")
def test_unseeded_requests_differ() -> None:
    draws = {tuple(RequestRandom().next_u32() for _ in range(4)) for _ in range(4)}
    assert len(draws) == 4


def tokens(params: SamplingParams, num_tokens: int = 20, prompt: tuple[int, ...] = ()) -> list[int]:
    sampler = RequestSampler(params, prompt)
    return [sampler.next_token(FLAT) for _ in range(num_tokens)]


@pytest.mark.clause("SA-RNG-1", "SA-REQUEST-1")
def test_one_draw_a_token() -> None:
    raw = np.random.PCG64(7).random_raw(20)
    assert tokens(SamplingParams(seed=7)) == [(int(x) >> 32) * 50 // 2**32 for x in raw]
    assert tokens(SamplingParams(seed=7)) != tokens(SamplingParams(seed=8))


@pytest.mark.clause("SA-REQUEST-1")
def test_logits_stay_and_greedy_choice_draws_nothing() -> None:
    logits = np.arange(9, dtype=np.float32)
    sampler = RequestSampler(SamplingParams(temperature=0.0, repetition_penalty=3.0, seed=1), [8])
    before = sampler.random.state()
    assert sampler.next_token(logits) == 7
    assert logits.tolist() == list(range(9))
    assert sampler.random.state() == before


@pytest.mark.clause("SA-REQUEST-2", "SA-CONTEXT-2")
def test_whose_tokens_the_penalties_see() -> None:
    logits = np.array([5, 4.5, 4, 0], dtype=np.float32)
    repetition = RequestSampler(SamplingParams(temperature=0.0, repetition_penalty=2.0), [0, 0])
    assert [repetition.next_token(logits) for _ in range(3)] == [1, 2, 0]
    presence = RequestSampler(SamplingParams(temperature=0.0, presence_penalty=2.0), [0, 0])
    assert [presence.next_token(logits) for _ in range(4)] == [0, 1, 2, 0]
    frequency = RequestSampler(SamplingParams(temperature=0.0, frequency_penalty=0.3), [1, 1])
    # 5 - .3n against 4.5 - .3m: 0 leads until it was chosen twice, then they alternate
    assert [frequency.next_token(logits) for _ in range(5)] == [0, 0, 1, 0, 1]


@pytest.mark.clause("SA-REQUEST-3")
def test_a_failed_choice_changes_nothing() -> None:
    params = SamplingParams(seed=3, repetition_penalty=1.2, frequency_penalty=0.5)
    undisturbed, disturbed = RequestSampler(params, [1]), RequestSampler(params, [1])
    expected = [undisturbed.next_token(FLAT) for _ in range(10)]
    got = []
    for _ in range(10):
        with pytest.raises(BackendError, match="NaN"):
            disturbed.next_token(np.full(50, np.nan, dtype=np.float32))
        got.append(disturbed.next_token(FLAT))
    assert got == expected
