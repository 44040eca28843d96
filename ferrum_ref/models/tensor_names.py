"""Which tensors a decoder of a given configuration consists of.

Canonical names and orientations are Hugging Face's: a linear weight is [out, in].  Clause: MD-NAMES-1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from ferrum_ref.errors import ConfigError
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.tensor_layout import attention_tensors, feed_forward_tensors, layout_of, norm_tensors

if TYPE_CHECKING:
    from ferrum_ref.models.family import Family

EMBEDDING: Final = "model.embed_tokens.weight"
LM_HEAD: Final = "lm_head.weight"
FINAL_NORM: Final = "model.norm.weight"


def expected_tensors(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order of the forward pass; lazy, so a lying layer count costs nothing.

    [MD-NAMES-1]  E hidden, F feed-forward, H heads, G kv heads, D head size, V vocabulary.
    """
    names, hidden = layout_of(config), config.hidden_size
    family = family_of(config)
    yield f"{names.embedding}.weight", (config.vocab_size, hidden)
    if config.learned_positions:
        yield f"{names.positions}.weight", (config.max_position_embeddings, hidden)
    if config.rope is not None:
        yield from config.rope.stored_tensors().items()
    for layer in range(config.num_layers):
        prefix = names.prefix(layer)
        attention, feed_forward = family.attention(config, layer), family.feed_forward(config, layer)
        yield from norm_tensors(config, prefix + names.attention_norm)
        yield from attention_tensors(config, layer) if attention is None else attention.tensors(config, layer)
        if config.post_norms:
            yield from norm_tensors(config, prefix + names.attention_post_norm)
        yield from norm_tensors(config, prefix + names.ffn_norm)
        yield from feed_forward_tensors(config, layer) if feed_forward is None else feed_forward.tensors(config, layer)
        if config.post_norms:
            yield from norm_tensors(config, prefix + names.ffn_post_norm)
    yield from norm_tensors(config, names.final_norm)
    if not config.tie_word_embeddings:
        yield f"{names.lm_head}.weight", (config.vocab_size, hidden)


def embedding_name(config: DecoderConfig) -> str:
    """The embedding's canonical name.  Pure."""
    return f"{layout_of(config).embedding}.weight"


def family_of(config: DecoderConfig) -> Family:
    """The family's record.  Raises ConfigError for an architecture that is none.  Pure."""
    from ferrum_ref.models.family_table import FAMILIES

    if config.architecture not in FAMILIES:
        raise ConfigError(f"architecture: got {config.architecture!r:.40}, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[config.architecture]
