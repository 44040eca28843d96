"""A request's pipeline as a distribution: penalties see the tokens before each row, drafts included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ferrum_ref.executor.token_law import TokenLaw
from ferrum_ref.types.sampling import SamplingParams

PROMPT = [1, 2]
GENERATED = [3, 3, 0]


def softmax(x: Any) -> Any:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


@pytest.fixture
def logits() -> Any:
    return np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)


@pytest.mark.clause("MX-SPEC-8")
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_temperature_alone_needs_no_history(logits: Any, temperature: float) -> None:
    law = TokenLaw(SamplingParams(temperature=temperature))
    assert law.is_plain
    for row, found in zip(logits, law.rows(logits, (), ()), strict=True):
        right = softmax(row.astype(float) / temperature) if temperature else np.eye(6)[row.argmax()]
        np.testing.assert_allclose(found, right, rtol=1e-12, atol=0)


@pytest.mark.clause("MX-SPEC-8")
def test_each_row_has_its_own_history(logits: Any) -> None:
    """Row 0 is judged after 3; row 1 after 3 3; row 2 after 3 3 0."""
    before = logits.copy()
    penalised = TokenLaw(SamplingParams(temperature=1.0, repetition_penalty=2.0)).rows(logits, PROMPT, GENERATED)
    counted = TokenLaw(SamplingParams(temperature=1.0, frequency_penalty=0.5, presence_penalty=0.25))
    assert not counted.is_plain
    frequent = counted.rows(logits, PROMPT, GENERATED)
    for index, row in enumerate(logits.astype(float)):
        behind = GENERATED[: index + 1]
        halved = row.copy()
        for token in {*PROMPT, *behind}:
            halved[token] = row[token] / 2 if row[token] > 0 else row[token] * 2
        np.testing.assert_allclose(penalised[index], softmax(halved), rtol=1e-6)
        lowered = row.copy()
        for token in set(behind):
            lowered[token] -= 0.25 + 0.5 * behind.count(token)
        np.testing.assert_allclose(frequent[index], softmax(lowered), rtol=1e-6)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.clause("MX-SPEC-8")
def test_filters_leave_no_probability_behind(logits: Any) -> None:
    two = TokenLaw(SamplingParams(temperature=0.7, top_k=2)).rows(logits, PROMPT, GENERATED)
    assert ((two > 0).sum(axis=1) == 2).all()
    for row, found in zip(logits.astype(float), two, strict=True):
        best = np.argsort(-row)[:2]
        np.testing.assert_allclose(found[best], softmax(row[best] / 0.7), rtol=1e-6)
    cold = TokenLaw(SamplingParams(temperature=0.0, repetition_penalty=100.0)).rows(logits, PROMPT, GENERATED)
    assert (cold.max(axis=1) == 1).all()
