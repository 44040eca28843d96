"""The engine under simulation: its own scheduler, KV-cache manager and step loop, put together as serving does.

Nothing of the engine is re-implemented here; what differs is who executes a step and which clock runs.  [SI-ENGINE-1]
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import timedelta

from ferrum_ref.engine.plan import EPOCH
from ferrum_ref.engine.step_loop import StepLoop
from ferrum_ref.interfaces.scheduler import BatchHint, SchedulerConfig
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.scheduler.continuous_batch import ContinuousBatchScheduler
from ferrum_ref.types.config import SchedulingPolicy
from ferrum_ref.types.ids import ModelId, RequestId
from ferrum_ref.types.requests import InferenceRequest
from ferrum_ref.types.sampling import Priority, SamplingParams
from ferrum_sim.settings import EngineSettings
from ferrum_sim.workload.request import SimRequest

POLICY_OF = {"fcfs": SchedulingPolicy.FCFS, "priority": SchedulingPolicy.Priority}
PRIORITY_OF = {"low": Priority.Low, "normal": Priority.Normal, "high": Priority.High, "critical": Priority.Critical}
SIMULATED_MODEL = ModelId("simulated")


@dataclass(frozen=True, slots=True)
class Engine:
    """The three parts of a replica; `loop` drives the other two."""

    loop: StepLoop
    scheduler: ContinuousBatchScheduler
    kv_cache: PagedKvCacheManager


def build_engine(settings: EngineSettings) -> Engine:
    """A fresh engine without storage for keys and values: only its bookkeeping runs.  [SI-ENGINE-1]"""
    config = SchedulerConfig(
        policy=POLICY_OF[settings.policy],
        max_waiting_requests=settings.max_waiting_requests,
        max_running_requests=settings.max_num_seqs,
    )
    scheduler = ContinuousBatchScheduler(config)
    kv_cache = PagedKvCacheManager(
        settings.num_blocks, settings.block_size, enable_prefix_caching=settings.prefix_caching
    )
    hint = BatchHint.of(settings.max_num_seqs, settings.max_num_batched_tokens)
    return Engine(StepLoop(scheduler, kv_cache, hint), scheduler, kv_cache)


def inference_request(request: SimRequest) -> InferenceRequest:
    """What a client would have sent; its id is its arrival number, its answer as long as the workload says. Pure."""
    return InferenceRequest(
        id=RequestId(uuid.UUID(int=request.index + 1)),
        prompt="",
        model_id=SIMULATED_MODEL,
        sampling_params=SamplingParams(max_tokens=request.num_output_tokens, temperature=0.0),
        stream=False,
        priority=PRIORITY_OF[request.priority],
        client_id=None,
        session_id=None,
        created_at=EPOCH + timedelta(seconds=request.arrival_s),
        metadata={},
    )
