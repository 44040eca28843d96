"""Which rule each tensor of a decoder follows, and what configuration a rank's part of it has.

Column-parallel matrices (q, k, v, gate, up) are cut by output: heads, features; row-parallel ones (attention output,
down) by input, and their products are summed over the ranks; embedding and output matrix by vocabulary rows. Norms,
routers and the compressed parts of latent attention are on every rank.  Clauses: TP-RULE-1..7 (specs/parallel.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from typing import Final

from ferrum_ref.errors import InvalidParameterError, UnsupportedError
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.latent_config import LatentSettings
from ferrum_ref.models.latent_part import LatentPart
from ferrum_ref.models.moe_config import MoeSettings
from ferrum_ref.models.moe_part import MoePart
from ferrum_ref.models.tensor_layout import TensorLayout, layout_of
from ferrum_ref.models.tensor_names import expected_tensors, family_of
from ferrum_ref.parallel.shards import Copied, Once, Owned, Part, Rule, Split

Rules = Iterator[tuple[str, Rule]]


class ExpertSharding(Enum):
    """How experts lie over the ranks.  [TP-RULE-5]"""

    SPLIT = "split"  # every rank has a run of every expert's features
    WHOLE = "whole"  # every expert is whole, on one rank


def tensor_rules(config: DecoderConfig, experts: ExpertSharding = ExpertSharding.SPLIT) -> dict[str, Rule]:
    """The rule of every tensor of `expected_tensors(config)`, by name.  Pure.  [TP-RULE-1]

    Raises UnsupportedError for a family with a part that nobody has said how to shard.
    """
    names = layout_of(config)
    cut = dict(_cut(config, names, experts))
    return {name: cut.get(name, Copied()) for name, _ in expected_tensors(config)}


def _cut(config: DecoderConfig, names: TensorLayout, experts: ExpertSharding) -> Rules:
    vocabulary = Split(0, (Part(config.vocab_size),))
    yield f"{names.embedding}.weight", vocabulary
    yield f"{names.lm_head}.weight", vocabulary
    family = family_of(config)
    for layer in range(config.num_layers):
        attention, feed_forward = family.attention(config, layer), family.feed_forward(config, layer)
        if attention is None:
            yield from _attention(config, names, layer)
        elif isinstance(attention, LatentPart) and config.latent is not None:
            yield from _latent(config.latent, f"{names.prefix(layer)}self_attn.")
        else:
            raise UnsupportedError(f"tensor parallel: attention of {config.architecture}: no rule says how to shard it")
        if feed_forward is None:
            yield from _feed_forward(config, names, layer)
        elif isinstance(feed_forward, MoePart) and config.moe is not None:
            yield from _experts(config.moe, f"{names.prefix(layer)}mlp.", experts)
        else:
            raise UnsupportedError(
                f"tensor parallel: feed-forward of {config.architecture}: no rule says how to shard it"
            )


def _attention(config: DecoderConfig, names: TensorLayout, layer: int) -> Rules:
    prefix, size = names.prefix(layer), config.head_dim
    query, key = Part(config.num_heads, size), Part(config.num_kv_heads, size)
    if len(names.qkv) == 3:
        by_name: tuple[tuple[Part, ...], ...] = ((query,), (key,), (key,))
    elif names.by_head:
        by_name = ((Part(config.num_heads, 3 * size),),)
    else:
        by_name = ((query, key, key),)
    for name, parts in zip(names.qkv, by_name, strict=True):
        yield from _column(names, prefix + name, parts)
    yield from _row(names, prefix + names.output, query)
    yield prefix + names.sinks, Split(0, (Part(config.num_heads),))


def _feed_forward(config: DecoderConfig, names: TensorLayout, layer: int) -> Rules:
    prefix, inner = names.prefix(layer), Part(config.intermediate_size)
    parts = (inner, inner) if config.gated and len(names.gate_up) == 1 else (inner,)
    for name in names.gate_up:
        yield from _column(names, prefix + name, parts)
    yield from _row(names, prefix + names.down, inner)


def _latent(latent: LatentSettings, prefix: str) -> Rules:
    """The compressed query and key/value are on every rank; heads are expanded from them where they live."""
    query = "q_proj" if latent.query_rank is None else "q_b_proj"
    yield f"{prefix}{query}.weight", Split(0, (Part(latent.num_heads, latent.query_dim),))
    yield f"{prefix}kv_b_proj.weight", Split(0, (Part(latent.num_heads, latent.nope_dim + latent.value_dim),))
    yield from _row(_PLAIN, f"{prefix}o_proj", Part(latent.num_heads, latent.value_dim))


def _experts(moe: MoeSettings, prefix: str, experts: ExpertSharding) -> Rules:
    for index in range(moe.num_experts):
        name = f"{prefix}experts.{index}."
        if experts is ExpertSharding.SPLIT:
            yield from _gated(name, moe.feed_forward_size)
            continue
        for part in ("gate", "up"):
            yield f"{name}{part}_proj.weight", Owned(0, index, moe.num_experts)
            yield f"{name}{part}_proj.bias", Owned(0, index, moe.num_experts)
        yield f"{name}down_proj.weight", Owned(1, index, moe.num_experts)
        yield f"{name}down_proj.bias", Once(index, moe.num_experts)
    if moe.shared_size:
        yield from _gated(f"{prefix}shared_experts.", moe.shared_size)


def _gated(prefix: str, inner_size: int) -> Rules:
    inner = Part(inner_size)
    yield from _column(_PLAIN, f"{prefix}gate_proj", (inner,))
    yield from _column(_PLAIN, f"{prefix}up_proj", (inner,))
    yield from _row(_PLAIN, f"{prefix}down_proj", inner)


_PLAIN: Final = TensorLayout()


def _column(names: TensorLayout, name: str, parts: tuple[Part, ...]) -> Rules:
    """Cut by output: each rank computes its own outputs, biases with them.  [TP-RULE-2]"""
    yield f"{name}.weight", Split(1 if names.transposed else 0, parts)
    yield f"{name}.bias", Split(0, parts)


def _row(names: TensorLayout, name: str, part: Part) -> Rules:
    """Cut by input: the ranks' products are summed, the bias is in one of them.  [TP-RULE-3]"""
    yield f"{name}.weight", Split(0 if names.transposed else 1, (part,))
    yield f"{name}.bias", Once()


