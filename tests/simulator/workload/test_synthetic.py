"""Seeded workloads, common random numbers, rate scaling."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ferrum_sim.workload.arrivals import ArrivalProcess
from ferrum_sim.workload.lengths import LengthDistribution
from ferrum_sim.workload.request import SimRequest, Workload
from ferrum_sim.workload.synthetic import SyntheticSpec, embedded_chat, generate

from ferrum_ref.errors import InvalidParameterError

SPEC = SyntheticSpec(
    ArrivalProcess.parse("poisson:4"),
    LengthDistribution.parse("lognormal:100,1"),
    LengthDistribution.parse("uniform:1,50"),
    200,
)


@pytest.mark.clause("SI-WORKLOAD-5")
def test_equal_seeds_give_equal_workloads_and_others_do_not() -> None:
    assert generate(SPEC, 3) == generate(SPEC, 3)
    assert generate(SPEC, 3).requests != generate(SPEC, 4).requests


@pytest.mark.clause("SI-WORKLOAD-5")
def test_changing_one_part_leaves_the_others_as_they_were() -> None:
    base = generate(SPEC, 3).requests
    other_arrivals = generate(replace(SPEC, arrivals=ArrivalProcess.parse("gamma:9,3")), 3).requests
    assert [r.num_prompt_tokens for r in base] == [r.num_prompt_tokens for r in other_arrivals]
    assert [r.num_output_tokens for r in base] == [r.num_output_tokens for r in other_arrivals]
    assert [r.arrival_s for r in base] != [r.arrival_s for r in other_arrivals]
    other_prompts = generate(replace(SPEC, prompt_tokens=LengthDistribution.parse("fixed:9")), 3).requests
    assert [r.arrival_s for r in base] == [r.arrival_s for r in other_prompts]


@pytest.mark.clause("SI-WORKLOAD-1", "SI-WORKLOAD-2")
def test_requests_are_numbered_in_arrival_order_and_prompts_have_the_stated_length() -> None:
    workload = generate(embedded_chat(num_requests=50), 0)
    assert [request.index for request in workload.requests] == list(range(50))
    assert all(len(request.prompt_token_ids()) == request.num_prompt_tokens for request in workload.requests)
    out_of_order = (SimRequest(0, 2.0, 1, 1, ((0, 1),)), SimRequest(1, 1.0, 1, 1, ((1, 1),)))
    with pytest.raises(InvalidParameterError, match=r"requests\[1\]"):
        Workload(out_of_order, "x")


@pytest.mark.clause("SI-WORKLOAD-6")
def test_the_embedded_workload_shares_eight_prefixes_and_nothing_else() -> None:
    requests = generate(embedded_chat(num_requests=100), 0).requests
    prompts = [request.prompt_token_ids() for request in requests]
    assert len({tuple(prompt[:256]) for prompt in prompts}) == 8
    own = [token for prompt in prompts for token in prompt[256:]]
    assert len(set(own)) == len(own)
    assert not {token for prompt in prompts for token in prompt[:256]} & set(own)


@pytest.mark.clause("SI-WORKLOAD-3")
def test_rate_scaling_divides_times_and_nothing_else() -> None:
    base = generate(SPEC, 0)
    doubled = base.scaled(2.0)
    assert [r.arrival_s for r in doubled.requests] == [r.arrival_s / 2.0 for r in base.requests]
    assert [replace(r, arrival_s=0) for r in doubled.requests] == [replace(r, arrival_s=0) for r in base.requests]
    assert base.scaled(1.0) is base
    assert base.limited(3).requests == base.requests[:3]
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidParameterError, match="rate_scale"):
            base.scaled(bad)


@pytest.mark.clause("SI-WORKLOAD-5")
def test_an_empty_recipe_is_refused() -> None:
    for bad in (replace(SPEC, num_requests=0), replace(SPEC, num_requests=-1)):
        with pytest.raises(InvalidParameterError, match="num_requests"):
            generate(bad, 0)
    with pytest.raises(InvalidParameterError, match="seed"):
        generate(SPEC, -1)
