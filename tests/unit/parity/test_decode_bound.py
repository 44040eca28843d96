"""The derived bound of a decoder: its derivatives, how errors meet, what it lets pass and what not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ferrum_ref.parity.bounds.propagated import Tape
from ferrum_ref.parity.error_model import SPREAD, ErrorModel
from ferrum_ref.parity.honest.decode import decode_step
from ferrum_ref.parity.ops.catalogue import operation_named
from ferrum_ref.parity.ops.decode import config_of
from ferrum_ref.parity.ops.decode_bound import DecodeBound
from ferrum_ref.parity.runner import draw_case
from ferrum_ref.parity.statistical import common_factor_ratio
from ferrum_ref.parity.units import STORAGES, confidence_factor
from ferrum_ref.parity.verdict import judge
from ferrum_ref.types.algorithm import Algorithm

Array = np.ndarray[Any, Any]
DECODE = operation_named("decode_step")
FP32 = STORAGES["fp32"]


@pytest.mark.clause("PA-DECODE-3")
def test_errors_meet_where_paths_meet() -> None:
    """y = 2 x, z = x - y = -x: an error of x reaches z by both paths and is counted once, with its sign."""
    tape = Tape()
    x = tape.add(np.array([3.0]), (), np.array([0.1]), np.array([0.1]))
    y = tape.add(np.array([6.0]), [(x, lambda slope: 2.0 * slope)], np.array([0.01]), np.array([0.01]))
    z = tape.add(np.array([-3.0]), [(x, lambda slope: slope), (y, lambda slope: -slope)])
    worst, spread = tape.errors([z])
    np.testing.assert_allclose(worst, [0.11])
    np.testing.assert_allclose(spread, [np.hypot(0.1, 0.01)])


@pytest.mark.clause("PA-DECODE-3")
@pytest.mark.parametrize("index", range(7))
def test_every_derivative_is_a_difference_quotient(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation's output is moved a little along a random direction; the logits must move as the tape says."""
    inputs = draw_case(DECODE, FP32, index, 0)
    config, start, tokens = config_of(inputs), inputs.settings["start"], inputs.settings["tokens"][:2]
    arrays = {name: inputs.exact(name) for name in inputs.arrays}

    def run(moved: int | None, direction: Array | None, step: float) -> tuple[list[Any], Array]:
        nodes: list[Any] = []
        add = Tape.add

        def spied(self: Tape, value: Array, sources: Any, *own: Any) -> Any:
            if moved == len(nodes) and direction is not None:
                value = value + step * direction
            nodes.append(add(self, value, sources, *own))
            return nodes[-1]

        with monkeypatch.context() as patch:
            patch.setattr(Tape, "add", spied)
            bound = DecodeBound(config, arrays, FP32, Algorithm())
            logits = [bound._step(int(token), start, place) for place, token in enumerate(tokens)]
        return nodes, np.concatenate([node.value for node in logits])

    nodes, _ = run(None, None, 0.0)
    rng = np.random.default_rng(index)
    for place in rng.choice(len(nodes), 12, replace=False).tolist():
        direction, step = rng.standard_normal(nodes[place].value.shape), 1e-6
        forwards, backwards = run(place, direction, step)[1], run(place, direction, -step)[1]
        quotient = (forwards - backwards) / (2 * step)
        slopes = _slopes(nodes, place, len(tokens))
        moved = slopes.reshape(len(slopes), -1) @ direction.reshape(-1)
        assert np.abs(moved - quotient).max() <= 1e-6 * max(np.abs(quotient).max(), 1.0), place


