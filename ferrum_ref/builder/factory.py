"""Makes builders.  Clause: MB-FACTORY-1 (specs/model_builder.md)."""

from __future__ import annotations

from collections.abc import Callable

from ferrum_ref.builder.decoder_builder import DecoderModelBuilder
from ferrum_ref.builder.families import supported_model_types
from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.model_builder import ModelBuilderFactory
from ferrum_ref.types.models import ModelType


class DecoderModelBuilderFactory(ModelBuilderFactory):
    """Every builder it makes is a DecoderModelBuilder of its own.  [MB-FACTORY-1]"""

    def __init__(self, make: Callable[[], DecoderModelBuilder] = DecoderModelBuilder) -> None:
        """`make` gives builders other settings than the default ones."""
        self._make = make

    async def create_builder(self) -> DecoderModelBuilder:
        return self._make()

    async def create_advanced_builder(self) -> DecoderModelBuilder:
        return self._make()

    def supported_types(self) -> list[ModelType]:
        return supported_model_types()

    async def create_builder_for_type(self, model_type: ModelType) -> DecoderModelBuilder:
        if model_type not in supported_model_types():
            known = ", ".join(map(str, supported_model_types()))
            raise UnsupportedError(f"create_builder_for_type: got {model_type}, expected one of {known}")
        return self._make()
