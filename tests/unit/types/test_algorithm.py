"""Declarations of arithmetic: defaults, units, refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.types.algorithm import Algorithm


@pytest.mark.clause("PA-ALGORITHM-1")
def test_the_defaults_describe_plain_float32_code_and_cannot_be_changed() -> None:
    plain = Algorithm()
    assert (plain.accumulate, plain.reduction, plain.key_block, plain.rounds_probabilities) == (
        "fp32",
        "sequential",
        None,
        False,
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        plain.accumulate = "fp16"  # type: ignore[misc]
    assert Algorithm(accumulate="tf32") == Algorithm(accumulate="tf32")
    assert len({Algorithm(), Algorithm(), Algorithm(key_block=16)}) == 2


@pytest.mark.clause("PA-ALGORITHM-1", "PA-ALGORITHM-3")
@pytest.mark.parametrize(
    "wrong",
    [
        {"accumulate": "fp8"},
        {"reduction": "butterfly"},
        {"reduction": "tree"},
        {"reduction_depth": 4},
        {"reduction": "tree", "reduction_depth": -1},
        {"partial_sums": 0},
        {"reduction": "tree", "reduction_depth": 4, "partial_sums": 2},
        {"key_block": 0},
        {"extra_roundings": -1},
        {"exponent_roundings": -1},
        {"exp_ulp": -0.5},
        {"rsqrt_ulp": float("nan")},
    ],
    ids=lambda wrong: ",".join(wrong),
)
def test_a_contradiction_is_refused_by_the_name_of_its_field(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidParameterError, match=next(iter(reversed(wrong))).split("_")[0]):
        Algorithm(**wrong)  # type: ignore[arg-type]


@pytest.mark.clause("PA-ALGORITHM-2")
@pytest.mark.parametrize(("name", "kind"), [("fp64", np.float64), ("fp32", np.float32), ("fp16", np.float16)])
def test_the_unit_is_half_the_distance_from_one_to_the_next_number(name: str, kind: type) -> None:
    assert Algorithm(accumulate=name).unit == float(np.finfo(kind).eps) / 2
    assert Algorithm(accumulate=name, truncates=True).unit == float(np.finfo(kind).eps)


@pytest.mark.clause("PA-ALGORITHM-2")
def test_bf16_has_eight_bits_and_tf32_adds_in_float32() -> None:
    assert Algorithm(accumulate="bf16").unit == 2.0**-8
    assert Algorithm(accumulate="tf32").unit == Algorithm().unit
