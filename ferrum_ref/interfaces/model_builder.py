"""Building a model: from settings or from a source to a `ModelExecutor`, by way of a `ModelIR` where that is wanted.

Upstream: `ferrum_interfaces::model_builder` (0.7.0), whose one implementation ignores the weights and returns a stub.
Errors: ConfigError for bad settings or a graph that contradicts itself, NotFoundError for an unknown name,
UnsupportedError for what is not offered, FerrumTimeoutError past `build_timeout_seconds`, ModelError for weights that
do not fit.  Clauses: MB-* (specs/model_builder.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.model_builder_data import (
    BuilderCapabilities,
    BuilderInfo,
    BuildOptions,
    BuildPhase,
    BuildProgress,
    BuildTimeBreakdown,
    BuildTimeEstimate,
    BuildTimeFactor,
    ModelArchitecture,
    ModelArchitectureFamily,
    OptimizationResult,
    OptimizationStats,
    OptimizationTechnique,
    ValidationIssue,
    ValidationSeverity,
)
from ferrum_ref.interfaces.model_builder_ir import (
    ArchitectureDefinition,
    GraphDefinition,
    GraphEdge,
    GraphNode,
    InitializationStrategy,
    LayerDefinition,
    ModelDimensions,
    ModelIR,
    ModelMetadata,
    ParameterSpec,
    TensorSpec,
)

if TYPE_CHECKING:
    from ferrum_ref.interfaces.backend import ComputeBackend
    from ferrum_ref.interfaces.model_executor import ModelExecutor
    from ferrum_ref.interfaces.tensor import TensorRef
    from ferrum_ref.interfaces.weights import WeightLoader
    from ferrum_ref.types.ids import ModelId
    from ferrum_ref.types.models import ModelConfig, ModelInfo, ModelSource, ModelType

__all__ = [
    "AdvancedModelBuilder",
    "ArchitectureDefinition",
    "BuildOptions",
    "BuildPhase",
    "BuildProgress",
    "BuildTimeBreakdown",
    "BuildTimeEstimate",
    "BuildTimeFactor",
    "BuilderCapabilities",
    "BuilderInfo",
    "CustomLayer",
    "GraphDefinition",
    "GraphEdge",
    "GraphNode",
    "InitializationStrategy",
    "LayerDefinition",
    "ModelArchitecture",
    "ModelArchitectureFamily",
    "ModelBuilder",
    "ModelBuilderFactory",
    "ModelDimensions",
    "ModelIR",
    "ModelMetadata",
    "ModelRegistry",
    "OptimizationPass",
    "OptimizationResult",
    "OptimizationStats",
    "OptimizationTechnique",
    "ParameterSpec",
    "TensorSpec",
    "ValidationIssue",
    "ValidationSeverity",
]


class ModelBuilder(ABC):
    """Settings, a backend and a weight loader become a ModelExecutor.  [MB-BUILD-1..6]"""

    @abstractmethod
    async def build_model(
        self, config: ModelConfig, compute_backend: ComputeBackend, weight_loader: WeightLoader
    ) -> ModelExecutor:
        """From explicit settings; `config.model_path` says where the model lies.

        Raises ConfigError or UnsupportedError (settings), NotFoundError, ModelError (weights), FerrumIOError.
        """

    @abstractmethod
    async def build_from_source(
        self,
        source: ModelSource,
        compute_backend: ComputeBackend,
        weight_loader: WeightLoader,
        build_options: BuildOptions,
    ) -> ModelExecutor:
        """From a place: its configuration is read first. Raises as `build_model`; FerrumTimeoutError; NetworkError."""

    @abstractmethod
    def validate_config(self, config: ModelConfig) -> list[ValidationIssue]:
        """Every finding about the settings and the configuration they point at; empty means fine.  Never raises."""

    @abstractmethod
    def supported_model_types(self) -> list[ModelType]:
        """The families it can build. Pure."""

    @abstractmethod
    async def estimate_build_time(self, config: ModelConfig) -> BuildTimeEstimate:
        """How long building will take.  Raises as `build_model` does for settings."""

    @abstractmethod
    def builder_info(self) -> BuilderInfo:
        """Static facts. Pure."""


class CustomLayer(ABC):
    """A layer of the user's, put into a built model.  [MB-CUSTOM-1..5]

    Upstream gives a layer no way to compute. Here it computes by `forward` (extension), or, where that is not
    overridden, as the graph operation that `layer_type` names, with `config()` as its attributes.
    """

    @abstractmethod
    def name(self) -> str:
        """Its label, unique in the model."""

    @abstractmethod
    def layer_type(self) -> str:
        """Its kind."""

    @abstractmethod
    def input_shape(self) -> list[int]:
        """The shape it wants, -1 for any size; the first axis is the rows of a forward."""

    @abstractmethod
    def output_shape(self, input_shape: Sequence[int]) -> list[int]:
        """The shape it gives for an input; -1 passes a dynamic size on. Pure."""

    @abstractmethod
    def initialize_parameters(self) -> dict[str, TensorRef]:
        """Its parameters by name."""

    @abstractmethod
    def config(self) -> Any:
        """JSON settings; `{"after": "layers.0.hidden"}` says where it stands."""

    def forward(
        self, input: TensorRef, parameters: Mapping[str, TensorRef], compute_backend: ComputeBackend
    ) -> TensorRef:
        """Its function (extension): parameters are on the backend.  Raises UnsupportedError (this default body)."""
        raise UnsupportedError(
            f"CustomLayer {self.name()!r}: it has no forward, and {self.layer_type()!r} is no operation of the graph;"
            " override forward"
        )


class OptimizationPass(ABC):
    """A rewrite of a ModelIR that keeps what it computes.  [MB-PASS-1..3]"""

    @abstractmethod
    def name(self) -> str:
        """Its label; other passes depend on it by this."""

    @abstractmethod
    def apply(self, definition: ModelIR) -> OptimizationResult:
        """Rewrite `definition` in place and say what went.  Raises ConfigError for a graph that is none."""

    @abstractmethod
    def is_applicable(self, definition: ModelIR) -> bool:
        """True exactly when `apply` would change something. Pure."""

    @abstractmethod
    def dependencies(self) -> list[str]:
        """Names of passes that must run earlier. Pure."""


class AdvancedModelBuilder(ModelBuilder):
    """More ways to build."""

    @abstractmethod
    async def build_with_custom_layers(
        self,
        config: ModelConfig,
        custom_layers: list[CustomLayer],
        compute_backend: ComputeBackend,
        weight_loader: WeightLoader,
    ) -> ModelExecutor:
        """With the user's layers at their positions.  Raises ConfigError (position, shape), AlreadyExistsError."""

    @abstractmethod
    async def build_incremental(
        self,
        config: ModelConfig,
        compute_backend: ComputeBackend,
        weight_loader: WeightLoader,
        progress_callback: Callable[[BuildProgress], None],
    ) -> ModelExecutor:
        """Reporting progress, which never falls and ends at 1; an exception of the callback ends the build."""

    @abstractmethod
    async def build_with_optimization(
        self,
        config: ModelConfig,
        optimization_pipeline: list[OptimizationPass],
        compute_backend: ComputeBackend,
        weight_loader: WeightLoader,
    ) -> ModelExecutor:
        """From the IR, rewritten by the passes in the order of their dependencies.

        Raises ConfigError (a cycle, two passes of one name), NotFoundError (a dependency that is not in the pipeline).
        """

    @abstractmethod
    async def export_model_definition(self, config: ModelConfig) -> ModelIR:
        """The model as data.  Raises UnsupportedError for a model that the IR cannot express."""

    @abstractmethod
    async def import_model_definition(
        self, definition: ModelIR, compute_backend: ComputeBackend, weight_loader: WeightLoader
    ) -> ModelExecutor:
        """An executor that runs the graph.  Raises ConfigError, NotFoundError, UnsupportedError, ModelError."""