def _slopes(nodes: list[Any], place: int, num_steps: int) -> Array:
    """Derivatives of all logits by node `place`, (R, *shape), as they arrive there."""
    tape = Tape()
    tape._nodes = list(nodes)
    logits = [node for node in nodes if node.value.shape == nodes[-1].value.shape and not _feeds(nodes, node)]
    seen: dict[str, Array] = {}

    def keep(slope: Array) -> Array:
        seen["slope"] = slope
        return slope

    target = nodes[place]
    hook = type(target)(target.index, target.value, ((_Sink(), keep),), target.worst, target.spread)
    tape._nodes[place] = hook
    tape.errors(logits[-num_steps:])
    return seen.get("slope", np.zeros((sum(one.value.size for one in logits[-num_steps:]), *target.value.shape)))


class _Sink:
    index = -1


def _feeds(nodes: list[Any], node: Any) -> bool:
    return any(source.index == node.index for other in nodes for source, _ in other.sources)


@pytest.mark.clause("PA-DECODE-2", "PA-DECODE-3")
@pytest.mark.parametrize("dtype", list(STORAGES))
def test_an_error_of_one_operation_is_seen(dtype: str) -> None:
    """Honest runs lie within; logits off by the bound and a half at one place do not."""
    inputs = draw_case(DECODE, STORAGES[dtype], 0, 0)
    (expected,) = DECODE.expect(inputs, Algorithm())
    (honest,) = decode_step("plain")(inputs)
    assert expected.prob is not None
    assert expected.det is not None
    assert (expected.prob <= expected.det).all()
    error = np.abs(honest.astype(np.float64) - expected.value)
    assert (error <= expected.prob).all()
    assert (error / expected.prob).max() > 0.02


@pytest.mark.clause("PA-TIER-5")
def test_errors_of_a_weighted_sum() -> None:
    """y = (a + e1, a + e2) of one a: its error does not average out in the mean of both, theirs does."""
    tape = Tape()
    a = tape.add(np.array([1.0]), (), np.array([0.3]), np.array([0.3]))
    y = tape.add(
        np.array([1.0, 1.0]), [(a, lambda slope: slope.sum(-1, keepdims=True))], np.full(2, 0.4), np.full(2, 0.4)
    )
    worst, spread = tape.errors([y], np.array([0.5, 0.5]))
    np.testing.assert_allclose(worst, [0.7, 0.7, 0.7])
    np.testing.assert_allclose(spread, [0.5, 0.5, np.hypot(0.3, 0.4 / np.sqrt(2))])


@pytest.mark.clause("PA-TIER-5")
def test_a_factor_that_all_logits_share_is_seen() -> None:
    """bf16 logits that are 1 % too large lie within every bound of their own."""
    inputs = draw_case(DECODE, STORAGES["bf16"], 3, 0)
    (expected,) = DECODE.expect(inputs, Algorithm())
    (honest,) = decode_step("plain")(inputs)
    assert judge(expected, honest).passed
    larger = judge(expected, (expected.value * 1.01).astype(expected.dtype))
    assert larger.ratio_prob is not None
    assert larger.ratio_prob < 0.5
    assert larger.ratio_statistical is not None
    assert larger.ratio_statistical > 1.0
    assert larger.fault.startswith("a factor that all elements share")
    assert expected.factor is not None
    moved = expected.value + 0.999 * expected.factor * expected.value
    assert common_factor_ratio(expected.value, moved, expected.factor) == pytest.approx(0.999)
    assert common_factor_ratio(expected.value, np.full_like(moved, np.nan), expected.factor) == np.inf
    assert common_factor_ratio(expected.value, moved, 0.0) == np.inf
    assert common_factor_ratio(expected.value, expected.value, 0.0) == 0.0


@pytest.mark.clause("PA-DECODE-3")
def test_the_spread_of_an_operation() -> None:
    """sqrt(n) u for gamma_n, lambda 1: the confidence enters once, at the end."""
    model = ErrorModel(Algorithm(), FP32, SPREAD)
    np.testing.assert_allclose(model.gamma(16), 4.0 * 2.0**-24)
    assert model.confidence(1000) == 1.0
    assert confidence_factor(1, 388) == pytest.approx(np.sqrt(2 * np.log(2 * 388 / 1e-9)))