def check_ranks(config: DecoderConfig, num_ranks: int, experts: ExpertSharding = ExpertSharding.SPLIT) -> None:
    """Raises InvalidParameterError, naming both numbers, where the model cannot lie over that many ranks.  [TP-RULE-6]

    Query heads must divide evenly; key/value heads too, or each be shared by equally many ranks. Features and
    vocabulary rows may leave a remainder, but every rank needs at least one. Pure.
    """
    if num_ranks < 1:
        raise InvalidParameterError(f"tensor parallel: num_ranks: got {num_ranks}, expected at least 1")
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if heads % num_ranks:
        raise InvalidParameterError(
            f"tensor parallel: num_ranks: got {num_ranks} for {heads} query heads, expected a divisor of {heads}"
        )
    if config.latent is None and kv_heads % num_ranks and num_ranks % kv_heads:
        raise InvalidParameterError(
            f"tensor parallel: num_ranks: got {num_ranks} for {kv_heads} key/value heads, expected a divisor or a "
            f"multiple of {kv_heads}"
        )
    for what, count in _countable(config, experts):
        if count < num_ranks:
            raise InvalidParameterError(
                f"tensor parallel: num_ranks: got {num_ranks} for {count} {what}, expected at most {count}"
            )


def _countable(config: DecoderConfig, experts: ExpertSharding) -> Iterator[tuple[str, int]]:
    yield "vocabulary rows", config.vocab_size
    moe = config.moe
    if moe is None or moe.dense_layers:
        yield "features of the feed-forward", config.intermediate_size
    if moe is not None and experts is ExpertSharding.SPLIT:
        yield "features of an expert", moe.feed_forward_size
    if moe is not None and moe.shared_size:
        yield "features of the shared expert", moe.shared_size


def rank_config(
    config: DecoderConfig, rank: int, num_ranks: int, experts: ExpertSharding = ExpertSharding.SPLIT
) -> DecoderConfig:
    """The configuration of one rank's part: its heads and features. `vocab_size` stays whole.  Pure.  [TP-RULE-7]

    Raises as `check_ranks`; InvalidParameterError for a rank outside [0, num_ranks).
    """
    check_ranks(config, num_ranks, experts)

    def mine(count: int) -> int:
        return len(Part(count).units(rank, num_ranks))

    moe, latent = config.moe, config.latent
    if moe is not None:
        split = experts is ExpertSharding.SPLIT
        moe = replace(
            moe,
            feed_forward_size=mine(moe.feed_forward_size) if split else moe.feed_forward_size,
            shared_size=mine(moe.shared_size) if moe.shared_size else 0,
        )
    return replace(
        config,
        num_heads=mine(config.num_heads),
        num_kv_heads=config.num_kv_heads if latent is not None else mine(config.num_kv_heads),
        intermediate_size=mine(config.intermediate_size),
        moe=moe,
        latent=None if latent is None else replace(latent, num_heads=mine(latent.num_heads)),
    )
