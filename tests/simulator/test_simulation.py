"""The loop itself: what is noticed when, stretches against single steps, and the laws every run must keep."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from ferrum_sim.cost_model.affine import AffineCost
from ferrum_sim.cost_model.hardware import HARDWARE
from ferrum_sim.cost_model.model_sheet import MODELS
from ferrum_sim.cost_model.roofline import RooflineCost
from ferrum_sim.metrics.records import FINISHED, REJECTED, RunRecord
from ferrum_sim.settings import EngineSettings
from ferrum_sim.simulation import simulate
from ferrum_sim.workload.request import SimRequest, Workload, order_by_arrival, unshared_requests
from hypothesis import given, settings
from hypothesis import strategies as st

ONE_SECOND = AffineCost(step_s=1.0)


def workload_of(*rows: tuple[float, int, int]) -> Workload:
    return Workload(tuple(unshared_requests(rows)), "test")


@pytest.mark.clause("SI-RUN-1", "SI-METRIC-1")
def test_three_requests_by_hand() -> None:
    """Steps of 1 s, budget 4. Request 0 (prompt 4) arrives at 0: steps [0,1] [1,2] [2,3] give its tokens.
    Request 1 (prompt 5) arrives at 1.5, is noticed at 2, gets 3 tokens of the budget in [2,3], 2 in [3,4].
    Request 2 arrives at 4, the very end of a step, and is noticed there: [4,5] serves it and request 1's last token."""
    run = simulate(workload_of((0.0, 4, 3), (1.5, 5, 2), (4.0, 1, 1)), EngineSettings(16, 4, 4), ONE_SECOND, check=True)
    first, second, third = run.records
    assert (first.noticed_s, first.first_scheduled_s, first.first_token_s, first.finish_s) == (0, 0, 1, 3)
    assert (second.noticed_s, second.first_scheduled_s, second.first_token_s, second.finish_s) == (2, 2, 4, 5)
    assert (third.noticed_s, third.first_scheduled_s, third.first_token_s, third.finish_s) == (4, 4, 5, 5)
    assert [record.num_generated_tokens for record in run.records] == [3, 2, 1]
    assert [record.finish_reason for record in run.records] == ["Length"] * 3
    steps = run.steps.arrays()
    assert steps["start_s"].tolist() == [0, 1, 2, 3, 4]
    assert steps["end_s"].tolist() == [1, 2, 3, 4, 5]
    assert steps["num_new_tokens"].tolist() == [4, 1, 4, 2, 2]
    assert steps["num_sampled"].tolist() == [1, 1, 1, 1, 2]
    assert steps["used_blocks"].tolist() == [1, 2, 3, 2, 3]
    gaps, counts = run.steps.itl_distribution()
    assert (gaps.tolist(), counts.tolist()) == ([1.0], [3])


@pytest.mark.clause("SI-RUN-1")
def test_an_idle_engine_starts_at_the_arrival() -> None:
    run = simulate(workload_of((0.25, 1, 1), (7.5, 1, 2)), EngineSettings(8, 4), ONE_SECOND)
    assert [record.finish_s for record in run.records] == [1.25, 9.5]
    assert run.steps.arrays()["start_s"].tolist() == [0.25, 7.5, 8.5]


@pytest.mark.clause("SI-RUN-1", "SI-RUN-2")
@pytest.mark.parametrize("step_by_step", [False, True])
def test_an_arrival_during_a_stretch_ends_it_with_the_step_in_flight(step_by_step: bool) -> None:
    """Request 0 would decode alone until 101; request 1 arrives at 10.25, is noticed at 11 and served in [11,12]."""
    run = simulate(
        workload_of((0.0, 1, 101), (10.25, 1, 1)), EngineSettings(64, 4), ONE_SECOND, step_by_step=step_by_step
    )
    assert (run.records[1].noticed_s, run.records[1].finish_s) == (11.0, 12.0)
    assert run.records[0].finish_s == 101.0
    assert run.steps.arrays()["num_sequences"].tolist() == [1] * 11 + [2] + [1] * 89


@pytest.mark.clause("SI-RUN-4")
def test_refused_requests_are_rejected_and_the_others_served() -> None:
    """A prompt of 64 tokens leaves no room for an answer in 16 blocks of 4; the queue holds one waiting request."""
    settings = EngineSettings(16, 4, max_num_seqs=1, max_waiting_requests=1)
    run = simulate(workload_of((0.0, 64, 1), (0.0, 4, 3), (0.5, 4, 1), (0.6, 4, 1)), settings, ONE_SECOND, check=True)
    assert [record.status for record in run.records] == [REJECTED, FINISHED, FINISHED, REJECTED]
    assert [record.finish_reason for record in run.records] == ["RequestValidation", "Length", "Length", "Scheduler"]
    assert math.isnan(run.records[0].first_scheduled_s)


