"""The mathematics of judging drafts: closed forms over every u, and chi-square tests of what comes out.

The significance is 1e-6 throughout: a right rule fails one run in a million seeds, and the seeds are fixed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ferrum_ref.errors import BackendError, InvalidParameterError, ModelError, ShapeError
from ferrum_ref.executor.speculation import (
    acceptance_probability,
    greedy_prefix,
    judge_drafts,
    pick,
    residual_distribution,
    token_distribution,
    typical_prefix,
)
from ferrum_ref.interfaces.model_executor import Proposal
from ferrum_ref.types.parity_mode import ParityMode

SIGNIFICANCE = 1e-6
NUM_TEXTS = 10_000


def chi_square(counts: Any, probabilities: Any) -> float:
    """p-value; cells too small to count on are put together."""
    expected = counts.sum() * probabilities.ravel()
    small = expected < 5
    observed = np.append(counts.ravel()[~small], counts.ravel()[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    keep = expected > 0
    return float(stats.chisquare(observed[keep], expected[keep] * observed.sum() / expected[keep].sum()).pvalue)


distributions = st.integers(2, 6).flatmap(
    lambda width: st.tuples(*[st.lists(st.integers(0, 9), min_size=width, max_size=width).filter(any)] * 2)
)


@pytest.mark.clause("MX-SPEC-3", "MX-SPEC-4")
@given(distributions)
def test_accepted_and_replaced_together_are_the_target(pair: tuple[list[int], list[int]]) -> None:
    """sum over drafts: P(x comes out) = q(x) a(x) + sum_d q(d) (1 - a(d)) r_d(x) = p(x), exactly."""
    p, q = (np.array(part, dtype=float) / sum(part) for part in pair)
    out = np.zeros_like(p)
    for draft in np.flatnonzero(q):
        at = np.array(draft)
        accept = float(acceptance_probability(p, at, q))
        out[draft] += q[draft] * accept
        out += q[draft] * (1 - accept) * residual_distribution(p, at, q)
    np.testing.assert_allclose(out, p, rtol=0, atol=1e-12)
    for draft in range(len(p)):  # a point mass on any draft
        at = np.array(draft)
        accept = float(acceptance_probability(p, at, None))
        out = (1 - accept) * residual_distribution(p, at, None)
        out[draft] += accept
        np.testing.assert_allclose(out, p, rtol=0, atol=1e-12)


@pytest.mark.clause("MX-SPEC-3", "MX-SPEC-4")
def test_the_example_of_the_clause() -> None:
    """p = (1/2, 1/2); the draft model says (0.6, 0.4) and takes token 0. All u on a grid of 1/600."""
    u = (np.arange(600) + 0.5) / 600
    target = np.full((600, 2, 2), 0.5)
    drafts = np.zeros((600, 1), dtype=int)
    for draft, right in ((None, 1 / 2), (np.tile([0.6, 0.4], (600, 1, 1)), 5 / 6)):
        verdict = judge_drafts(target, drafts, draft, np.stack([u, np.full(600, 0.5)], axis=1))
        assert verdict.num_accepted.mean() == pytest.approx(right)
        assert (verdict.next_token[verdict.num_accepted == 0] == 1).all()


@pytest.mark.clause("MX-SPEC-7")
def test_what_has_no_probability_is_never_drawn() -> None:
    law = np.array([0.0, 1.0])
    assert pick(law, np.array(0.0)) == 1
    assert pick(law, np.array(0.0), ParityMode.UPSTREAM) == 0  # u <= cdf (D-24)
    assert pick(np.array([0.25, 0.0, 0.75, 0.0]), np.array(0.25)) == 2
    assert pick(np.array([0.25, 0.0, 0.75, 0.0]), np.array(np.nextafter(1.0, 0.0))) == 2
    grid = (np.arange(1000) + 0.5) / 1000
    found = pick(np.tile([0.1, 0.2, 0.3, 0.4], (1000, 1)), grid)
    assert np.bincount(found).tolist() == [100, 200, 300, 400]


@pytest.mark.clause("MX-SPEC-7")
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30).filter(any), st.floats(0, 1, exclude_max=True))
def test_a_draw_always_has_probability(law: list[float], u: float) -> None:
    assert law[int(pick(np.array(law), np.array(u)))] > 0


def chains(rng: Any, vocab: int) -> tuple[Any, Any]:
    """A target and a draft model that depend on the token before: Markov chains, [V, V] each."""
    target = token_distribution(2.0 * rng.standard_normal((vocab, vocab)), 1.0)
    draft = token_distribution(2.0 * rng.standard_normal((vocab, vocab)), 1.0)
    return target, draft


def speculate(target: Any, draft: Any, rng: Any, num: int, width: int, rule: str) -> Any:
    """`num` texts after token 0: their first two tokens, the second drawn plainly where a round gave only one."""
    drafts, told = np.zeros((num, width), int), np.zeros((num, width, len(target)))
    last = np.zeros(num, int)
    for at in range(width):
        told[:, at] = draft[last]
        argmax = draft[last].argmax(axis=1)
        last = pick(draft[last], rng.random(num)) if rule == "drawn" else argmax
        drafts[:, at] = last
    context = np.concatenate([np.zeros((num, 1), int), drafts], axis=1)
    given = None if rule == "point masses" else told
    verdict = judge_drafts(target[context], drafts, given, rng.random((num, width + 1)))
    out = np.full((num, width + 1), -1)
    for text in range(num):
        n = verdict.num_accepted[text]
        out[text, :n] = drafts[text, :n]
        out[text, n] = verdict.next_token[text]
    missing = out[:, 1] < 0
    out[missing, 1] = pick(target[out[missing, 0]], rng.random(int(missing.sum())))
    return out[:, :2]


@pytest.mark.clause("MX-SPEC-3", "MX-SPEC-4")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("width", [1, 3])
def test_pairs_of_tokens_come_out_as_the_target_says(seed: int, width: int) -> None:
    """10,000 texts; the joint distribution of the first two tokens, 64 cells."""
    rng = np.random.default_rng(seed)
    target, draft = chains(rng, 8)
    joint = target[0][:, None] * target
    for rule in ("drawn", "point masses"):
        found = speculate(target, draft, rng, NUM_TEXTS, width, rule)
        counts = np.zeros((8, 8))
        np.add.at(counts, (found[:, 0], found[:, 1]), 1)
        assert chi_square(counts, joint) > SIGNIFICANCE
    wrong = speculate(target, draft, rng, NUM_TEXTS, width, "argmax told as drawn")  # upstream's rule (D-24)
    counts = np.zeros((8, 8))
    np.add.at(counts, (wrong[:, 0], wrong[:, 1]), 1)
    assert chi_square(counts, joint) < SIGNIFICANCE


def always_accept(target: Any, drafts: Any, draft: Any, uniforms: Any) -> Any:
    return drafts[:, 0]


def redraw_from_target(target: Any, drafts: Any, draft: Any, uniforms: Any) -> Any:
    accepted = uniforms[:, 0] < acceptance_probability(target[:, 0], drafts[:, 0], draft[:, 0])
    return np.where(accepted, drafts[:, 0], pick(target[:, 0], uniforms[:, 1]))


def inverted_ratio(target: Any, drafts: Any, draft: Any, uniforms: Any) -> Any:
    rows = np.arange(len(drafts))
    ratio = draft[rows, 0, drafts[:, 0]] / target[rows, 0, drafts[:, 0]]
    residual = residual_distribution(target[:, 0], drafts[:, 0], draft[:, 0])
    return np.where(uniforms[:, 0] < ratio, drafts[:, 0], pick(residual, uniforms[:, 1]))


@pytest.mark.clause("MX-SPEC-4")
@pytest.mark.parametrize("wrong", [always_accept, redraw_from_target, inverted_ratio])
def test_the_test_tells_wrong_rules(wrong: Any) -> None:
    rng = np.random.default_rng(11)
    p, q = (token_distribution(rng.standard_normal(8), 1.0) for _ in range(2))
    drafts = pick(np.tile(q, (NUM_TEXTS, 1)), rng.random(NUM_TEXTS))[:, None]
    target, draft = np.tile(p, (NUM_TEXTS, 2, 1)), np.tile(q, (NUM_TEXTS, 1, 1))
    uniforms = rng.random((NUM_TEXTS, 2))
    verdict = judge_drafts(target, drafts, draft, uniforms)
    right = np.where(verdict.num_accepted == 1, drafts[:, 0], verdict.next_token)
    assert chi_square(np.bincount(right, minlength=8), p) > SIGNIFICANCE
    assert chi_square(np.bincount(wrong(target, drafts, draft, uniforms), minlength=8), p) < SIGNIFICANCE


@pytest.mark.clause("MX-SPEC-4")
def test_the_bonus_token_follows_full_acceptance_and_drafts_stop_at_the_first_rejection() -> None:
    target = np.tile(np.eye(4)[[2, 1, 3]], (1, 1, 1))  # wants 2, 1, 3 for certain
    u = np.zeros((1, 3))
    for drafts, accepted, token in (([2, 1], 2, 3), ([2, 0], 1, 1), ([0, 1], 0, 2)):
        verdict = judge_drafts(target, np.array([drafts]), None, u)
        assert (int(verdict.num_accepted[0]), int(verdict.next_token[0])) == (accepted, token)
    nothing = judge_drafts(target[:, :1], np.zeros((1, 0), int), None, u[:, :1])
    assert (int(nothing.num_accepted[0]), int(nothing.next_token[0])) == (0, 2)


@pytest.mark.clause("MX-SPEC-1")
@given(st.data())
def test_the_greedy_prefix(data: st.DataObject) -> None:
    logits = np.random.default_rng(data.draw(st.integers(0, 999))).standard_normal((5, 3))
    drafts = data.draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))
    expected = 0
    while expected < 4 and drafts[expected] == max(range(3), key=lambda i: logits[expected, i]):
        expected += 1
    assert greedy_prefix(logits, np.array(drafts)) == expected


@pytest.mark.clause("MX-SPEC-2")
def test_typical_acceptance_asks_for_a_probability() -> None:
    target = np.array([[0.6, 0.4], [0.1, 0.9], [0.5, 0.5]])
    for threshold, drafts, accepted in ((0.4, [1, 1], 2), (0.5, [1, 1], 0), (0.5, [0, 0], 1), (0.9, [0, 1], 0)):
        assert typical_prefix(target, np.array(drafts), threshold) == accepted


@pytest.mark.clause("MX-SPEC-3", "MX-SPEC-5")
def test_the_distribution_of_logits() -> None:
    logits = np.array([[1.0, 2.0, -np.inf], [0.0, 0.0, 5.0]], dtype=np.float32)
    for temperature in (0.5, 1.0, 3.0):
        scaled = logits.astype(float) / temperature
        right = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(token_distribution(logits, temperature), right, rtol=1e-14)
    assert token_distribution(logits, 0.0).tolist() == [[0, 1, 0], [0, 0, 1]]
    assert token_distribution(np.array([3.0, 3.0]), 0.0).tolist() == [1, 0]  # the first of equals
    for row in ([np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf]):
        with pytest.raises(BackendError, match="logits"):
            token_distribution(np.array([row]), 1.0)
    for row in ([np.nan, 1.0], [-np.inf, -np.inf]):
        with pytest.raises(BackendError, match="logits"):
            greedy_prefix(np.array([row]), np.array([], dtype=int))
    for temperature in (-1.0, np.nan, np.inf):
        with pytest.raises(InvalidParameterError, match="temperature"):
            token_distribution(logits, temperature)


@pytest.mark.clause("MX-SPEC-5")
def test_proposals_that_cannot_be() -> None:
    law = np.array([[0.5, 0.5, 0.0]])
    Proposal([1], law)
    Proposal([1])
    for tokens, rows in (([2], law), ([3], law), ([-1], law), ([1, 1], law), ([1], law[0]), ([0], law * np.nan)):
        with pytest.raises(ModelError, match="Proposal"):
            Proposal(tokens, rows)
    good = np.full((2, 3, 4), 0.25), np.zeros((2, 2), int), np.full((2, 2, 4), 0.25), np.zeros((2, 3))
    judge_drafts(*good)
    for index, bad in ((0, good[0][:, :2]), (2, good[2][:, :1]), (2, good[2][..., :3]), (3, good[3][:, :2])):
        broken: list[Any] = [*good]
        broken[index] = bad
        with pytest.raises(ShapeError, match="judge_drafts"):
            judge_drafts(*broken)
