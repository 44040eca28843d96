"""Several draws without replacement."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from ferrum_ref.errors import BackendError, InvalidParameterError
from ferrum_ref.sampling import RequestRandom, WithoutReplacementSampler

SAMPLER = WithoutReplacementSampler()
WEIGHTS = np.array([0.5, 0.3, 0.2])


@pytest.mark.clause("SA-MULTI-1")
def test_ordered_pairs_have_the_probabilities_of_drawing_without_replacement() -> None:
    random, logits = RequestRandom(5), np.log(WEIGHTS)
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    expected = [WEIGHTS[a] * WEIGHTS[b] / (1 - WEIGHTS[a]) for a, b in pairs]
    drawn = [tuple(SAMPLER.sample_multiple(logits, 2, random)) for _ in range(6000)]
    observed = [drawn.count(pair) for pair in pairs]
    assert scipy.stats.chisquare(observed, 6000 * np.array(expected)).pvalue > 1e-4


@pytest.mark.clause("SA-MULTI-1")
def test_as_many_as_there_are() -> None:
    logits = np.array([0, -np.inf, 1], dtype=np.float32)
    assert sorted(SAMPLER.sample_multiple(logits, 2, RequestRandom(1))) == [0, 2]
    assert logits[0] == 0
    with pytest.raises(BackendError):
        SAMPLER.sample_multiple(logits, 3, RequestRandom(1))
    with pytest.raises(InvalidParameterError):
        SAMPLER.sample_multiple(logits, 0, RequestRandom(1))


@pytest.mark.clause("SA-MULTI-2")
def test_probabilities_sum_to_one_over_what_is_not_masked() -> None:
    logits = np.array([3, -np.inf, 1, 2], dtype=np.float32)
    token, probabilities = SAMPLER.sample_with_probabilities(logits, RequestRandom(2))
    assert token in (0, 2, 3)
    assert probabilities[1] == 0
    assert probabilities.sum() == pytest.approx(1.0, abs=4e-16)
    np.testing.assert_allclose(probabilities, scipy.special.softmax(logits.astype(np.float64)), rtol=1e-15)
