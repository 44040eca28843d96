"""From a definition to a decoder that runs its graph: the parameters are computed by their recipes.

Clauses: MB-IMPORT-1..4, MB-INIT-4 (specs/model_builder.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ferrum_ref.builder.attributes import Attributes
from ferrum_ref.builder.export import IR_VERSION
from ferrum_ref.builder.graph import IrGraph
from ferrum_ref.builder.initialization import Initializer, initial_values
from ferrum_ref.builder.ir_decoder import IrDecoder, check_decoder_graph
from ferrum_ref.builder.operators import Runtime
from ferrum_ref.builder.places import ModelPlace
from ferrum_ref.builder.progress import BuildReporter
from ferrum_ref.builder.reading import StoredWeights, TensorReader, require_tensors
from ferrum_ref.builder.recipes import LoadTensor, evaluate, stored_tensors
from ferrum_ref.errors import ModelError, ResourceExhaustedError, UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.model_builder import BuildPhase, CustomLayer, InitializationStrategy, ModelIR
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.weights import QuantizationConfig, WeightLoader
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.types.devices import DataType

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class DecoderFromGraph:
    """A decoder, and how many numbers its trainable parameters hold."""

    decoder: IrDecoder
    num_parameters: int


@dataclass(slots=True)
class GraphBuild:
    """Builds the decoder of a definition; place None: every parameter is initialised by its strategy.

    config: the configuration whose tensors, no more and no less, must be at the place.
    """

    definition: ModelIR
    place: ModelPlace | None
    backend: ComputeBackend
    loader: WeightLoader
    reporter: BuildReporter
    config: DecoderConfig | None = None
    quantization: QuantizationConfig | None = None
    seed: int = 0
    initializers: Mapping[str, Initializer] = field(default_factory=dict)
    custom_layers: Mapping[str, CustomLayer] = field(default_factory=dict)
    custom_tensors: Mapping[str, TensorRef] = field(default_factory=dict)

    async def run(self) -> DecoderFromGraph:
        """Raises UnsupportedError (version, operation), ConfigError or NotFoundError (graph), ModelError (weights)."""
        require_version(self.definition)
        sizes = self.definition.architecture.dimensions
        head_dim = head_dim_of(self.definition)
        graph = IrGraph.read(self.definition)
        check_decoder_graph(graph, sizes, head_dim)
        self._require_layers(graph)
        self.reporter.report(BuildPhase.WeightLoading, "compute parameters")
        parameters = await self._parameters(graph)
        decoder = IrDecoder(graph, parameters, sizes, head_dim, self.backend, self.custom_layers)
        self.reporter.report(BuildPhase.LayerConstruction, f"{decoder.num_steps} operations", 1.0)
        return DecoderFromGraph(decoder, sum(math.prod(s.shape) for s in graph.parameters.values() if s.trainable))

    async def _parameters(self, graph: IrGraph) -> dict[str, TensorRef]:
        with memory_errors():
            if self.place is None:
                return await asyncio.to_thread(self._compute, graph, self._initialise)
            if self.place.gguf is not None:
                if self.quantization is not None:
                    raise UnsupportedError("build: quantization: a GGUF file's weights are read as it packs them")
                with open_checkpoint(self.place.gguf) as checkpoint:

                    def from_file(
                        name: str, shape: tuple[int, ...], dtype: DataType, _: InitializationStrategy
                    ) -> Array:
                        return _fitting(name, shape, checkpoint.read(name, _element(dtype)))

                    return await asyncio.to_thread(self._compute, graph, from_file)
            stored = await self.place.find_weights(self.loader)
            reader = self._reader(stored)

            def compute() -> dict[str, TensorRef]:
                if self.config is not None:
                    require_tensors(self.config, reader)
                return self._compute(graph, reader.load)

            return await asyncio.to_thread(compute)

    def _reader(self, stored: StoredWeights) -> TensorReader:
        loop = asyncio.get_running_loop()
        return TensorReader(stored, self.loader, loop, self.reporter.require_time, self.quantization)

    def _compute(self, graph: IrGraph, load: LoadTensor) -> dict[str, TensorRef]:
        """All parameters in this thread; a custom layer's own tensors need no loading."""
        runtime = Runtime(self.backend)
        layers = self._layer_tensors()

        def take(name: str, shape: tuple[int, ...], dtype: DataType, strategy: InitializationStrategy) -> Array:
            self.reporter.require_time()
            if name in layers:
                return _fitting(name, shape, np.asarray(layers[name].to_numpy()).astype(_element(dtype)))
            return load(name, shape, dtype, strategy)

        found: dict[str, TensorRef] = {}
        for number, (name, spec) in enumerate(graph.parameters.items()):
            found[name] = evaluate(spec, runtime, take)
            total = len(graph.parameters)
            self.reporter.report(BuildPhase.WeightLoading, f"parameter {name}", (number + 1) / total)
        return found

    def _layer_tensors(self) -> dict[str, TensorRef]:
        found = dict(self.custom_tensors)
        for name, layer in self.custom_layers.items():
            if any(full.startswith(f"{name}.") for full in found):
                continue
            found.update({f"{name}.{part}": tensor for part, tensor in layer.initialize_parameters().items()})
        return found

    def _initialise(
        self, name: str, shape: tuple[int, ...], dtype: DataType, strategy: InitializationStrategy
    ) -> Array:
        values = initial_values(strategy, name, shape, self.seed, self.initializers)
        return values.astype(_element(dtype))

    def _require_layers(self, graph: IrGraph) -> None:
        for node in graph.nodes.values():
            if node.operation == "custom" and node.config["layer"] not in self.custom_layers:
                raise UnsupportedError(
                    f"import_model_definition: custom layer {node.config['layer']!r:.80} is code, which a definition"
                    " does not carry; give the layer to the builder"
                )
        for spec in graph.parameters.values():
            stored_tensors(spec)


def require_version(definition: ModelIR) -> None:
    """Raises UnsupportedError for a definition of another version of the format.  [MB-IR-6]"""
    if definition.metadata.version != IR_VERSION:
        raise UnsupportedError(
            f"import_model_definition: version: got {definition.metadata.version!r:.80}, expected {IR_VERSION!r}"
        )


def head_dim_of(definition: ModelIR) -> int:
    """The head size, which the architecture's config says.  [MB-IR-7; D-21]  Raises ConfigError. Pure."""
    return Attributes("architecture config", definition.architecture.config).whole("head_dim", 1, 2**16)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Raises ResourceExhaustedError where Python runs out of memory."""
    try:
        yield
    except MemoryError:
        raise ResourceExhaustedError("build: the weights do not fit into memory; choose a narrower dtype") from None


def _fitting(name: str, shape: tuple[int, ...], values: Array) -> Array:
    if values.shape != shape:
        raise ModelError(f"read tensor {name!r:.200}: got shape {list(values.shape)}, expected {list(shape)}")
    return values


def _element(dtype: DataType) -> Any:
    return {DataType.FP16: np.float16, DataType.BF16: ml_dtypes.bfloat16}.get(dtype, np.float32)
