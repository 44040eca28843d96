"""A simulation: arrivals, replica, virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import simpy

from ferrum_sim.clock import Until
from ferrum_sim.cost_model.batch import CostModel
from ferrum_sim.engine import build_engine
from ferrum_sim.metrics.records import RequestRecord, RunRecord
from ferrum_sim.replica import Replica
from ferrum_sim.settings import EngineSettings
from ferrum_sim.workload.request import Workload

Progress = Callable[[int, int], None]


def simulate(
    workload: Workload,
    settings: EngineSettings,
    cost_model: CostModel,
    *,
    step_by_step: bool = False,
    check: bool = False,
    on_progress: Progress | None = None,
) -> RunRecord:
    """Run the workload through a fresh engine until every request has ended.  [SI-RUN-1..5]

    The result does not depend on `step_by_step`, to the last bit. `check` verifies conservation after every commit.
    Raises InternalError when an invariant of the engine breaks.
    """
    env = simpy.Environment(0.0)
    replica = Replica(env, build_engine(settings), cost_model, step_by_step=step_by_step, check=check)
    records = tuple(RequestRecord(request) for request in workload.requests)
    env.process(_arrivals(env, records, replica, on_progress))
    env.run()
    if on_progress is not None:
        on_progress(replica.num_done, len(records))
    return RunRecord(records, replica.steps, settings.num_blocks, settings.block_size)


def _arrivals(
    env: simpy.Environment, records: tuple[RequestRecord, ...], replica: Replica, on_progress: Progress | None
) -> Generator[simpy.Event, Any, None]:
    """Deliver each request at its time."""
    for record in records:
        arrival_s = record.request.arrival_s
        if arrival_s > env.now:
            yield env.timeout(Until(arrival_s))
        replica.deliver(record)
        if on_progress is not None:
            on_progress(replica.num_done, len(records))
