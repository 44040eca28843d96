"""Latent attention as a family's part: its tensors, its weights, its kernel.  Clause: LM-LATENT-1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from ferrum_ref.errors import ConfigError
from ferrum_ref.models.decoder_parts import Attention
from ferrum_ref.models.latent import LatentAttention, LatentKernels, LatentWeights, read_latent
from ferrum_ref.models.latent_config import LatentSettings

if TYPE_CHECKING:
    from ferrum_ref.models.config import DecoderConfig
    from ferrum_ref.models.decoder_ops import DecoderOps
    from ferrum_ref.models.family import AttentionPart, PartReader

INNER_NORM_EPS: Final = 1e-6  # of both inner norms, whatever the model's own is


class LatentPart:
    """An `AttentionPart` of family. Stateless."""

    def tensors(self, config: DecoderConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Query, latent, output, in this order.  [LM-LATENT-1]"""
        latent, prefix, hidden = latent_of(config), prefix_of(layer), config.hidden_size
        query = latent.num_heads * latent.query_dim
        if latent.query_rank is None:
            yield f"{prefix}q_proj.weight", (query, hidden)
        else:
            yield from _affine(f"{prefix}q_a_proj", (latent.query_rank, hidden), latent.bias)
            yield f"{prefix}q_a_layernorm.weight", (latent.query_rank,)
            yield f"{prefix}q_b_proj.weight", (query, latent.query_rank)
        yield from _affine(f"{prefix}kv_a_proj_with_mqa", (latent.cached_dim, hidden), latent.bias)
        yield f"{prefix}kv_a_layernorm.weight", (latent.kv_rank,)
        expanded = latent.num_heads * (latent.nope_dim + latent.value_dim)
        yield f"{prefix}kv_b_proj.weight", (expanded, latent.kv_rank)
        yield from _affine(f"{prefix}o_proj", (hidden, latent.num_heads * latent.value_dim), latent.bias)

    def read(self, reader: PartReader, config: DecoderConfig, layer: int) -> LatentWeights:
        return read_latent(
            reader.source, reader.matrices, reader.backend, prefix_of(layer), latent_of(config), reader.dtype
        )

    def build(self, ops: DecoderOps, config: DecoderConfig, layer: int, weights: Any) -> Attention:
        kernels = LatentKernels(ops.backend, ops.linear, ops.norm, ops.position, *ops.tables(config, layer))
        return LatentAttention(kernels, latent_of(config), weights, INNER_NORM_EPS)


def latent_part(_config: DecoderConfig, _layer: int) -> AttentionPart:
    """The part of every layer. Pure."""
    return LatentPart()


def latent_of(config: DecoderConfig) -> LatentSettings:
    """Raises ConfigError for a decoder without a latent. Pure."""
    if config.latent is None:
        raise ConfigError(f"latent: got nothing, expected the latent attention of a {config.architecture}")
    return config.latent


def prefix_of(layer: int) -> str:
    return f"model.layers.{layer}.self_attn."


def _affine(name: str, shape: tuple[int, int], bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]