@pytest.mark.clause("SI-RUN-4")
def test_an_answer_ends_where_the_pool_ends() -> None:
    """4 blocks of 4 tokens hold 16: a prompt of 10 gets 6 tokens of the 50 wanted."""
    run = simulate(workload_of((0.0, 10, 50)), EngineSettings(4, 4), ONE_SECOND, check=True)
    assert (run.records[0].status, run.records[0].num_generated_tokens) == (FINISHED, 6)


@pytest.mark.clause("SI-RUN-5", "SI-METRIC-1")
def test_preemption_is_counted_and_recomputed() -> None:
    """4 blocks of 2 tokens, two requests of 3 + 4 tokens: both need 4 blocks in the end, so one has to give way."""
    run = simulate(
        workload_of((0.0, 3, 4), (0.0, 3, 4)), EngineSettings(4, 2, prefix_caching=False), ONE_SECOND, check=True
    )
    assert [record.num_preemptions for record in run.records] == [0, 1]
    assert [record.num_generated_tokens for record in run.records] == [4, 4]
    steps = run.steps.arrays()
    assert int(steps["num_preempted"].sum()) == 1
    assert int(steps["num_new_tokens"].sum()) > 2 * (3 + 3)


@pytest.mark.clause("SI-METRIC-1")
def test_prefix_hits_are_recorded_at_first_admission() -> None:
    """9 shared tokens are two full blocks of 4: the second prompt of 12 finds 8 of its tokens cached."""
    requests = (SimRequest(0, 0.0, 12, 1, ((0, 12),)), SimRequest(1, 5.0, 12, 1, ((0, 9), (50, 3))))
    run = simulate(Workload(requests, "test"), EngineSettings(16, 4), ONE_SECOND)
    assert [record.num_cached_prompt_tokens for record in run.records] == [0, 8]
    cold = simulate(Workload(requests, "test"), EngineSettings(16, 4, prefix_caching=False), ONE_SECOND)
    assert [record.num_cached_prompt_tokens for record in cold.records] == [0, 0]


@pytest.mark.clause("SI-ENGINE-1")
def test_the_priority_policy_serves_the_urgent_first() -> None:
    low, high = SimRequest(1, 0.1, 1, 1, ((1, 1),), "low"), SimRequest(2, 0.2, 1, 1, ((2, 1),), "high")
    workload = Workload((SimRequest(0, 0.0, 1, 1, ((0, 1),)), low, high), "test")
    for policy, order in (("fcfs", [0, 1, 2]), ("priority", [0, 2, 1])):
        run = simulate(workload, EngineSettings(8, 4, max_num_seqs=1, policy=policy), ONE_SECOND)
        assert sorted(range(3), key=lambda index, run=run: run.records[index].finish_s) == order  # type: ignore[misc]


@st.composite
def scenarios(draw: st.DrawFn) -> tuple[Workload, EngineSettings, Any]:
    """Small, crowded and varied: shared prefixes, equal times, pools that must preempt, all limits."""
    rows = draw(
        st.lists(
            st.tuples(
                st.one_of(st.floats(0, 3), st.sampled_from([0.0, 0.5, 1.0, 2.0])),
                st.integers(1, 40),
                st.integers(1, 30),
                st.integers(0, 3),
                st.sampled_from(["low", "normal", "high"]),
            ),
            min_size=1,
            max_size=14,
        )
    )
    requests = []
    for index, (arrival_s, prompt, output, prefix, priority) in enumerate(rows):
        shared = min(prompt, 17) if prefix else 0
        own = ((1000 + 100 * index, prompt - shared),)
        runs = ((prefix * 20, shared), *own) if shared else own
        requests.append(SimRequest(index, arrival_s, prompt, output, runs, priority))
    workload = Workload(order_by_arrival(requests)[0], "scenario")
    settings = EngineSettings(
        num_blocks=draw(st.integers(2, 40)),
        block_size=draw(st.sampled_from([1, 2, 4, 16])),
        max_num_batched_tokens=draw(st.sampled_from([1, 3, 16, 64])),
        max_num_seqs=draw(st.sampled_from([1, 2, 4, 16])),
        prefix_caching=draw(st.booleans()),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        max_waiting_requests=draw(st.sampled_from([0, 3, 100])),
    )
    cost_model = draw(
        st.sampled_from([
            AffineCost(step_s=0.125),  # arrivals coincide with step ends
            AffineCost(step_s=0.01, token_s=0.003, sequence_s=0.007),
            RooflineCost(MODELS["smollm2-135m"], HARDWARE["l4"], host_overhead_s=0.01),
            AffineCost(),  # no time passes
        ])
    )  # fmt: skip
    return workload, settings, cost_model


