"""DecoderModelBuilder: decoders of the models room, or graphs of them, as executors.

    builder = DecoderModelBuilder()
    executor = await builder.build_model(ModelConfig.new("tiny", "/models/tiny"), backend, loader)

Clauses: MB-* (specs/model_builder.md).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ferrum_ref.builder.attributes import Attributes
from ferrum_ref.builder.build import Build, BuildTools
from ferrum_ref.builder.configuration import model_type_of
from ferrum_ref.builder.estimate import RateMeter, SamplingMeter, Workload, estimate
from ferrum_ref.builder.families import builder_info, supported_model_types
from ferrum_ref.builder.graph_build import head_dim_of
from ferrum_ref.builder.initialization import Initializer
from ferrum_ref.builder.origin import context_tokens, export_model, read_decoder_config
from ferrum_ref.builder.places import WEIGHT_FILES, ModelPlace, place_of
from ferrum_ref.builder.progress import BuildReporter
from ferrum_ref.builder.settings import BLOCK_SIZE_TOKENS, BuildSettings
from ferrum_ref.builder.validation import find_issues, require_sound
from ferrum_ref.builder.wiring import Blueprint, make_executor, try_out
from ferrum_ref.errors import ConfigError, NotFoundError, SerializationError
from ferrum_ref.executor.paged import PagedModelExecutor
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.model_builder import (
    AdvancedModelBuilder,
    BuilderInfo,
    BuildOptions,
    BuildProgress,
    BuildTimeEstimate,
    CustomLayer,
    ModelIR,
    OptimizationPass,
    ValidationIssue,
)
from ferrum_ref.interfaces.weights import WeightLoader
from ferrum_ref.models.tensor_names import expected_tensors
from ferrum_ref.serialization import from_jsonable
from ferrum_ref.types.devices import DataType
from ferrum_ref.types.ids import ModelId
from ferrum_ref.types.models import ModelConfig, ModelSource, ModelType
from ferrum_ref.types.parity_mode import ParityMode


class DecoderModelBuilder(AdvancedModelBuilder):
    """Builds every decoder that the models room reads. Safe to use for several builds at once.

    parity_mode UPSTREAM: configurations are filled in as upstream does (D-80, D-81). seed, initializers: for
    parameters that no file stores. custom_layers: code for definitions that name it.
    """

    def __init__(
        self,
        *,
        parity_mode: ParityMode = ParityMode.REFERENCE,
        seed: int = 0,
        num_threads: int = 2,
        initializers: Mapping[str, Initializer] | None = None,
        custom_layers: Sequence[CustomLayer] = (),
        meter: RateMeter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ConfigError for a negative seed or less than one thread."""
        if num_threads < 1 or seed < 0:
            raise ConfigError(
                f"DecoderModelBuilder: got seed {seed}, num_threads {num_threads}; expected >= 0 and >= 1"
            )
        layers = {layer.name(): layer for layer in custom_layers}
        self._tools = BuildTools(parity_mode, seed, num_threads, dict(initializers or {}), layers)
        self._meter = meter if meter is not None else SamplingMeter()
        self._clock = clock

    async def build_model(
        self, config: ModelConfig, compute_backend: ComputeBackend, weight_loader: WeightLoader
    ) -> PagedModelExecutor:
        """The decoder of `config.model_path`.  [MB-BUILD-1..5]"""
        return await self._from_config(config, compute_backend, weight_loader)

    async def build_from_source(
        self,
        source: ModelSource,
        compute_backend: ComputeBackend,
        weight_loader: WeightLoader,
        build_options: BuildOptions,
    ) -> PagedModelExecutor:
        """The decoder of a source; its graph at a level other than 2.  [MB-SOURCE-1..6, MB-OPTIONS-2..6]"""
        place = place_of(source)
        settings = BuildSettings.from_options(build_options, place.name)
        reporter = BuildReporter(self._clock, timeout_s=settings.timeout_s)
        return await self._run(Build(self._tools, settings, place, compute_backend, weight_loader, reporter))

    def validate_config(self, config: ModelConfig) -> list[ValidationIssue]:
        return find_issues(config, self._tools.parity_mode)

    def supported_model_types(self) -> list[ModelType]:
        return supported_model_types()

    def builder_info(self) -> BuilderInfo:
        return builder_info(type(self).__name__)

    async def estimate_build_time(self, config: ModelConfig) -> BuildTimeEstimate:
        """From what this machine reads and converts per second.  [MB-ESTIMATE-1..4]

        Raises ConfigError and UnsupportedError for settings, FerrumIOError.
        """
        require_sound(find_issues(config, self._tools.parity_mode))
        settings, place = BuildSettings.from_config(config), _place(config)
        decoder = await read_decoder_config(settings, place, self._tools.parity_mode, None)
        num_elements = sum(math.prod(shape) for _, shape in expected_tensors(decoder))
        files = _files(place)
        parameter_bytes = settings.dtype.packed_bytes(num_elements)
        per_sequence = -(-context_tokens(settings, decoder) // settings.block_size)
        num_blocks = settings.num_blocks or settings.max_batch_size * per_sequence
        token_bytes = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * settings.dtype.size_bytes()
        file_bytes = sum(path.stat().st_size for path in files) if files else parameter_bytes
        work = Workload(
            file_bytes=file_bytes,
            num_elements=num_elements,
            parameter_bytes=parameter_bytes,
            cache_bytes=num_blocks * settings.block_size * token_bytes,
            num_threads=self._tools.num_threads,
            converts=file_bytes < num_elements * settings.dtype.size_bytes() or settings.dtype is not DataType.FP32,
            quantizes=settings.quantization is not None,
        )
        return estimate(work, await asyncio.to_thread(self._meter.measure, files))

    async def build_with_custom_layers(
        self,
        config: ModelConfig,
        custom_layers: list[CustomLayer],
        compute_backend: ComputeBackend,
        weight_loader: WeightLoader,
    ) -> PagedModelExecutor:
        """The graph with the user's layers in it, optimised at level 2.  [MB-CUSTOM-1..5]"""
        return await self._from_config(config, compute_backend, weight_loader, layers=custom_layers)

    async def build_incremental(
        self,
        config: ModelConfig,
        compute_backend: ComputeBackend,
        weight_loader: WeightLoader,
        progress_callback: Callable[[BuildProgress], None],
    ) -> PagedModelExecutor:
        """`build_model`, reporting.  [MB-PROGRESS-1..3]"""
        return await self._from_config(config, compute_backend, weight_loader, listener=progress_callback)

    async def build_with_optimization(
        self,
        config: ModelConfig,
        optimization_pipeline: list[OptimizationPass],
        compute_backend: ComputeBackend,
        weight_loader: WeightLoader,
    ) -> PagedModelExecutor:
        """The graph as these passes leave it; their results stand in `info().metadata`.  [MB-ORDER-2..3]"""
        return await self._from_config(config, compute_backend, weight_loader, passes=optimization_pipeline)

    async def export_model_definition(self, config: ModelConfig) -> ModelIR:
        """The plain graph. Where model_path does not exist it names no source, and parameters are initialised.

        [MB-EXPORT-1..4]
        """
        settings, place = BuildSettings.from_config(config), _place(config)
        return export_model(settings, place, await read_decoder_config(settings, place, self._tools.parity_mode, None))

    async def import_model_definition(
        self, definition: ModelIR, compute_backend: ComputeBackend, weight_loader: WeightLoader
    ) -> PagedModelExecutor:
        """An executor of the graph; the definition is not touched.  [MB-IMPORT-1..4]"""
        place = _source_of(definition)
        dtype = next((spec.dtype for spec in definition.parameters), DataType.FP32)
        settings = BuildSettings(ModelId.from_value(definition.metadata.name), dtype)
        settings.check_backend(compute_backend)
        build = Build(self._tools, settings, place, compute_backend, weight_loader, self._reporter())
        built = await build.from_graph(definition, {}, {}).run()
        executor = Attributes("metadata.additional.executor", _object(definition.metadata.additional, "executor"))
        plan = Blueprint(
            model_id=settings.model_id,
            model_type=model_type_of(definition.architecture.name),
            dimensions=definition.architecture.dimensions,
            head_dim=head_dim_of(definition),
            num_parameters=built.num_parameters,
            parameter_bytes=built.decoder.num_bytes(),
            max_batch_size=executor.optional_whole("max_batch_size", 1, 1),
            num_blocks=executor.optional_whole("num_blocks", 0, 0) or None,
            block_size=executor.optional_whole("block_size", BLOCK_SIZE_TOKENS, 1),
        )
        made = make_executor(built.decoder, plan, compute_backend)
        await asyncio.to_thread(try_out, built.decoder, plan, compute_backend)
        return made

    async def _from_config(
        self,
        config: ModelConfig,
        backend: ComputeBackend,
        loader: WeightLoader,
        *,
        layers: Sequence[CustomLayer] = (),
        passes: Sequence[OptimizationPass] | None = None,
        listener: Callable[[BuildProgress], None] | None = None,
    ) -> PagedModelExecutor:
        reporter = self._reporter(listener)
        require_sound(find_issues(config, self._tools.parity_mode))
        settings, place = BuildSettings.from_config(config), place_of(ModelSource.Local(config.model_path))
        return await self._run(Build(self._tools, settings, place, backend, loader, reporter, passes, layers))

    @staticmethod
    async def _run(build: Build) -> PagedModelExecutor:
        """Within the time that was given; whoever still works for it is told to stop."""
        try:
            return await asyncio.wait_for(build.run(), build.settings.timeout_s)
        except TimeoutError:
            raise build.reporter.timed_out() from None
        finally:
            build.reporter.stop()

    def _reporter(self, listener: Callable[[BuildProgress], None] | None = None) -> BuildReporter:
        return BuildReporter(self._clock, listener)


def _place(config: ModelConfig) -> ModelPlace:
    """The place of model_path; one without files where the configuration is given and the path does not exist."""
    try:
        return place_of(ModelSource.Local(config.model_path))
    except NotFoundError:
        if config.extra_config.get("config") is None:
            raise
        return ModelPlace(config.model_path, _no_file)


def _source_of(definition: ModelIR) -> ModelPlace:
    """Where a definition's weights lie.  Raises ConfigError for something else there, NotFoundError (path)."""
    found = definition.metadata.additional.get("source")
    if found is None:
        return ModelPlace(definition.metadata.name, _no_file)
    try:
        return place_of(from_jsonable(ModelSource, found))
    except SerializationError as error:
        raise ConfigError(f"metadata.additional.source: {error.message}") from None


def _no_file(name: str) -> Any:
    raise NotFoundError(f"build: {name}: the model has no place; give a source")


def _files(place: ModelPlace) -> list[Path]:
    """Weight files on this machine."""
    if place.gguf is not None:
        return [place.gguf]
    if place.directory is None:
        return []
    if place.weights is not None and not place.weights.endswith(".json"):
        return [place.directory / place.weights]
    for ending in {Path(name).suffix for name in WEIGHT_FILES if not name.endswith(".json")}:
        found = sorted(place.directory.glob(f"*{ending}"))
        if found:
            return found
    return []


def _object(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name, {})
    if not isinstance(found, Mapping):
        raise ConfigError(f"metadata.additional.{name}: expected an object")
    return found
