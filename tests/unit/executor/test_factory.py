"""Executors from settings, and the registry."""

from __future__ import annotations

import dataclasses
import tracemalloc
from typing import Any

import numpy as np
import pytest

from ferrum_ref.assembly import LoadedModel, new_executor_factory
from ferrum_ref.errors import AlreadyExistsError, ConfigError, ResourceExhaustedError, UnsupportedError
from ferrum_ref.executor.batch import PagedBatchExecutor
from ferrum_ref.executor.factory import ConfiguredExecutorFactory, plan_executor
from ferrum_ref.executor.paged import PagedModelExecutor
from ferrum_ref.executor.registry import NamedExecutors
from ferrum_ref.executor.speculative import PagedSpeculativeExecutor
from ferrum_ref.interfaces.model_executor import (
    AttentionType,
    ExecutorAttentionConfig,
    ExecutorConfig,
    ExecutorMemoryConfig,
    ExecutorMetrics,
    ExecutorType,
    MeasuredExecutor,
    OptimizationConfig,
    PrefillInput,
)
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.models import ModelInfo


@pytest.fixture
def config(judge7: Any) -> ExecutorConfig:
    return ExecutorConfig(
        model_info=judge7.loaded.info,
        device=Device.CPU,
        dtype=DataType.FP32,
        max_batch_size=3,
        max_sequence_length=50,
        attention_config=ExecutorAttentionConfig(AttentionType.GroupedQuery, False, True, 8, None),
        memory_config=ExecutorMemoryConfig(True, None, True, 1.0),
        optimization_config=OptimizationConfig(False, True, False, 2, {"verbose": False}),
        executor_options={},
    )


@pytest.fixture
def factory(judge7: Any) -> ConfiguredExecutorFactory:
    return new_executor_factory(lambda config: judge7.loaded, judge7.loaded.backend)


def changed(config: ExecutorConfig, path: str, value: Any) -> ExecutorConfig:
    owner, _, name = path.rpartition(".")
    if not owner:
        return dataclasses.replace(config, **{name: value})
    return dataclasses.replace(config, **{owner: dataclasses.replace(getattr(config, owner), **{name: value})})


@pytest.mark.clause("MX-FACTORY-1", "MX-FACTORY-5", "MX-CONFIG-2", "MX-STATUS-5")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (None, PagedModelExecutor),
        ("Sequential", PagedModelExecutor),
        ("Batch", PagedBatchExecutor),
        ("ContinuousBatch", PagedBatchExecutor),
        ("Speculative", PagedSpeculativeExecutor),
    ],
)
def test_each_kind_is_built_and_runs(
    judge7: Any, factory: Any, config: ExecutorConfig, run: Any, tensor: Any, name: str | None, kind: type
) -> None:
    asked = config if name is None else changed(config, "executor_options", {"executor_type": name})
    executor = run(factory.create_executor(asked))
    assert type(executor) is kind
    capabilities = executor.capabilities()
    assert (capabilities.max_batch_size, capabilities.max_sequence_length) == (3, 50)
    assert executor.info().max_sequence_length == 50
    assert capabilities.supports_speculative_decoding == (kind is PagedSpeculativeExecutor)
    assert not capabilities.supports_tensor_parallelism
    assert not capabilities.supports_pipeline_parallelism
    assert capabilities.attention_mechanisms[:2] == [AttentionType.GroupedQuery, AttentionType.Paged]
    output = run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:50]))))
    assert judge7.right(output.last_token_logits().to_numpy(), judge7.ids[:50])
    with pytest.raises(ResourceExhaustedError, match="context of 50"):
        run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:51]))))
    assert executor.status().memory_usage.allocated_bytes == 3 * 7 * 8 * 2 * 3 * 2 * 8 * 4


@pytest.mark.clause("MX-FACTORY-1")
def test_the_batch_flavour(factory: Any, config: ExecutorConfig, run: Any) -> None:
    for name in (None, "Batch", "ContinuousBatch"):
        asked = config if name is None else changed(config, "executor_options", {"executor_type": name})
        executor = run(factory.create_batch_executor(asked))
        assert executor.supports_batch_size(3)
        assert not executor.supports_batch_size(4)
    for name in ("Sequential", "Speculative"):
        with pytest.raises(UnsupportedError, match=f"{name} has no batch flavour"):
            run(factory.create_batch_executor(changed(config, "executor_options", {"executor_type": name})))
    assert factory.supported_types() == [
        ExecutorType.Sequential, ExecutorType.Batch, ExecutorType.ContinuousBatch, ExecutorType.Speculative
    ]  # fmt: skip


