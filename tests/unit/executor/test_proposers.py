"""Drafts: from a text's own past and from a smaller model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.executor.proposers import DraftModelProposer, NgramProposer, Speculated, common_prefix
from ferrum_ref.types.parity_mode import ParityMode


def text(tokens: list[int], key: int = 1, seed: int = 0) -> Speculated:
    return Speculated(key, list(tokens), len(tokens), np.random.default_rng(seed))


@pytest.mark.clause("MX-PROPOSE-1", "MX-PROPOSE-2")
@pytest.mark.parametrize(
    ("tokens", "limit", "expected"),
    [
        ([5, 6, 7, 8, 5, 6], 4, [7, 8, 5, 6]),
        ([5, 6, 7, 8, 5, 6], 2, [7, 8]),
        ([1, 2, 9, 1, 2, 8, 1, 2], 2, [8, 1]),  # the latest occurrence
        ([1, 2, 9, 3, 2, 8, 1, 2], 1, [9]),  # the longer n-gram beats the later one
        ([4, 4, 4, 4], 2, [4]),  # none is followed by enough: the one followed by most
        ([4, 4, 4, 4, 4], 1, [4]),
        ([1, 2, 3], 3, []),
        ([1], 3, []),
        ([7, 7], 3, [7]),
    ],
)
def test_prompt_lookup(tokens: list[int], limit: int, expected: list[int]) -> None:
    assert NgramProposer(3).lookup(tokens, limit) == expected
    (proposal,) = NgramProposer(3).propose([text(tokens)], [limit])
    assert list(proposal.tokens) == expected
    assert proposal.probabilities is None


@pytest.mark.clause("MX-PROPOSE-1", "MX-PROPOSE-2")
@given(st.lists(st.integers(0, 2), max_size=14), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2))
def test_prompt_lookup_against_its_definition(tokens: list[int], limit: int, low: int, more: int) -> None:
    expected: list[int] = []
    for size in range(low + more, low - 1, -1):
        ends = [e for e in range(size, len(tokens)) if tokens[e - size : e] == tokens[len(tokens) - size :]]
        if ends:
            begin = max(ends, key=lambda e: (min(limit, len(tokens) - e), e))
            expected = tokens[begin : begin + limit]
            break
    assert NgramProposer(low + more, low).lookup(tokens, limit) == expected


@pytest.mark.clause("MX-PROPOSE-2")
def test_lengths_that_mean_nothing() -> None:
    for longest, shortest in ((0, 0), (2, 3), (3, 0)):
        with pytest.raises(InvalidParameterError, match="min_ngram"):
            NgramProposer(longest, shortest)
    assert NgramProposer().propose([text([1, 1, 1])], [0])[0].tokens == ()


def greedy(judge7: Any, tokens: list[int], num: int) -> list[int]:
    out: list[int] = []
    for _ in range(num):
        out.append(int(judge7.exact(tuple(tokens + out))[-1].argmax()))
    return out


@pytest.mark.clause("MX-PROPOSE-1", "MX-PROPOSE-3", "MX-PROPOSE-4")
def test_a_draft_model_writes_on_from_what_was_accepted(judge7: Any) -> None:
    executor, manager = judge7.loaded.new_executor(60, 4)
    proposer = DraftModelProposer(executor)
    first, second = text(judge7.ids[:7], 1), text(judge7.ids[20:21], 2)
    proposals = proposer.propose([first, second], [4, 2])
    assert list(proposals[0].tokens) == greedy(judge7, first.tokens, 4)
    assert list(proposals[1].tokens) == greedy(judge7, second.tokens, 2)
    assert all(proposal.probabilities is None for proposal in proposals)
    # one accepted and replaced, all accepted and a bonus, then something else altogether
    first.tokens += [proposals[0].tokens[0], (proposals[0].tokens[1] + 1) % 97]
    second.tokens += [*proposals[1].tokens, 50]
    again = proposer.propose([first, second], [3, 3])
    assert [list(p.tokens) for p in again] == [greedy(judge7, t.tokens, 3) for t in (first, second)]
    other = text(judge7.ids[40:45], 1)
    assert list(proposer.propose([other], [2])[0].tokens) == greedy(judge7, other.tokens, 2)
    assert proposer.propose([other, second], [0, 0]) == [proposer.propose([other], [0])[0]] * 2
    proposer.forget(1)
    proposer.forget(2)
    proposer.forget(3)
    assert manager.stats().free_blocks == 60


@pytest.mark.clause("MX-PROPOSE-3", "MX-PROPOSE-5")
def test_what_is_drawn_is_told(judge7: Any) -> None:
    tokens = judge7.ids[:5]
    for mode in ParityMode:
        proposer = DraftModelProposer(judge7.loaded.new_executor(60, 4)[0], 2.0, parity_mode=mode)
        (proposal,) = proposer.propose([text(tokens, seed=4)], [3])
        assert proposal.probabilities is not None
        assert proposal.probabilities.shape == (3, 97)
        uniforms = np.random.default_rng(4)
        for at, token in enumerate(proposal.tokens):
            logits = judge7.exact(tuple(tokens + list(proposal.tokens[:at])))[-1] / 2.0
            law = np.exp(logits - logits.max())
            law /= law.sum()
            np.testing.assert_allclose(proposal.probabilities[at], law, rtol=1e-4)
            drawn = int((law.cumsum() > uniforms.random()).argmax())
            assert token == (law.argmax() if mode is ParityMode.UPSTREAM else drawn)
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidParameterError, match="temperature"):
            DraftModelProposer(judge7.loaded.new_executor(4, 4)[0], temperature)


@pytest.mark.clause("MX-PROPOSE-4")
def test_the_draft_models_context_ends(judge7: Any) -> None:
    """A context of 10: after 9 tokens two can still be drafted, after 10 one, after 11 none."""
    proposer = DraftModelProposer(judge7.loaded.shortened(10).new_executor(60, 4)[0])
    texts = [text(judge7.ids[:n], n) for n in (9, 10, 11, 30)]
    assert [len(p.tokens) for p in proposer.propose(texts, [4] * 4)] == [2, 1, 0, 0]


@pytest.mark.clause("MX-PROPOSE-4")
@given(st.lists(st.integers(0, 1), max_size=6), st.lists(st.integers(0, 1), max_size=6))
def test_common_prefix(first: list[int], second: list[int]) -> None:
    n = common_prefix(first, second)
    assert first[:n] == second[:n]
    assert n == min(len(first), len(second)) or first[n] != second[n]
