"""From settings to a finished run with its figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ferrum_ref.errors import UnsupportedError
from ferrum_sim.cost_model.hardware import find_hardware
from ferrum_sim.cost_model.memory import kv_capacity_blocks
from ferrum_sim.cost_model.model_sheet import find_model
from ferrum_sim.cost_model.roofline import HOST_OVERHEAD_S, RooflineCost
from ferrum_sim.metrics.records import RunRecord
from ferrum_sim.metrics.summary import summarise
from ferrum_sim.settings import UNLIMITED, EngineSettings, MachineSettings, RunSettings
from ferrum_sim.workload.build import build_workload
from ferrum_sim.workload.request import Workload


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run and its figures (plain data, the same bytes for the same settings)."""

    record: RunRecord
    summary: dict[str, Any]


def run_experiment(settings: RunSettings, on_progress: Callable[[int, int], None] | None = None) -> Outcome:
    """Build the workload and the machine, simulate, summarise.  [SI-RUN-1..5, SI-REPORT-2]

    `on_progress(requests done, requests in all)` is called now and then.
    Raises UnsupportedError without simpy, and what the parts raise for bad settings and bad files.
    """
    try:
        from ferrum_sim.simulation import simulate
    except ModuleNotFoundError as error:
        if error.name != "simpy":
            raise
        raise UnsupportedError(
            "run_experiment: simulation needs simpy, which is not installed; pip install 'ferrum-ref[sim]'"
        ) from error
    cost_model = build_cost_model(settings.machine)
    engine = build_engine_settings(settings, cost_model)
    workload = build_workload(settings.workload)
    record = simulate(
        workload, engine, cost_model, step_by_step=settings.step_by_step, check=settings.check, on_progress=on_progress
    )
    return Outcome(record, _described(workload, cost_model, engine) | summarise(record, settings.summary))


def build_cost_model(settings: MachineSettings) -> RooflineCost:
    """The roofline of a model on a machine. Pure but for reading a config.json."""
    return RooflineCost(
        find_model(settings.model),
        find_hardware(settings.hardware),
        settings.tensor_parallel,
        settings.compute_efficiency,
        settings.memory_efficiency,
        HOST_OVERHEAD_S if settings.host_overhead_s is None else settings.host_overhead_s,
    )


def build_engine_settings(settings: RunSettings, cost_model: RooflineCost) -> EngineSettings:
    """The engine's limits; without `num_blocks`, the blocks that fit beside the weights. Pure."""
    num_blocks = settings.num_blocks
    if num_blocks is None:
        num_blocks = kv_capacity_blocks(
            cost_model.model, cost_model.hardware, settings.block_size, cost_model.tensor_parallel
        )
    return EngineSettings(
        num_blocks,
        settings.block_size,
        settings.max_num_batched_tokens,
        settings.max_num_seqs,
        settings.prefix_caching,
        settings.policy,
        settings.max_waiting_requests,
    )


def _described(workload: Workload, cost_model: RooflineCost, engine: EngineSettings) -> dict[str, Any]:
    """What was simulated, for the head of the summary."""
    longest = max(request.num_prompt_tokens + request.num_output_tokens for request in workload.requests)
    context = cost_model.model.max_position_embeddings
    notes = list(workload.notes)
    if longest > context:
        too_long = sum(r.num_prompt_tokens + r.num_output_tokens > context for r in workload.requests)
        notes.append(
            f"{too_long} requests are longer than {cost_model.model.name}'s context of {context} tokens "
            f"(longest {longest}); they were simulated all the same"
        )
    return {
        "workload": {
            "description": workload.description,
            "requests": len(workload.requests),
            "prompt_tokens": workload.num_prompt_tokens,
            "output_tokens": workload.num_output_tokens,
            "notes": notes,
        },
        "machine": {
            "model": cost_model.model.name,
            "hardware": cost_model.hardware.name,
            "tensor_parallel": cost_model.tensor_parallel,
            "peak_flops_per_s": cost_model.flops_per_s,
            "memory_bytes_per_s": cost_model.bytes_per_s,
            "host_overhead_s": cost_model.host_overhead_s,
        },
        "limits": {
            "max_num_batched_tokens": engine.max_num_batched_tokens,
            "max_num_seqs": engine.max_num_seqs,
            "prefix_caching": engine.prefix_caching,
            "policy": engine.policy,
            "max_waiting_requests": None if engine.max_waiting_requests == UNLIMITED else engine.max_waiting_requests,
        },
    }
