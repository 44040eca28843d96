"""The names of upstream's crate root, and which of two it means."""

import dataclasses

import pytest

import ferrum_ref
from ferrum_ref import interfaces, types
from ferrum_ref.interfaces import backend, kernel_ops, sampler, scheduler, tokenizer

# "Crate-root map" of the upstream documentation, as far as the contracts exist here.
CONTRACTS = """\
BackendCapabilities ComputeBackend WeightLoader DecodeBackend InferenceEngine AllocationRequest BlockTable
CacheHandleStats KvCacheHandle KvCacheManager DeviceMemoryManager MemoryHandle StreamHandle BuildOptions
ModelBuilder DecodeInput DecodeOutput ModelExecutor PrefillInput PrefillOutput LogitsProcessor Sampler
SamplingConfig SamplingContext BatchHint BatchPlan SchedulerInterface TensorFactory TensorLike TensorOps
TensorRef IncrementalTokenizer Tokenizer TokenizerInfo TransformerConfig TransformerWeights ActivationOps
AttentionOps AttentionParams KernelOps KernelOpsDispatch LinearOps NormOps PositionOps QuantScheme RoPEConfig
SamplingOps KernelSamplingParams"""
DATA = """\
BackendConfig BatchId ClientId ComponentHealth ComponentStatus EngineConfig EngineMetrics EngineStatus
HealthStatus InferenceRequest InferenceResponse MemoryUsage ModelId ModelInfo RequestId SamplingParams
SchedulerConfig SchedulerStats SessionId SpecialTokens StreamChunk TaskId TokenId TokenizerConfig DataType
Device FerrumError FinishReason ModelSource ModelType Priority BlockId Result"""


@pytest.mark.clause("TY-ROOT-1")
def test_the_root_has_upstreams_names() -> None:
    missing = [name for name in (CONTRACTS + "\n" + DATA).split() if name not in vars(ferrum_ref)]
    assert not missing
    assert sorted(ferrum_ref.__all__) == sorted([*(CONTRACTS + "\n" + DATA).split(), "__version__"])
    assert interfaces.__name__ == "ferrum_ref.interfaces"
    assert ferrum_ref.SchedulerInterface is scheduler.Scheduler


@pytest.mark.clause("TY-ROOT-2")
def test_of_two_definitions_the_root_has_upstreams_choice() -> None:
    assert ferrum_ref.SamplingConfig is sampler.SamplingConfig
    assert ferrum_ref.SamplingConfig is not types.SamplingConfig
    assert ferrum_ref.BackendConfig is types.BackendConfig
    assert ferrum_ref.BackendConfig is not backend.BackendConfig
    assert ferrum_ref.TokenizerConfig is types.TokenizerConfig
    assert ferrum_ref.TokenizerConfig is not getattr(tokenizer, "TokenizerConfig", None)
    assert ferrum_ref.KernelSamplingParams is kernel_ops.SamplingParams
    assert len(dataclasses.fields(ferrum_ref.SamplingParams)) == 14
    assert len(dataclasses.fields(ferrum_ref.KernelSamplingParams)) == 7
