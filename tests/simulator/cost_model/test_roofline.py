"""The roofline against sums worked out by hand on a toy model, and the law of stretches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ferrum_sim.cost_model.affine import AffineCost
from ferrum_sim.cost_model.batch import CostModel, StepBatch
from ferrum_sim.cost_model.hardware import HARDWARE, HardwareSheet, find_hardware
from ferrum_sim.cost_model.model_sheet import MODELS, ModelSheet, find_model
from ferrum_sim.cost_model.roofline import RooflineCost
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError, NotFoundError

# One layer, E 2, F 3, H 2, G 1, D 1, V 5, bf16. Linear weights: E(H + 2G)D + HDE + 3EF = 8 + 4 + 18 = 30.
# Activations a token: (E in, (H + 2G)D out) + (HD, E) + (E, 2F) + (F, E) = 4E + 2(H + G)D + 3F = 8 + 6 + 9 = 23.
TOY = ModelSheet("toy", 1, 2, 3, 2, 1, 1, 5, 64)
SLOW_MEMORY = HardwareSheet("slow", "slow memory", 100.0, 10.0, 2**30, 50.0, 1.0, 1.0)
FAST_MEMORY = replace(SLOW_MEMORY, memory_bytes_per_s=1e9)


def cost(hardware: HardwareSheet, **settings: float) -> RooflineCost:
    return RooflineCost(TOY, hardware, host_overhead_s=0.0, **settings)  # type: ignore[arg-type]


@pytest.mark.clause("SI-COST-1")
def test_sums_of_a_mixed_batch() -> None:
    """A chunk of 3 on 4 cached (7 + 6 + 5 positions seen, i.e. 5 + 6 + 7), a prompt of 2, two decodes on 9 and 0."""
    batch = StepBatch.of((3, 2, 1, 1), (4, 0, 9, 0), 3)
    assert batch.num_new_tokens == 7
    assert batch.num_sequences == 4
    assert batch.num_prefill_attended == (5 + 6 + 7) + (1 + 2)
    assert batch.num_prefill_kv_tokens == 7 + 2
    assert batch.num_decode_sequences == 2
    assert batch.num_decode_kv_tokens == 10 + 1


@pytest.mark.clause("SI-ROOFLINE-1", "SI-ROOFLINE-2")
def test_a_prompt_of_four_tokens_by_hand() -> None:
    """Slow memory: layers (30 + 4*23)*2/10 = 24.4, head (10 + 7)*2/10 = 3.4, attention (4 + 4)*4/10 = 3.2 s.
    Fast memory: layers 2*4*30/100 = 2.4, head 2*10/100 = 0.2, attention 10 pairs * 8 FLOPs/100 = 0.8 s."""
    batch = StepBatch.of((4,), (0,), 1)
    assert cost(SLOW_MEMORY).step_time_s(batch) == pytest.approx(24.4 + 3.4 + 3.2, rel=1e-14)
    assert cost(FAST_MEMORY).step_time_s(batch) == pytest.approx(2.4 + 0.2 + 0.8, rel=1e-14)


@pytest.mark.clause("SI-ROOFLINE-1", "SI-ROOFLINE-2")
def test_a_decode_step_on_nine_cached_tokens_by_hand() -> None:
    """Slow memory: layers (30 + 23)*2/10 = 10.6, head 3.4, attention (10 read + 1 written)*4/10 = 4.4 s.
    Fast memory: 2*30/100 = 0.6, head 0.2, attention 10*8/100 = 0.8 s."""
    batch = StepBatch.of((1,), (9,), 1)
    assert cost(SLOW_MEMORY).step_time_s(batch) == pytest.approx(10.6 + 3.4 + 4.4, rel=1e-14)
    assert cost(FAST_MEMORY).step_time_s(batch) == pytest.approx(0.6 + 0.2 + 0.8, rel=1e-14)


@pytest.mark.clause("SI-ROOFLINE-2")
def test_a_chunk_that_samples_nothing_has_no_head() -> None:
    difference = cost(FAST_MEMORY).step_time_s(StepBatch.of((4,), (0,), 1)) - cost(FAST_MEMORY).step_time_s(
        StepBatch.of((4,), (0,), 0)
    )
    assert difference == pytest.approx(0.2, rel=1e-12)


@pytest.mark.clause("SI-ROOFLINE-3")
def test_two_accelerators_halve_the_work_and_talk() -> None:
    """4 tokens * 2 elements * 2 bytes = 16 bytes; 2 all-reduces of 2*(2 - 1) rounds of 0.5 + 16/(2*50) = 0.66 s each.
    One kv head on two accelerators is held twice, so K and V reads do not shrink; fast memory hides that."""
    two = cost(FAST_MEMORY, tensor_parallel=2, link_latency_s=0.5)
    one = cost(FAST_MEMORY)
    batch = StepBatch.of((4,), (0,), 1)
    assert two.step_time_s(batch) == pytest.approx(one.step_time_s(batch) / 2 + 2 * 2 * 0.66, rel=1e-12)
    slow = cost(SLOW_MEMORY, tensor_parallel=2, link_latency_s=0.0)
    assert slow.step_time_s(StepBatch.of((1,), (9,), 0)) == pytest.approx(10.6 / 2 + 4.4 + 2 * 2 * 4 / 100, rel=1e-12)


@pytest.mark.clause("SI-ROOFLINE-4")
def test_host_overhead_and_efficiencies_enter_as_named() -> None:
    batch = StepBatch.of((4,), (0,), 1)
    base = cost(FAST_MEMORY).step_time_s(batch)
    assert replace(cost(FAST_MEMORY), host_overhead_s=0.25).step_time_s(batch) == pytest.approx(base + 0.25)
    assert cost(FAST_MEMORY, compute_efficiency=0.5).step_time_s(batch) == pytest.approx(2 * base)
    assert cost(SLOW_MEMORY, memory_efficiency=0.5).step_time_s(batch) == pytest.approx(
        2 * cost(SLOW_MEMORY).step_time_s(batch)
    )


@pytest.mark.clause("SI-ROOFLINE-4")
@pytest.mark.parametrize(
    "bad",
    [
        {"tensor_parallel": 3},
        {"tensor_parallel": 0},
        {"compute_efficiency": 0.0},
        {"compute_efficiency": 1.5},
        {"memory_efficiency": float("nan")},
        {"host_overhead_s": -1.0},
        {"link_latency_s": float("inf")},
    ],
)
def test_absurd_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InvalidParameterError, match=next(iter(bad))):
        RooflineCost(TOY, SLOW_MEMORY, **bad)  # type: ignore[arg-type]


decode_batches = st.lists(st.integers(0, 200_000), min_size=1, max_size=64).map(
    lambda cached: StepBatch.of((1,) * len(cached), tuple(cached), len(cached))
)
cost_models = st.one_of(
    st.builds(
        RooflineCost,
        st.sampled_from(list(MODELS.values())),
        st.sampled_from(list(HARDWARE.values())),
        compute_efficiency=st.floats(0.01, 1.0),
        memory_efficiency=st.floats(0.01, 1.0),
        host_overhead_s=st.floats(0.0, 0.1),
    ),
    st.builds(RooflineCost, st.just(MODELS["llama-3-70b"]), st.just(HARDWARE["h100"]), st.sampled_from([2, 8, 16])),
    st.builds(AffineCost, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
)  # fmt: skip


@pytest.mark.clause("SI-COST-2", "SI-COST-3")
@given(cost_models, decode_batches, st.integers(1, 40))
def test_a_stretch_equals_its_single_steps_to_the_last_bit(model: CostModel, batch: StepBatch, num_steps: int) -> None:
    times_s = model.stretch_times_s(batch, num_steps)
    assert times_s.dtype == np.float64
    single = [model.step_time_s(batch.after(step)) for step in range(num_steps)]
    assert [time.hex() for time in times_s.tolist()] == [float(time).hex() for time in single]


@pytest.mark.clause("SI-COST-2")
def test_after_moves_every_context() -> None:
    assert StepBatch.of((1, 1), (5, 9), 2).after(3) == StepBatch.of((1, 1), (8, 12), 2)


@pytest.mark.clause("SI-COST-3")
def test_affine_cost_by_hand() -> None:
    batch = StepBatch.of((3, 1), (0, 4), 2)
    assert AffineCost(step_s=10.0, token_s=0.5, sequence_s=0.25).step_time_s(batch) == 10.0 + 4 * 0.5 + 2 * 0.25


@pytest.mark.clause("SI-ROOFLINE-1")
def test_real_sheets_give_times_of_the_right_size() -> None:
    """Reading 8.03e9 weights of 2 bytes less the input table (0.53e9) at 80 % of 3.35 TB/s takes 5.6 ms; 2048 tokens
    through 6.98e9 linear weights at 70 % of 989.5 TFLOP/s take 41.3 ms and their attention 0.8 ms."""
    model = RooflineCost(find_model("llama-3-8b"), find_hardware("h100"), host_overhead_s=0.0)
    assert model.step_time_s(StepBatch.of((1,), (0,), 1)) == pytest.approx(5.6e-3, rel=0.01)
    assert model.step_time_s(StepBatch.of((2048,), (0,), 0)) == pytest.approx(42.8e-3, rel=0.02)


@pytest.mark.clause("SI-HARDWARE-1")
def test_unknown_hardware_lists_the_known() -> None:
    assert find_hardware("H100").name == "h100"
    with pytest.raises(NotFoundError, match="a100-80g, h100, h200"):
        find_hardware("tpu")
