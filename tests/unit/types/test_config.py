"""Settings: upstream's defaults, and what a record refuses."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import pytest

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.types import config as c
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import ModelId
from ferrum_ref.types.models import TokenUsage
from ferrum_ref.types.sampling import SamplingParams


@pytest.mark.clause("TY-CONFIG-1")
def test_defaults_are_upstreams() -> None:
    engine = c.EngineConfig()
    assert [f.name for f in dataclasses.fields(engine)] == [
        "model", "scheduler", "sampling", "backend", "kv_cache", "memory", "batching", "monitoring",
    ]  # fmt: skip
    assert dataclasses.astuple(engine.scheduler) == (c.SchedulingPolicy.Priority, 1000, 256, True, False, {}, False)
    assert dataclasses.astuple(engine.kv_cache) == (
        c.KvCacheType.Contiguous, 16, 1024, False, 0.5, True, 0.8, True, 100,
    )  # fmt: skip
    assert dataclasses.astuple(engine.memory) == (None, True, 256, False, 0.7, True, 0.8, 0.95)
    assert dataclasses.astuple(engine.batching) == (16, 8, True, False)
    assert dataclasses.astuple(engine.monitoring) == (True, True, timedelta(seconds=5))
    assert (engine.backend.device, engine.backend.dtype) == (Device.CPU, DataType.FP16)
    assert (engine.backend.backend_type, engine.backend.optimization_level) == (c.BackendType.Candle, 2)
    assert engine.model.model_id == ModelId("default")
    assert engine.model.tokenizer == c.TokenizerConfig(c.TokenizerType.BPE, None, True, True, None, None)
    assert dataclasses.astuple(c.SecurityConfig()) == (False, [], True, 60, False, 32768, True, ["txt", "json"])
    for needy in (c.TruncationConfig, c.PaddingConfig):
        with pytest.raises(TypeError):
            needy()  # type: ignore[call-arg]


@pytest.mark.clause("TY-RECORD-1")
@pytest.mark.parametrize(
    ("record", "field", "value"),
    [
        (c.KvCacheConfig, "block_size", -1),
        (c.KvCacheConfig, "max_blocks", 2**64),
        (c.BackendConfig, "optimization_level", 256),
        (c.SecurityConfig, "rate_limit_rpm", 2**32),
        (c.SchedulerConfig, "max_waiting_requests", 1.5),
        (c.MemoryConfig, "pool_size", -3),
        (SamplingParams, "top_k", -1),
        (SamplingParams, "seed", -1),
    ],
)
def test_unsigned_fields_refuse_what_does_not_fit(record: type, field: str, value: object) -> None:
    with pytest.raises(InvalidParameterError, match=f"{record.__name__}: {field}"):
        record(**{field: value})


@pytest.mark.clause("TY-RECORD-1")
def test_the_largest_values_and_none_pass() -> None:
    assert c.MemoryConfig(pool_size=2**64 - 1).pool_size == 2**64 - 1
    assert c.MemoryConfig(pool_size=None).pool_size is None
    assert c.BackendConfig(optimization_level=255).optimization_level == 255


@pytest.mark.clause("TY-RECORD-2")
def test_records_are_frozen_and_slotted_and_share_no_defaults() -> None:
    config = c.SchedulerConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.enable_preemption = False  # type: ignore[misc]
    assert not hasattr(config, "__dict__")
    assert config.fair_share_weights is not c.SchedulerConfig().fair_share_weights
    assert SamplingParams().stop_sequences is not SamplingParams().stop_sequences
    usage = TokenUsage.new(1, 2)
    usage.prompt_tokens = 5
    with pytest.raises(AttributeError):
        usage.another = 1  # type: ignore[attr-defined]


@pytest.mark.clause("TY-CONFIG-2")
def test_a_setting_that_makes_no_sense_is_still_a_record() -> None:
    assert c.KvCacheConfig(block_size=0, swap_threshold=7.0).block_size == 0
