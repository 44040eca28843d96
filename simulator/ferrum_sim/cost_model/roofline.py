"""Step times from a model's dimensions and a data sheet: the slower of arithmetic and memory, part by part.

Source: Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", CACM 52(4), 2009;
all-reduce: Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH", 2005, ring.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError
from ferrum_sim.cost_model.batch import StepBatch
from ferrum_sim.cost_model.hardware import HardwareSheet
from ferrum_sim.cost_model.model_sheet import ModelSheet

# With 2 ms this model reproduces the end-to-end times of a measured vLLM 0.19 run (300 requests, Llama-3.1-8B on an RTX
# 4090; LLMServingSim 2, CASYS Lab, KAIST) to 0.6 % on average. One run, fitted by that figure: elsewhere an assumption.
HOST_OVERHEAD_S = 2.0e-3
LINK_LATENCY_S = 10.0e-6


@dataclass(frozen=True, slots=True)
class RooflineCost:
    """step = host + layers + head + prefill attention + decode attention + collectives          [SI-ROOFLINE-1..4]

    part = max(FLOPs / (N * peak * compute_efficiency), bytes / (N * bandwidth * memory_efficiency)), N accelerators:
      layers      2 T W FLOPs; W weights + T A activations read or written   (W, A over all layers)
      head        2 R E V FLOPs; E V weights, R (E + V) activations          (R sampled rows)
      attention   4 H D L FLOPs a (query, key) pair; K and V of each attended position read, of each new one written
      collectives N > 1: 2 L all-reduces of T E elements, each 2 (N - 1) (latency + bytes / (N link))
    `host_overhead_s`: scheduling, sampling and launch, per step.
    """

    model: ModelSheet
    hardware: HardwareSheet
    tensor_parallel: int = 1
    compute_efficiency: float | None = None
    memory_efficiency: float | None = None
    host_overhead_s: float = HOST_OVERHEAD_S
    link_latency_s: float = LINK_LATENCY_S

    def __post_init__(self) -> None:
        """Raises InvalidParameterError for efficiencies outside (0, 1], negative overheads, undivided heads."""
        heads = self.model.num_heads
        if self.tensor_parallel < 1 or heads % self.tensor_parallel:
            raise InvalidParameterError(
                f"RooflineCost: tensor_parallel is {self.tensor_parallel}; expected a divisor of {self.model.name}'s "
                f"{heads} query heads"
            )
        efficiencies = {"compute_efficiency": self.compute_efficiency, "memory_efficiency": self.memory_efficiency}
        for name, value in efficiencies.items():
            if value is not None and not 0.0 < value <= 1.0:
                raise InvalidParameterError(f"RooflineCost: {name} is {value}; expected a fraction in (0, 1]")
        if not 0.0 <= self.host_overhead_s < float("inf") or not 0.0 <= self.link_latency_s < float("inf"):
            raise InvalidParameterError(
                f"RooflineCost: host_overhead_s is {self.host_overhead_s} and link_latency_s {self.link_latency_s}; "
                "expected finite seconds >= 0"
            )

    @property
    def flops_per_s(self) -> float:
        efficiency = self.hardware.compute_efficiency if self.compute_efficiency is None else self.compute_efficiency
        return self.tensor_parallel * self.hardware.peak_flops_per_s * efficiency

    @property
    def bytes_per_s(self) -> float:
        efficiency = self.hardware.memory_efficiency if self.memory_efficiency is None else self.memory_efficiency
        return self.tensor_parallel * self.hardware.memory_bytes_per_s * efficiency

    def step_time_s(self, batch: StepBatch) -> float:
        fixed_s = self._fixed_s(batch)
        if batch.num_decode_sequences == 0:
            return fixed_s
        flops, num_bytes = self._decode_work(batch)
        return fixed_s + max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)

    def stretch_times_s(self, batch: StepBatch, num_steps: int) -> NDArray[np.float64]:
        """Only decode attention changes from step to step, by whole numbers of FLOPs and bytes: exact in float64."""
        fixed_s = self._fixed_s(batch)
        if batch.num_decode_sequences == 0:
            return np.full(num_steps, fixed_s)
        flops, num_bytes = self._decode_work(batch)
        flops_more, bytes_more = self._per_attended()
        steps = np.arange(num_steps, dtype=np.int64) * batch.num_decode_sequences
        compute_s = (flops + steps * flops_more) / self.flops_per_s
        memory_s = (num_bytes + steps * bytes_more) / self.bytes_per_s
        return fixed_s + np.maximum(compute_s, memory_s)

    def _per_attended(self) -> tuple[int, int]:
        """FLOPs of one (query, key) pair and bytes of one cached position, over all layers and accelerators.

        Where there are more accelerators than kv heads, each holds one head: some are held more than once.
        """
        model = self.model
        heads_held = -(-model.num_kv_heads // self.tensor_parallel) * self.tensor_parallel
        flops = 4 * model.num_heads * model.head_dim * model.num_layers
        return flops, model.kv_bytes_per_token // model.num_kv_heads * heads_held

    def _decode_work(self, batch: StepBatch) -> tuple[int, int]:
        flops, num_bytes = self._per_attended()
        kv_moved = batch.num_decode_kv_tokens + batch.num_decode_sequences
        return batch.num_decode_kv_tokens * flops, kv_moved * num_bytes

    def _fixed_s(self, batch: StepBatch) -> float:
        """Everything but decode attention."""
        return (
            self.host_overhead_s
            + self._layers_s(batch.num_new_tokens)
            + self._head_s(batch.num_sampled)
            + self._prefill_attention_s(batch)
            + self._collectives_s(batch.num_new_tokens)
        )

    def _part_s(self, flops: int, num_bytes: int) -> float:
        return max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)

    def _layers_s(self, num_tokens: int) -> float:
        model = self.model
        weights = model.num_layers * model.linear_weights_per_layer
        activations = model.num_layers * (
            4 * model.hidden_size
            + 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
            + 3 * model.intermediate_size
        )
        return self._part_s(2 * num_tokens * weights, (weights + num_tokens * activations) * model.element_bytes)

    def _head_s(self, num_rows: int) -> float:
        if num_rows == 0:
            return 0.0
        model = self.model
        weights = model.hidden_size * model.vocab_size
        activations = num_rows * (model.hidden_size + model.vocab_size)
        return self._part_s(2 * num_rows * weights, (weights + activations) * model.element_bytes)

    def _prefill_attention_s(self, batch: StepBatch) -> float:
        flops, num_bytes = self._per_attended()
        num_new = batch.num_new_tokens - batch.num_decode_sequences
        return self._part_s(batch.num_prefill_attended * flops, (batch.num_prefill_kv_tokens + num_new) * num_bytes)

    def _collectives_s(self, num_tokens: int) -> float:
        if self.tensor_parallel == 1:
            return 0.0
        num_bytes = num_tokens * self.model.hidden_size * self.model.element_bytes
        round_s = self.link_latency_s + num_bytes / (self.tensor_parallel * self.hardware.link_bytes_per_s)
        return 2 * self.model.num_layers * (2 * (self.tensor_parallel - 1)) * round_s
