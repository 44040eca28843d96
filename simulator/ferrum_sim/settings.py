"""What a simulation is told: workload, engine, machine. Plain data; `experiment.py` makes a run of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ferrum_ref.errors import InvalidParameterError
from ferrum_sim.metrics.summary import SummaryOptions

UNLIMITED = 2**31
LARGEST_BLOCK_TOKENS = 2**16
LARGEST_POOL_BLOCKS = 2**24
POLICIES = ("fcfs", "priority")


def require_at_least(operation: str, least: int, **values: int) -> None:
    """Raise InvalidParameterError for the first value below `least`. Pure."""
    for name, value in values.items():
        if value < least:
            raise InvalidParameterError(f"{operation}: {name} is {value}; expected a whole number >= {least}")


@dataclass(frozen=True, slots=True)
class WorkloadSettings:
    """A trace, or an arrival process with lengths, or (neither given) the embedded chat workload."""

    trace: Path | None = None
    arrivals: str | None = None
    num_requests: int | None = None
    prompt_tokens: str | None = None
    output_tokens: str | None = None
    rate_scale: float = 1.0
    limit: int | None = None
    high_priority_fraction: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Limits and switches of the engine's own scheduler and KV-cache manager.  [SI-ENGINE-1]"""

    num_blocks: int
    block_size: int = 16
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    prefix_caching: bool = True
    policy: str = "fcfs"
    max_waiting_requests: int = UNLIMITED

    def __post_init__(self) -> None:
        require_at_least("EngineSettings", 1, num_blocks=self.num_blocks, block_size=self.block_size)
        require_at_least("EngineSettings", 1, max_num_batched_tokens=self.max_num_batched_tokens)
        require_at_least("EngineSettings", 1, max_num_seqs=self.max_num_seqs)
        require_at_least("EngineSettings", 0, max_waiting_requests=self.max_waiting_requests)
        if self.block_size > LARGEST_BLOCK_TOKENS or self.num_blocks > LARGEST_POOL_BLOCKS:
            raise InvalidParameterError(
                f"EngineSettings: {self.num_blocks} blocks of {self.block_size} tokens; expected at most "
                f"{LARGEST_POOL_BLOCKS} blocks of at most {LARGEST_BLOCK_TOKENS}"
            )
        if self.policy not in POLICIES:
            raise InvalidParameterError(
                f"EngineSettings: policy is '{self.policy}'; expected one of {', '.join(POLICIES)}"
            )


@dataclass(frozen=True, slots=True)
class MachineSettings:
    """Model and accelerators; None takes the sheet's or the cost model's own value."""

    model: str = "llama-3-8b"
    hardware: str = "h100"
    tensor_parallel: int = 1
    compute_efficiency: float | None = None
    memory_efficiency: float | None = None
    host_overhead_s: float | None = None


@dataclass(frozen=True, slots=True)
class RunSettings:
    """One simulation. `num_blocks` None: as many as fit beside the weights."""

    workload: WorkloadSettings = field(default_factory=WorkloadSettings)
    machine: MachineSettings = field(default_factory=MachineSettings)
    num_blocks: int | None = None
    block_size: int = 16
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    prefix_caching: bool = True
    policy: str = "fcfs"
    max_waiting_requests: int = UNLIMITED
    summary: SummaryOptions = field(default_factory=SummaryOptions)
    step_by_step: bool = False
    check: bool = False