class ModelBuilderFactory(ABC):
    """Makes builders."""

    @abstractmethod
    async def create_builder(self) -> ModelBuilder:
        """The default builder."""

    @abstractmethod
    async def create_advanced_builder(self) -> AdvancedModelBuilder:
        """The builder with every way to build.  Raises UnsupportedError where there is none."""

    @abstractmethod
    def supported_types(self) -> list[ModelType]:
        """Families that can be built. Pure."""

    @abstractmethod
    async def create_builder_for_type(self, model_type: ModelType) -> ModelBuilder:
        """A builder for one family.  Raises UnsupportedError for a family that is not offered."""


class ModelRegistry(ABC):
    """Executors by model id.  [MB-REGISTRY-1..2]"""

    @abstractmethod
    def register_model(self, model_id: ModelId, executor: ModelExecutor) -> None:
        """Keep it.  Raises AlreadyExistsError for an id that is taken."""

    @abstractmethod
    def get_model(self, model_id: ModelId) -> ModelExecutor | None:
        """The executor, or None. Pure."""

    @abstractmethod
    def remove_model(self, model_id: ModelId) -> ModelExecutor | None:
        """Forget it and give it back; None if it is not there."""

    @abstractmethod
    def list_models(self) -> list[ModelId]:
        """Ids in the order of registration. Pure."""

    @abstractmethod
    def get_model_info(self, model_id: ModelId) -> ModelInfo | None:
        """The executor's own facts, or None. Pure."""

    @abstractmethod
    def contains_model(self, model_id: ModelId) -> bool:
        """Whether the id is taken. Pure."""