def run_both(scenario: tuple[Workload, EngineSettings, Any]) -> tuple[RunRecord, RunRecord]:
    return simulate(*scenario, check=True), simulate(*scenario, step_by_step=True, check=True)


@pytest.mark.clause("SI-RUN-2", "SI-RUN-3", "SI-LAW-1", "SI-LAW-2", "SI-LAW-3", "SI-LAW-4")
@settings(max_examples=300)
@given(scenarios())
def test_every_law_holds_in_every_scenario(scenario: tuple[Workload, EngineSettings, Any]) -> None:
    """Conservation is checked inside the runs (`check=True`), after every commit."""
    stretched, single = run_both(scenario)
    for name, values in stretched.steps.arrays().items():
        assert values.tobytes() == single.steps.arrays()[name].tobytes(), name
    assert stretched.digest() == single.digest()
    check_nothing_is_lost(stretched)
    check_littles_law(stretched)
    check_work_conservation(stretched)
    if scenario[1].policy == "fcfs":
        check_first_come_first_served(stretched)


def check_nothing_is_lost(run: RunRecord) -> None:
    """Every request ends, in order of its own events, with as many tokens as it asked for or the pool can hold."""
    pool_tokens = run.num_blocks * run.block_size
    for record in run.records:
        assert record.status in (FINISHED, REJECTED)
        if record.status == FINISHED:
            prompt, output = record.request.num_prompt_tokens, record.request.num_output_tokens
            assert record.num_generated_tokens == min(output, pool_tokens - prompt)
            assert (
                record.request.arrival_s
                <= record.noticed_s
                <= record.first_scheduled_s
                <= record.first_token_s
                <= record.last_token_s
                == record.finish_s
            )
    steps = run.steps.arrays()
    assert int(steps["num_sampled"].sum()) == sum(record.num_generated_tokens for record in run.records)
    assert int(steps["num_preempted"].sum()) == sum(record.num_preemptions for record in run.records)
    assert (steps["used_blocks"] <= run.num_blocks).all()
    assert (steps["used_blocks"] >= 1).all()


def check_littles_law(run: RunRecord) -> None:
    """Rational arithmetic: the integral of the engine's own count equals the sum of the requests' times in it."""
    steps = run.steps.arrays()
    integral = sum(
        (Fraction(end) - Fraction(start)) * int(running + waiting)
        for start, end, running, waiting in zip(
            steps["start_s"], steps["end_s"], steps["num_running"], steps["num_waiting"], strict=True
        )
    )
    sojourns = sum(
        Fraction(record.finish_s) - Fraction(record.noticed_s) for record in run.records if record.status == FINISHED
    )
    assert integral == sojourns


def check_work_conservation(run: RunRecord) -> None:
    """Between two steps the clock stands still, or nobody was there and the next step starts at an arrival."""
    steps = run.steps.arrays()
    arrivals = {record.request.arrival_s for record in run.records if record.status == FINISHED}
    ends = np.concatenate(([0.0], steps["end_s"]))[:-1]
    for start_s, previous_end_s in zip(steps["start_s"].tolist(), ends.tolist(), strict=True):
        if start_s > previous_end_s:
            assert start_s in arrivals
            served = [r for r in run.records if r.status == FINISHED and r.request.arrival_s <= previous_end_s]
            assert all(record.finish_s <= previous_end_s for record in served)


def check_first_come_first_served(run: RunRecord) -> None:
    """First service in order of arrival, and a preempted request waits for no later one's first service."""
    starts = [record.first_scheduled_s for record in run.records if record.status == FINISHED]
    assert starts == sorted(starts)


@pytest.mark.clause("SI-LAW-4")
def test_no_request_starves_under_fcfs_in_overload() -> None:
    """An endless stream at twice the capacity: waiting grows with the backlog ahead, request by request, no more."""
    rows = [(0.5 * index, 4, 1) for index in range(200)]
    run = simulate(workload_of(*rows), EngineSettings(64, 4, max_num_seqs=1), ONE_SECOND)
    for index, record in enumerate(run.records):
        assert record.first_scheduled_s == index


@pytest.mark.clause("SI-RUN-1")
def test_progress_is_reported_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    simulate(
        workload_of((0.0, 1, 1), (5.0, 1, 1)),
        EngineSettings(8, 4),
        ONE_SECOND,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (2, 2)
    assert seen == sorted(seen)
