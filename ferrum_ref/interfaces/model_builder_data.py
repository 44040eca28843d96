"""What a model builder is told and what it tells: options, findings, progress, estimates, abilities.

Upstream: `ferrum_interfaces::model_builder`; `interfaces.model_builder` re-exports these names.
Clauses: MB-DATA-1..3 (specs/model_builder.md).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.weights_data import WeightFormat
from ferrum_ref.types.models import QuantizationConfig
from ferrum_ref.types.record import F32, U8, U64, Json, Record, Usize


class ValidationSeverity(enum.IntEnum):
    """How bad a finding is; ordered. A build goes on over warnings only.  [MB-DATA-2]"""

    Warning = 0
    Error = 1
    Critical = 2


class ModelArchitectureFamily(enum.Enum):
    """Broad family of a model."""

    Transformer = "Transformer"
    CNN = "CNN"
    RNN = "RNN"
    GNN = "GNN"
    Diffusion = "Diffusion"
    Custom = "Custom"


class OptimizationTechnique(enum.Enum):
    """Kinds of optimisation; the reference offers the first three and Quantization."""

    OperatorFusion = "OperatorFusion"
    ConstantFolding = "ConstantFolding"
    DeadCodeElimination = "DeadCodeElimination"
    MemoryLayoutOptimization = "MemoryLayoutOptimization"
    KernelSelection = "KernelSelection"
    Quantization = "Quantization"
    Pruning = "Pruning"
    Distillation = "Distillation"


class BuildPhase(enum.Enum):
    """Phases of a build, in this order.  [MB-DATA-2]"""

    Validation = "Validation"
    WeightLoading = "WeightLoading"
    ModelInitialization = "ModelInitialization"
    LayerConstruction = "LayerConstruction"
    ParameterBinding = "ParameterBinding"
    Optimization = "Optimization"
    FinalValidation = "FinalValidation"
    Finalization = "Finalization"


@dataclass(frozen=True, slots=True)
class BuildOptions(Record):
    """Switches of `build_from_source`; level 0..3, seconds or None without limit.  [MB-DATA-1, MB-OPTIONS-1..6]"""

    enable_validation: bool = True
    enable_optimization: bool = True
    optimization_level: U8 = 2
    enable_quantization: bool = False
    quantization_config: QuantizationConfig | None = None
    enable_compression: bool = False
    build_timeout_seconds: U64 | None = 3600
    additional_options: dict[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ValidationIssue(Record):
    """One finding; `config_path` is where it lies: `$.num_key_value_heads`, `ModelConfig.model_path`."""

    severity: ValidationSeverity
    category: str
    description: str
    suggested_fix: str | None
    config_path: str


@dataclass(frozen=True, slots=True)
class BuildTimeBreakdown(Record):
    """Expected seconds of each part."""

    weight_loading_seconds: U64
    model_init_seconds: U64
    optimization_seconds: U64
    validation_seconds: U64
    overhead_seconds: U64


@dataclass(frozen=True, slots=True)
class BuildTimeFactor(Record):
    """A multiplier that was applied; 1.0 is neutral."""

    factor: str
    impact: F32
    description: str


@dataclass(frozen=True, slots=True)
class BuildTimeEstimate(Record):
    """Seconds a build will take: min <= expected <= max, the breakdown sums to expected.  [MB-ESTIMATE-1..3]"""

    min_time_seconds: U64
    max_time_seconds: U64
    expected_time_seconds: U64
    time_breakdown: BuildTimeBreakdown
    factors: list[BuildTimeFactor]


@dataclass(frozen=True, slots=True)
class ModelArchitecture(Record):
    """An architecture a builder knows."""

    name: str
    family: ModelArchitectureFamily
    variants: list[str]
    required_features: list[str]


@dataclass(frozen=True, slots=True)
class BuilderCapabilities(Record):
    """Limits of a builder; `max_model_size` in parameters, None without limit."""

    max_model_size: U64 | None
    supports_dynamic_shapes: bool
    supports_custom_ops: bool
    supports_mixed_precision: bool
    supports_model_parallelism: bool
    supports_parallel_build: bool
    supports_incremental_build: bool


@dataclass(frozen=True, slots=True)
class BuilderInfo(Record):
    """Static facts about a builder."""

    name: str
    version: str
    supported_architectures: list[ModelArchitecture]
    supported_weight_formats: list[WeightFormat]
    supported_optimizations: list[OptimizationTechnique]
    capabilities: BuilderCapabilities


@dataclass(frozen=True, slots=True)
class BuildProgress(Record):
    """One report of a build; `progress` is a fraction of the whole build.  [MB-DATA-3, MB-PROGRESS-1..3]

    Raises InvalidParameterError unless 0 <= progress <= 1 (upstream's comment calls it a percentage).
    """

    phase: BuildPhase
    progress: F32
    current_operation: str
    elapsed_seconds: U64
    remaining_seconds: U64 | None
    phase_details: dict[str, Json]

    def __post_init__(self) -> None:
        Record.__post_init__(self)
        if not 0.0 <= self.progress <= 1.0:
            raise InvalidParameterError(f"BuildProgress: progress must be a fraction in [0, 1], got {self.progress}")


@dataclass(frozen=True, slots=True)
class OptimizationStats(Record):
    """What a pass removed: parameters (elements), nodes of the graph, bytes of parameters; speed-up 1.0 = none."""

    parameters_eliminated: U64
    operations_eliminated: Usize
    memory_saved: U64
    estimated_speedup: F32


@dataclass(frozen=True, slots=True)
class OptimizationResult(Record):
    """Outcome of a pass; `applied` says whether it changed anything.  [MB-PASS-1..2]"""

    applied: bool
    stats: OptimizationStats
    warnings: list[str]