BAD: list[tuple[str, Any, str]] = [
    ("max_batch_size", 0, "max_batch_size is 0, expected >= 1"),
    ("max_sequence_length", 0, "max_sequence_length is 0, expected 1 to 96"),
    ("max_sequence_length", 97, "max_sequence_length is 97"),
    ("attention_config.block_size", 0, "block_size is 0"),
    ("memory_config.memory_pool_size", 0, "memory_pool_size is 0"),
    ("memory_config.max_memory_usage", 0.0, "max_memory_usage is 0.0, expected a fraction"),
    ("memory_config.max_memory_usage", 1.01, "max_memory_usage is 1.01"),
    ("memory_config.max_memory_usage", float("nan"), "max_memory_usage is nan"),
    ("optimization_config.optimization_level", 4, "optimization_level is 4, expected 0 to 3"),
    ("attention_config.attention_type", AttentionType.MultiHead, "4 heads over 2 K/V heads are GroupedQuery"),
    ("attention_config.attention_type", AttentionType.SlidingWindow, "sliding_window_size goes with"),
    ("attention_config.sliding_window_size", 8, "sliding_window_size goes with"),
    ("executor_options", {"executor_type": "Fast"}, "executor_type is 'Fast'; expected one of Sequential"),
    ("executor_options", {"threads": 2}, r"unknown executor_options \['threads'\]"),
]
NOT_OFFERED: list[tuple[str, Any, str]] = [
    ("device", Device.CUDA(0), "device cuda:0"),
    ("dtype", DataType.INT8, "dtype INT8"),
    ("optimization_config.enable_cuda_graphs", True, "enable_cuda_graphs"),
    ("optimization_config.enable_mixed_precision", True, "enable_mixed_precision"),
    ("optimization_config.custom_flags", {"turbo": True}, "turbo"),
    ("executor_options", {"executor_type": "TensorParallel"}, "TensorParallel is not offered"),
    ("executor_options", {"executor_type": "PipelineParallel"}, "PipelineParallel is not offered"),
]


@pytest.mark.clause("MX-FACTORY-2", "MX-CONFIG-2")
@pytest.mark.parametrize(("path", "value", "text"), BAD)
def test_bad_settings_are_named(
    factory: Any, config: ExecutorConfig, run: Any, path: str, value: Any, text: str
) -> None:
    factory.validate_config(config)
    for call in (factory.create_executor, factory.create_batch_executor):
        with pytest.raises(ConfigError, match=text):
            run(call(changed(config, path, value)))
    with pytest.raises(ConfigError, match=text):
        factory.validate_config(changed(config, path, value))


@pytest.mark.clause("MX-FACTORY-2")
def test_settings_that_contradict_each_other(factory: Any, config: ExecutorConfig) -> None:
    unpooled = changed(
        changed(config, "memory_config.enable_memory_pooling", False), "memory_config.memory_pool_size", 9
    )
    with pytest.raises(ConfigError, match="needs enable_memory_pooling"):
        factory.validate_config(unpooled)
    factory.validate_config(changed(config, "memory_config.enable_memory_pooling", False))
    paged = changed(config, "attention_config.attention_type", AttentionType.Paged)
    factory.validate_config(paged)
    with pytest.raises(ConfigError, match="enable_paged_attention is False"):
        factory.validate_config(changed(paged, "attention_config.enable_paged_attention", False))


@pytest.mark.clause("MX-FACTORY-3", "MX-FACTORY-1")
@pytest.mark.parametrize(("path", "value", "text"), NOT_OFFERED)
def test_what_is_not_offered_is_named(factory: Any, config: ExecutorConfig, path: str, value: Any, text: str) -> None:
    with pytest.raises(UnsupportedError, match=text):
        factory.validate_config(changed(config, path, value))


