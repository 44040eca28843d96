"""What a build starts from: the configuration of the model at a place, and the definition made of it.

Clauses: MB-BUILD-1, MB-EXPORT-4 (specs/model_builder.md).
"""

from __future__ import annotations

from typing import Any

from ferrum_ref.builder.configuration import decoder_config, model_type_of
from ferrum_ref.builder.export import export_definition
from ferrum_ref.builder.places import CONFIG, ModelPlace
from ferrum_ref.builder.settings import BuildSettings
from ferrum_ref.builder.validation import architecture_issues, require_sound
from ferrum_ref.interfaces.model_builder import ModelIR
from ferrum_ref.interfaces.weights import WeightLoader
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.types.parity_mode import ParityMode


async def read_decoder_config(
    settings: BuildSettings, place: ModelPlace, parity_mode: ParityMode, loader: WeightLoader | None
) -> DecoderConfig:
    """From the settings, the GGUF file, or config.json; a loader is needed for a place on another machine.

    Raises ConfigError and UnsupportedError (what the configuration says), NotFoundError, InvalidFormatError,
    FerrumIOError, NetworkError.  [MB-BUILD-1]
    """
    found = settings.config
    if found is None and place.gguf is not None:
        with open_checkpoint(place.gguf) as checkpoint:
            return checkpoint.config
    if found is None:
        found = await place.read_config(loader)
    require_sound(architecture_issues(found, parity_mode))
    return decoder_config(found, f"{place.name}/{CONFIG}", parity_mode)


def context_tokens(settings: BuildSettings, config: DecoderConfig) -> int:
    """The context of a build: the model's own, or less if less was asked for. Pure."""
    return min(settings.max_tokens or config.max_position_embeddings, config.max_position_embeddings)


def export_model(settings: BuildSettings, place: ModelPlace, config: DecoderConfig) -> ModelIR:
    """The model as data, with where its weights lie and how its executor is to be made. Pure.  [MB-EXPORT-4]

    Raises UnsupportedError for a model that the IR cannot express.
    """
    executor = {
        "max_batch_size": settings.max_batch_size,
        "num_blocks": settings.num_blocks,
        "block_size": settings.block_size,
    }
    additional: dict[str, Any] = {"executor": executor}
    if place.portable is not None:
        additional["source"] = dict(place.portable)
    return export_definition(
        config,
        name=str(settings.model_id),
        model_type=model_type_of(config.architecture),
        dtype=settings.dtype,
        max_tokens=context_tokens(settings, config),
        additional=additional,
    )
