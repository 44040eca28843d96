"""The model builder room: configurations, definitions and passes over them, and the executors built from them."""

from ferrum_ref.builder.decoder_builder import DecoderModelBuilder
from ferrum_ref.builder.factory import DecoderModelBuilderFactory
from ferrum_ref.builder.registry import ExecutorModelRegistry

__all__ = ["DecoderModelBuilder", "DecoderModelBuilderFactory", "ExecutorModelRegistry"]
