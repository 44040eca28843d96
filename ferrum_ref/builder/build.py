"""One build, phase by phase.  Clauses: MB-BUILD-1..6, MB-WEIGHTS-1..4, MB-PROGRESS-1..3 (specs/model_builder.md)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ferrum_ref.builder.configuration import model_type_of
from ferrum_ref.builder.custom import insert_layers
from ferrum_ref.builder.graph_build import GraphBuild, memory_errors
from ferrum_ref.builder.initialization import Initializer
from ferrum_ref.builder.origin import context_tokens, export_model, read_decoder_config
from ferrum_ref.builder.passes.pipeline import apply_passes, default_passes
from ferrum_ref.builder.places import ModelPlace
from ferrum_ref.builder.progress import BuildReporter
from ferrum_ref.builder.reading import DecoderSource, TensorReader, require_tensors
from ferrum_ref.builder.settings import BuildSettings
from ferrum_ref.builder.wiring import Blueprint, BuiltDecoder, make_executor, try_out
from ferrum_ref.errors import DeviceError, UnsupportedError
from ferrum_ref.executor.paged import PagedModelExecutor
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.model_builder import BuildPhase, CustomLayer, ModelDimensions, ModelIR, OptimizationPass
from ferrum_ref.interfaces.weights import WeightLoader
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_weights import DecoderWeights, read_decoder_weights
from ferrum_ref.models.tensor_names import expected_tensors
from ferrum_ref.types.parity_mode import ParityMode

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class BuildTools:
    """What a builder brings to each of its builds."""

    parity_mode: ParityMode
    seed: int
    num_threads: int
    initializers: Mapping[str, Initializer]
    custom_layers: Mapping[str, CustomLayer]


@dataclass(slots=True)
class Build:
    """One build of the model at a place. `passes` or `layers` given: from the IR, whatever the level."""

    tools: BuildTools
    settings: BuildSettings
    place: ModelPlace
    backend: ComputeBackend
    loader: WeightLoader
    reporter: BuildReporter
    passes: Sequence[OptimizationPass] | None = None
    layers: Sequence[CustomLayer] = ()

    async def run(self) -> PagedModelExecutor:
        """Raises as `ModelBuilder.build_model` and `build_from_source`."""
        self.reporter.report(BuildPhase.Validation, "check settings")
        self.settings.check_backend(self.backend)
        config = await read_decoder_config(self.settings, self.place, self.tools.parity_mode, self.loader)
        self.reporter.report(BuildPhase.Validation, "settings and configuration fit", 1.0)
        if self.passes is None and not self.layers and self.settings.level == 2:
            return await self._build_decoder(config)
        return await self._build_from_graph(config)

    async def _build_decoder(self, config: DecoderConfig) -> PagedModelExecutor:
        reporter = self.reporter
        weights = await self._read_weights(config)
        reporter.report(BuildPhase.ModelInitialization, "weights are on the backend", 1.0)
        decoder = Decoder(config, weights, self.backend, context_tokens(self.settings, config))
        self._require_device(decoder)
        reporter.report(BuildPhase.LayerConstruction, f"{config.num_layers} layers", 1.0, num_layers=config.num_layers)
        plan = self._blueprint(config, weights.num_bytes())
        executor = make_executor(decoder, plan, self.backend)
        reporter.report(BuildPhase.ParameterBinding, "weights and cache are bound", 1.0)
        reporter.report(BuildPhase.Optimization, "projections of one input are stacked", 1.0)
        await self._finish(decoder, plan)
        return executor

    async def _build_from_graph(self, config: DecoderConfig) -> PagedModelExecutor:
        definition = export_model(self.settings, self.place, config)
        called, tensors = insert_layers(definition, self.layers) if self.layers else ({}, {})
        pipeline = default_passes(self.settings.level) if self.passes is None else self.passes
        results = apply_passes(definition, pipeline)
        build = replace(self.from_graph(definition, called, tensors), config=config)
        built = await build.run()
        self._require_device(built.decoder)
        plan = replace(
            self._blueprint(config, built.decoder.num_bytes()),
            num_parameters=self._num_parameters(config) + sum(tensor.numel() for tensor in tensors.values()),
            optimizations=results,
        )
        executor = make_executor(built.decoder, plan, self.backend)
        await self._finish(built.decoder, plan)
        return executor

    def from_graph(
        self, definition: ModelIR, called: Mapping[str, CustomLayer], tensors: Mapping[str, Any]
    ) -> GraphBuild:
        """The build of a definition's decoder with this build's weights."""
        return GraphBuild(
            definition=definition,
            place=self.place if self.place.portable is not None else None,
            backend=self.backend,
            loader=self.loader,
            reporter=self.reporter,
            quantization=self.settings.quantization,
            seed=self.tools.seed,
            initializers=self.tools.initializers,
            custom_layers={**self.tools.custom_layers, **called},
            custom_tensors=tensors,
        )

    async def _read_weights(self, config: DecoderConfig) -> DecoderWeights:
        def progress(done: int, total: int) -> None:
            details = {"layers_done": done, "num_layers": total}
            self.reporter.report(BuildPhase.WeightLoading, f"layer {done} of {total}", done / total, **details)

        self.reporter.report(BuildPhase.WeightLoading, "find weights")
        if self.place.gguf is not None:
            if self.settings.quantization is not None:
                raise UnsupportedError(
                    "build: quantization: a GGUF file's weights are read as it packs them; leave it off"
                )
            with open_checkpoint(self.place.gguf) as checkpoint:
                return await self._in_thread(lambda: self._decode(checkpoint, progress))
        stored = await self.place.find_weights(self.loader)
        loop = asyncio.get_running_loop()
        tensors = TensorReader(stored, self.loader, loop, self.reporter.require_time, self.settings.quantization)

        def read() -> DecoderWeights:
            require_tensors(config, tensors)
            return self._decode(DecoderSource(config, tensors), progress)

        return await self._in_thread(read)

    def _decode(self, source: Any, progress: Callable[[int, int], None]) -> DecoderWeights:
        return read_decoder_weights(
            source,
            self.backend,
            self.settings.dtype,
            num_threads=self.tools.num_threads,
            progress=progress,
            check_finite=False,  # final validation runs the model, where that is asked for
        )

    async def _finish(self, decoder: BuiltDecoder, plan: Blueprint) -> None:
        if self.settings.validates:
            self.reporter.report(BuildPhase.FinalValidation, "run one token")
            await self._in_thread(lambda: try_out(decoder, plan, self.backend))
        self.reporter.report(BuildPhase.FinalValidation, "done", 1.0, validated=self.settings.validates)
        self.reporter.report(BuildPhase.Finalization, "ready", 1.0)

    def _require_device(self, decoder: BuiltDecoder) -> None:
        """Tensors lie where the backend is bound to; that must be where they were asked for."""
        if self.settings.device not in (None, decoder.device):
            raise DeviceError(
                f"build: device: got {self.settings.device}, but backend {self.backend.name()!r} is bound to"
                f" {decoder.device}; bind it there first"
            )

    async def _in_thread(self, work: Callable[[], Found]) -> Found:
        with memory_errors():
            return await asyncio.to_thread(work)

    def _num_parameters(self, config: DecoderConfig) -> int:
        return sum(math.prod(shape) for _, shape in expected_tensors(config))

    def _blueprint(self, config: DecoderConfig, parameter_bytes: int) -> Blueprint:
        return Blueprint(
            model_id=self.settings.model_id,
            model_type=model_type_of(config.architecture),
            dimensions=ModelDimensions(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                intermediate_size=config.intermediate_size,
                max_sequence_length=context_tokens(self.settings, config),
            ),
            head_dim=config.head_dim,
            num_parameters=self._num_parameters(config),
            parameter_bytes=parameter_bytes,
            max_batch_size=self.settings.max_batch_size,
            num_blocks=self.settings.num_blocks,
            block_size=self.settings.block_size,
        )
