"""The sparse feed-forward as a family's part: its tensors, its weights, its kernel.  Clause: LM-MOE-4."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ferrum_ref.errors import ConfigError
from ferrum_ref.models.decoder_parts import FeedForward
from ferrum_ref.models.moe import MoeFeedForward, MoeWeights, read_moe
from ferrum_ref.models.moe_config import MoeSettings

if TYPE_CHECKING:
    from ferrum_ref.models.config import DecoderConfig
    from ferrum_ref.models.decoder_ops import DecoderOps
    from ferrum_ref.models.family import FeedForwardPart, PartReader


class MoePart:
    """A `FeedForwardPart` of family. Stateless."""

    def tensors(self, config: DecoderConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Router, experts, shared expert, in this order.  [LM-MOE-4]"""
        moe, prefix, hidden = settings_of(config), prefix_of(layer), config.hidden_size
        yield f"{prefix}gate.weight", (moe.num_experts, hidden)
        if moe.router_bias:
            yield f"{prefix}gate.bias", (moe.num_experts,)
        if moe.has_correction:
            yield f"{prefix}gate.e_score_correction_bias", (moe.num_experts,)
        for index in range(moe.num_experts):
            yield from _expert(f"{prefix}experts.{index}.", moe.feed_forward_size, hidden, moe.expert_bias)
        if moe.shared_size:
            yield from _expert(f"{prefix}shared_experts.", moe.shared_size, hidden, False)

    def read(self, reader: PartReader, config: DecoderConfig, layer: int) -> MoeWeights:
        return read_moe(reader.source, reader.matrices, reader.backend, prefix_of(layer), settings_of(config))

    def build(self, ops: DecoderOps, config: DecoderConfig, layer: int, weights: Any) -> FeedForward:
        return MoeFeedForward(ops.backend, ops.linear, settings_of(config), weights)


def sparse_part(config: DecoderConfig, layer: int) -> FeedForwardPart | None:
    """The part of layers that have experts, None for dense ones. Pure."""
    return MoePart() if settings_of(config).is_sparse(layer) else None


def settings_of(config: DecoderConfig) -> MoeSettings:
    """Raises ConfigError for a decoder without experts. Pure."""
    if config.moe is None:
        raise ConfigError(f"moe: got nothing, expected the experts of a {config.architecture}")
    return config.moe


def prefix_of(layer: int) -> str:
    return f"model.layers.{layer}.mlp."


def _expert(prefix: str, inner: int, hidden: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        yield f"{prefix}{part}_proj.weight", shape
        if bias:
            yield f"{prefix}{part}_proj.bias", shape[:1]
