"""The prob and the statistical tier: what they promise, and what they see that det does not."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.parity.error_model import DET, PROB, SHARP, ErrorModel
from ferrum_ref.parity.ops.catalogue import OPERATIONS, operation_named
from ferrum_ref.parity.ops.operation import bounded, case
from ferrum_ref.parity.runner import FAILED, PASSED, draw_case, run_case
from ferrum_ref.parity.statistical import reach_of, statistical_ratio
from ferrum_ref.parity.subject import FunctionSubject
from ferrum_ref.parity.units import STORAGES, gamma, gamma_probabilistic
from ferrum_ref.parity.verdict import judge
from ferrum_ref.types.algorithm import Algorithm

BF16, FP32 = STORAGES["bf16"], STORAGES["fp32"]
MODEL = ErrorModel(Algorithm(), BF16)


@pytest.mark.clause("PA-TIER-3")
def test_prob_is_gamma_tilde_for_gamma_and_nothing_else() -> None:
    prob = ErrorModel(Algorithm(), FP32).probable(1000)
    assert (prob.tier, prob.sharp) == (PROB, False)
    assert float(prob.gamma(4096)) == float(gamma_probabilistic(4096, 2.0**-24, 1000)) < float(gamma(4096, 2.0**-24))
    assert prob.tau(3.0) == ErrorModel(Algorithm(), FP32).tau(3.0)


@pytest.mark.clause("PA-TIER-1", "PA-TIER-2", "PA-TIER-3")
def test_each_case_gets_the_tiers_that_its_data_allow_and_none_exceeds_det() -> None:
    assert case("iid").tiers == (DET, PROB, SHARP)
    assert case("strided").tiers == (DET, PROB)
    assert case("needle").tiers == (DET,)
    for name in ("rms_norm", "linear", "attention", "softmax", "quantized_linear_q4_0"):
        operation = operation_named(name)
        inputs = draw_case(operation, FP32, 0, 0)
        for expected in operation.expect(inputs, Algorithm()):
            assert expected.det is not None
            assert expected.prob is not None
            assert expected.sharp is not None
            assert np.all(expected.prob <= expected.det)
            assert np.all(expected.sharp <= expected.det)


@pytest.mark.clause("PA-TIER-4")
@given(st.integers(0, 2**31), st.floats(0.0, 2.0**-12), st.sampled_from(["fp16", "bf16"]))
def test_whatever_is_rounded_once_within_its_error_stays_below_the_ceiling(
    seed: int, relative: float, name: str
) -> None:
    """The unrounded result anywhere in [y - e, y + e], the worst ends included: the ratio is at most 1."""
    rng, storage = np.random.default_rng(seed), STORAGES[name]
    y = rng.standard_normal(64) * 2.0 ** rng.integers(-4, 5, 64)
    e = relative * np.abs(y)
    reach = reach_of(ErrorModel(Algorithm(), storage), y, e)
    assert reach is not None
    for place in (rng.uniform(-1.0, 1.0, 64), np.ones(64), -np.ones(64), rng.choice([-1.0, 1.0], 64)):
        got = storage.round(y + place * e).astype(np.float64)
        assert statistical_ratio(storage, y, got, reach) <= 1.0


@pytest.mark.clause("PA-TIER-4")
def test_one_undeclared_rounding_shows_together_where_no_element_breaks_its_bound() -> None:
    """A factor rounded to storage before the last product: every element within det, all of them beyond statistical."""
    rng = np.random.default_rng(1)
    a, b = (BF16.round(rng.uniform(1.0, 2.0, 400)).astype(np.float64) for _ in range(2))
    value = a * b * 1.1
    error = np.full(400, 3.0 * 2.0**-24) * value
    expected = bounded("y", value, ("i",), [MODEL], [error])
    honest = BF16.round((a * b * 1.1).astype(np.float32))
    assert judge(expected, honest).passed
    rounded_twice = BF16.round(BF16.round(a * b).astype(np.float64) * 1.1)
    loose = bounded("y", value, ("i",), [MODEL], [np.full(400, 2.0**-8) * value])
    verdict = judge(expected, rounded_twice)
    assert not verdict.passed
    assert verdict.ratio_statistical is not None
    assert 1.3 < verdict.ratio_statistical < 1.6
    assert judge(loose, rounded_twice).passed  # once declared, it is right


@pytest.mark.clause("PA-TIER-4")
def test_where_the_statistical_tier_does_not_apply() -> None:
    y = np.linspace(1.0, 2.0, 64)
    assert reach_of(ErrorModel(Algorithm(), FP32), y, 0 * y) is None  # storing is no coarser than computing
    assert reach_of(ErrorModel(Algorithm(accumulate="fp64"), FP32), y, 0 * y) is not None
    assert reach_of(MODEL, y[:15], 0 * y[:15]) is None
    assert reach_of(ErrorModel(Algorithm(flushes_subnormals=True), BF16), y, 0 * y) is None
    tiny = np.full(64, BF16.smallest_normal / 4)
    assert reach_of(MODEL, tiny, 0 * tiny) is None
    reach = reach_of(MODEL, y, 0 * y)
    assert reach is not None
    assert statistical_ratio(BF16, y, np.full(64, np.nan), reach) == np.inf
    exact = BF16.round(y).astype(np.float64)
    nothing = reach_of(MODEL, exact, 0 * exact)
    assert nothing is not None
    assert statistical_ratio(BF16, exact, exact, nothing) == 0.0
    assert statistical_ratio(BF16, exact, exact + 1, nothing) == np.inf


@pytest.mark.clause("PA-TIER-4", "PA-UNIT-1")
def test_storing_rounds_float64_once() -> None:
    """Through float32 these values would be rounded twice, to the wrong neighbour."""
    value = np.array([1.0 + 2.0**-8 + 2.0**-40, 1.0 + 3 * 2.0**-8 - 2.0**-40])
    assert BF16.round(value).astype(np.float64).tolist() == [1.0 + 2.0**-7, 1.0 + 2.0**-7]
    assert value.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)[0] == 1.0


@pytest.mark.clause("PA-CASE-4")
@given(
    st.integers(0, 2**31), st.sampled_from([one.name for one in OPERATIONS if "drawn" in {c.probe for c in one.cases}])
)
def test_any_drawn_shape_is_judged_and_an_honest_kernel_passes_it(seed: int, name: str) -> None:
    from ferrum_ref.parity.honest.catalogue import HONEST

    operation = operation_named(name)
    index = next(index for index, one in enumerate(operation.cases) if one.probe == "drawn")
    storage = list(STORAGES.values())[seed % 3]
    inputs = draw_case(operation, storage, index, seed)
    assert inputs.case.probe == "iid"
    assert inputs.case.label == draw_case(operation, storage, index, seed).case.label
    one = next(one for one in HONEST if one.operation == name)
    subject = FunctionSubject("honest", {name: one.run}, {name: one.algorithm})
    result = run_case(subject, operation, storage, index, seed)
    assert result.status == PASSED, result
    assert result.label == inputs.case.label


@pytest.mark.clause("PA-CASE-4")
def test_the_shapes_differ_from_seed_to_seed() -> None:
    operation = operation_named("linear")
    index = next(index for index, one in enumerate(operation.cases) if one.probe == "drawn")
    labels = {draw_case(operation, FP32, index, seed).case.label for seed in range(30)}
    assert len(labels) > 20


@pytest.mark.clause("PA-SAMPLE-1", "PA-VERDICT-5")
def test_a_seed_admits_what_its_draw_can_reach_and_no_other_index() -> None:
    operation = operation_named("sample_token")
    inputs = draw_case(operation, FP32, 0, 0)
    (expected,) = operation.expect(inputs, Algorithm())
    assert judge(expected, expected.value).passed
    wrong = expected.value.copy()
    wrong[3] = (wrong[3] + 1) % inputs.arrays["logits"].size
    verdict = judge(expected, wrong)
    assert "1 of 64 draws" in verdict.fault
    assert verdict.coordinates == (("draw", 3),)
    (coarse,) = operation.expect(inputs, Algorithm(accumulate="bf16"))
    assert coarse.choice is not None
    assert np.any(coarse.choice.last > coarse.choice.first)


def test_the_message_of_the_statistical_tier_names_the_cause() -> None:
    def rounded_before_weight(inputs):  # type: ignore[no-untyped-def]
        from ferrum_ref.parity.mutants.norm import rounded_before_weight as mutant

        return mutant(inputs)

    operation = operation_named("rms_norm")
    index = next(index for index, one in enumerate(operation.cases) if one.sizes.get("shape") == (5, 576))
    result = run_case(FunctionSubject("m", {"rms_norm": rounded_before_weight}), operation, STORAGES["fp16"], index, 0)
    assert result.status == FAILED
    assert result.ratio_statistical is not None
    assert result.ratio_statistical > 1.0
