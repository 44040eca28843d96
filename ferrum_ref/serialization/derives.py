"""What upstream's derive lists say and the classes themselves do not.  Clauses: TY-JSON-13..14 (specs/json.md).

A type that holds a tensor, a trait object or a callback has no form anyway; here are the plain ones that upstream does
not serialise either, and the few fields and variants whose form cannot be read off a Python class.
"""

from __future__ import annotations

import inspect
from types import MappingProxyType

# Plain data of `ferrum_ref.interfaces` without serde derives upstream.
CONTRACT_TYPES = frozenset({
    "TensorMemoryStats", "StreamHandle", "EventHandle", "MemoryTransfer", "MemoryHandleInfo", "MemoryAccessStats",
    "AllocationRequirements", "BestFitStrategy", "MemoryAccess", "KernelHandle", "KernelInfo", "KernelArg",
    "ScalarValue", "RoPEConfig", "AttentionParams", "SamplingParams", "KernelOpsDispatch", "QuantScheme",
    "TransformerConfig", "PrefillInput", "PrefillOutput", "DecodeInput", "DecodeOutput", "UnifiedBatch",
    "UnifiedBatchItem", "SpeculativeDecodeOutput", "CacheHandleStats", "AllocationRequest", "LruEvictionPolicy",
    "BatchHint", "BatchPlan", "ScheduledRequest", "AllocatedResources", "BatchResourceRequirements",
    "PreemptionResult", "PreemptionState", "QueueAnalysis", "WaitTimeDistribution", "RequestPatternAnalysis",
    "SeasonalityPattern", "BottleneckAnalysis", "SimulatedWorkload", "SchedulingSimulationResult",
    "AdmissionDecision", "RateTrend", "BottleneckType", "ArrivalPattern", "SizeDistribution", "SamplingContext",
    "LogitsProcessorChain", "TemperatureProcessor", "TopKProcessor", "TopPProcessor", "RepetitionPenaltyProcessor",
    "GreedySampler", "MultinomialSampler", "SamplingConfigBuilder", "SamplingConfig", "ProcessorPriority",
    "LlmRuntimeConfig", "TranscriptSegment", "AudioBuffer", "SpeakerRef", "EncoderState",
})  # fmt: skip
# The same of `ferrum_ref.types`.
DATA_TYPES = frozenset({"ScheduledRequest"})

# (record, field): monotonic times, which mean nothing in another process.
SKIPPED = frozenset({("ExecutorStatus", "last_operation")})

# (record): fields that upstream stores and the class here derives; they are written, and dropped when read.
DERIVED = MappingProxyType({"BlockTable": ("logical_to_physical",)})

# (enum, variant) around one unnamed value, whose form is that value's own.
TUPLE_VARIANTS = frozenset(
    {("ModelSource", "Local"), ("InitializationStrategy", "Custom"), ("PaddingStrategy", "MultipleOf")}
)

# (enum, name here): upstream's name, where that is a word of Python.
RENAMED = MappingProxyType({("PaddingStrategy", "NoPadding"): "None"})


def is_refused(kind: type) -> bool:
    """Upstream gives this type, or the enum it is a variant of, no serde derives.  [TY-JSON-13]"""
    for base in inspect.getmro(kind):
        if base.__module__.startswith("ferrum_ref.types") and base.__name__ in DATA_TYPES:
            return True
        if base.__module__.startswith("ferrum_ref.interfaces") and base.__name__ in CONTRACT_TYPES:
            return True
    return False


def variant_name(enum: str, name: str) -> str:
    """Upstream's name of the variant that is called `name` here."""
    return RENAMED.get((enum, name), name.rstrip("_"))
