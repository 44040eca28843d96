"""`ModelIR`: a model as data, that is its parameters, its layers and the graph that joins them.

Upstream: `ferrum_interfaces::model_builder`; `interfaces.model_builder` re-exports these names. What the operations of
a graph mean is written in specs/model_builder.md.  Clauses: MB-IR-1..8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ferrum_ref.interfaces.model_builder_data import ModelArchitectureFamily
from ferrum_ref.types.devices import DataType
from ferrum_ref.types.models import ModelType
from ferrum_ref.types.record import F32, Json, Record, Usize


class InitializationStrategy(Record):
    """How a parameter without a stored value is filled.  [MB-INIT-1..4]

    `.Zeros`, `.Ones`, `.Uniform(min, max)`, `.Normal(mean, std)`, `.Xavier`, `.Kaiming`, `.Custom(name)`.
    """

    __slots__ = ()
    Zeros: ClassVar[InitializationStrategy]
    Ones: ClassVar[InitializationStrategy]
    Uniform: ClassVar[type[UniformInitialization]]
    Normal: ClassVar[type[NormalInitialization]]
    Xavier: ClassVar[InitializationStrategy]
    Kaiming: ClassVar[InitializationStrategy]
    Custom: ClassVar[type[CustomInitialization]]


@dataclass(frozen=True, slots=True)
class ZerosInitialization(InitializationStrategy):
    """All 0."""


@dataclass(frozen=True, slots=True)
class OnesInitialization(InitializationStrategy):
    """All 1."""


@dataclass(frozen=True, slots=True)
class UniformInitialization(InitializationStrategy):
    """Independent draws from U[min, max)."""

    min: F32
    max: F32


@dataclass(frozen=True, slots=True)
class NormalInitialization(InitializationStrategy):
    """Independent draws from N(mean, std)."""

    mean: F32
    std: F32


@dataclass(frozen=True, slots=True)
class XavierInitialization(InitializationStrategy):
    """Glorot: U[-a, a), a = sqrt(6 / (fan_in + fan_out)); gain 1."""


@dataclass(frozen=True, slots=True)
class KaimingInitialization(InitializationStrategy):
    """He: U[-a, a), a = sqrt(6 / fan_in); that is gain sqrt(2)."""


@dataclass(frozen=True, slots=True)
class CustomInitialization(InitializationStrategy):
    """A rule by name, which the builder must have been given."""

    name: str


InitializationStrategy.Zeros = ZerosInitialization()
InitializationStrategy.Ones = OnesInitialization()
InitializationStrategy.Uniform = UniformInitialization
InitializationStrategy.Normal = NormalInitialization
InitializationStrategy.Xavier = XavierInitialization()
InitializationStrategy.Kaiming = KaimingInitialization()
InitializationStrategy.Custom = CustomInitialization


@dataclass(frozen=True, slots=True)
class ModelMetadata(Record):
    """What a model is; `version` is that of the IR's format.  [MB-IR-6]"""

    name: str
    version: str
    model_type: ModelType
    architecture_family: ModelArchitectureFamily
    description: str | None
    author: str | None
    license: str | None
    additional: dict[str, Json]


@dataclass(frozen=True, slots=True)
class ModelDimensions(Record):
    """Sizes; num_kv_heads None means num_heads. The head size stands in the architecture's config (D-21)."""

    vocab_size: Usize
    hidden_size: Usize
    num_layers: Usize
    num_heads: Usize
    num_kv_heads: Usize | None
    intermediate_size: Usize | None
    max_sequence_length: Usize


@dataclass(frozen=True, slots=True)
class ArchitectureDefinition(Record):
    """Name, sizes and settings of an architecture."""

    name: str
    dimensions: ModelDimensions
    config: dict[str, Json]


@dataclass(frozen=True, slots=True)
class ParameterSpec(Record):
    """One parameter: a tensor of the checkpoint of that name, or what `metadata["recipe"]` computes.  [MB-IR-3]"""

    name: str
    shape: list[int]
    dtype: DataType
    trainable: bool
    initialization: InitializationStrategy
    metadata: dict[str, Json]


@dataclass(frozen=True, slots=True)
class TensorSpec(Record):
    """A tensor of the graph, -1 for a dynamic dim; `interfaces.backend` has another TensorSpec (D-30)."""

    name: str
    shape: list[int]
    dtype: DataType


@dataclass(frozen=True, slots=True)
class LayerDefinition(Record):
    """An operation: `layer_type` names it, `config` holds its attributes, `parameters` its constant operands."""

    name: str
    layer_type: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    parameters: list[str]
    config: dict[str, Json]


@dataclass(frozen=True, slots=True)
class GraphNode(Record):
    """A place in the graph where a layer runs."""

    id: str
    layer_name: str
    metadata: dict[str, Json]


@dataclass(frozen=True, slots=True)
class GraphEdge(Record):
    """Output slot `source_output` of `source` is input slot `target_input` of `target`; None means 0."""

    source: str
    target: str
    source_output: Usize | None
    target_input: Usize | None


@dataclass(frozen=True, slots=True)
class GraphDefinition(Record):
    """Entry nodes, exit nodes, nodes and edges."""

    inputs: list[str]
    outputs: list[str]
    nodes: list[GraphNode]
    edges: list[GraphEdge]


@dataclass(slots=True)
class ModelIR(Record):
    """A portable model description; passes rewrite it in place.  [MB-IR-1..8]"""

    metadata: ModelMetadata
    architecture: ArchitectureDefinition
    parameters: list[ParameterSpec]
    layers: list[LayerDefinition]
    graph: GraphDefinition