@pytest.mark.clause("MX-FACTORY-3")
def test_offers_depend_on_the_backend(judge7: Any, config: ExecutorConfig, run: Any) -> None:
    plain = dataclasses.replace(judge7.loaded.backend.capabilities(), supports_flash_attention=False)
    factory = ConfiguredExecutorFactory(
        lambda config, kind: judge7.loaded.new_executor(4)[0], plain, has_fused_kernels=False
    )
    with pytest.raises(UnsupportedError, match="enable_kernel_fusion"):
        factory.validate_config(config)
    modest = changed(config, "optimization_config.enable_kernel_fusion", False)
    factory.validate_config(modest)
    factory.validate_config(changed(modest, "attention_config.enable_flash_attention", True))  # use it if available
    with pytest.raises(UnsupportedError, match="Flash"):
        factory.validate_config(changed(modest, "attention_config.attention_type", AttentionType.Flash))
    half = changed(changed(modest, "dtype", DataType.BF16), "optimization_config.enable_mixed_precision", True)
    factory.validate_config(half)
    window = changed(
        config, "attention_config", ExecutorAttentionConfig(AttentionType.SlidingWindow, False, True, 8, 4)
    )
    real = new_executor_factory(lambda config: judge7.loaded, judge7.loaded.backend)
    with pytest.raises(UnsupportedError, match="no sliding window of 4"):
        run(real.create_executor(window))


@pytest.mark.clause("MX-FACTORY-4")
def test_blocks_follow_from_memory_and_limits(config: ExecutorConfig) -> None:
    """384 bytes a token, blocks of 8: 3,072 bytes; 3 sequences of 50 tokens need 3 * 7 = 21 of them."""
    kind = ExecutorType.Batch
    plan = plan_executor(config, kind, 384)
    assert (plan.num_blocks, plan.block_size, plan.max_tokens, plan.max_batch_size) == (21, 8, 50, 3)
    assert plan.enable_prefix_caching
    pool = changed(config, "memory_config.memory_pool_size", 10 * 3072 + 5)
    assert plan_executor(pool, kind, 384).num_blocks == 10
    assert plan_executor(changed(pool, "memory_config.max_memory_usage", 0.5), kind, 384).num_blocks == 5
    assert plan_executor(changed(config, "memory_config.max_memory_usage", 0.5), kind, 384).num_blocks == 10
    large = changed(config, "memory_config.memory_pool_size", 2**40)
    assert plan_executor(large, kind, 384).num_blocks == 21
    whole = plan_executor(changed(config, "attention_config.enable_paged_attention", False), kind, 384)
    assert (whole.num_blocks, whole.block_size) == (3, 50)
    assert plan_executor(changed(config, "attention_config.block_size", None), kind, 384).block_size == 16
    unshared = changed(config, "memory_config.enable_kv_cache_sharing", False)
    assert not plan_executor(unshared, kind, 384).enable_prefix_caching
    with pytest.raises(ResourceExhaustedError, match="one block of 8 tokens takes 3072"):
        plan_executor(changed(config, "memory_config.memory_pool_size", 3071), kind, 384)


@pytest.mark.clause("MX-FACTORY-4", "MX-FACTORY-5")
def test_without_paging_a_sequence_is_one_block(
    judge7: Any, factory: Any, config: ExecutorConfig, run: Any, tensor: Any
) -> None:
    executor = run(factory.create_executor(changed(config, "attention_config.enable_paged_attention", False)))
    output = run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:40]))))
    assert judge7.right(output.last_token_logits().to_numpy(), judge7.ids[:40])
    assert output.kv_cache.block_table().num_blocks() == 1


@pytest.mark.clause("MX-FACTORY-5")
def test_another_model_than_the_settings_describe(judge7: Any, factory: Any, config: ExecutorConfig, run: Any) -> None:
    info: ModelInfo = judge7.loaded.info
    for name, value in (("hidden_size", 64), ("num_layers", 2), ("vocab_size", 98), ("num_heads", 2)):
        other = changed(config, "model_info", dataclasses.replace(info, **{name: value}))
        if name == "num_heads":
            other = changed(other, "attention_config.attention_type", AttentionType.Paged)
        with pytest.raises(ConfigError, match=f"{name} is {value}, but the model that was loaded has"):
            run(factory.create_executor(other))
    with pytest.raises(ConfigError, match="dtype is"):
        run(factory.create_executor(changed(config, "dtype", DataType.BF16)))


@pytest.mark.clause("MX-CONFIG-1")
def test_settings_travel_as_json(config: ExecutorConfig) -> None:
    from ferrum_ref.errors import InvalidParameterError
    from ferrum_ref.serialization import from_json, to_json

    text = to_json(config)
    assert from_json(ExecutorConfig, text) == config
    assert '"attention_config":{"attention_type":"GroupedQuery","enable_flash_attention":false,' in text
    metrics = ExecutorMetrics(2, 1, 1, 1.5, 2.5, 3.5, 4.5, 100.0, 0.5, 0.25)
    assert from_json(ExecutorMetrics, to_json(metrics)) == metrics
    with pytest.raises(InvalidParameterError, match="max_batch_size"):
        changed(config, "max_batch_size", -1)
    with pytest.raises(InvalidParameterError, match="optimization_level"):
        changed(config, "optimization_config.optimization_level", 256)


@pytest.mark.clause("MX-REGISTRY-1")
def test_executors_by_name(judge7: Any, run: Any, tensor: Any) -> None:
    registry = NamedExecutors()
    first, second = (judge7.loaded.new_executor(4, 4)[0] for _ in range(2))
    registry.register("b", first)
    registry.register("a", second)
    with pytest.raises(AlreadyExistsError, match="'a' is taken"):
        registry.register("a", first)
    assert registry.list_names() == ["b", "a"]
    assert registry.get("a") is second
    assert registry.get("c") is registry.remove("c") is registry.get_metrics("c") is None
    assert isinstance(first, MeasuredExecutor)
    run(first.prefill(PrefillInput.new(tensor([1, 2, 3]))))
    metrics = registry.get_metrics("b")
    assert metrics is not None
    assert (metrics.prefill_operations, metrics.memory_efficiency) == (1, 0.25)
    assert registry.remove("b") is first
    assert registry.list_names() == ["a"]

    class Silent:
        pass

    registry.register("silent", Silent())  # type: ignore[arg-type]
    assert registry.get_metrics("silent") is None


@pytest.mark.clause("MX-STATUS-4")
def test_capacity_and_cache_figures(judge7: Any, run: Any, tensor: Any) -> None:
    small, manager = judge7.loaded.new_executor(5, 4)
    assert small.kv_capacity() == 20
    assert judge7.loaded.new_executor(24, 4)[0].kv_capacity() is None
    run(small.prefill(PrefillInput.new(tensor([1] * 9))))
    snapshot = small.cache_metrics_snapshot()
    assert (snapshot["total_blocks"], snapshot["free_blocks"], snapshot["active_caches"]) == (5, 2, 1)
    assert snapshot["used_memory_bytes"] == manager.stats().used_memory_bytes
    bare = PagedModelExecutor(judge7.loaded.decoder, small._storage, small._factory, small.info(), small.capabilities())
    assert bare.cache_metrics_snapshot() is None


@pytest.mark.clause("MX-STATUS-5")
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 256, "intermediate_size": 688, "num_heads": 8, "num_kv_heads": 2, "head_dim": 32},
        {"hidden_size": 64, "intermediate_size": 96, "num_heads": 8, "num_kv_heads": 8, "head_dim": 32},
    ],
)
def test_memory_requirements_tell_the_truth(load_tiny: Any, run: Any, tensor: Any, sizes: dict[str, int]) -> None:
    loaded: LoadedModel = load_tiny(1, max_position_embeddings=1024, num_layers=2, **sizes)
    executor, _ = loaded.new_executor(64, 16, max_batch_size=2)
    memory = executor.capabilities().memory_requirements
    weights = loaded.decoder.weights
    held = sum(t.to_numpy().nbytes for layer in weights.layers for t in (layer.qkv, layer.output, layer.gate_up,
               layer.down, layer.attention_norm, layer.ffn_norm))  # fmt: skip
    held += sum(t.to_numpy().nbytes for t in (weights.embedding, weights.final_norm, weights.lm_head))
    assert memory.parameter_memory == held
    assert memory.kv_cache_memory_per_token * 2 * 1024 == executor.status().memory_usage.allocated_bytes
    prompt = PrefillInput.new(tensor(np.zeros(512))).with_last_only()
    run(executor.prefill(prompt))
    tracemalloc.start()
    try:
        run(executor.prefill(prompt))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    claimed = 512 * memory.activation_memory_per_token
    assert claimed / 2 <= peak <= claimed
