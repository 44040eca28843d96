"""`DecoderOnlyLLM`: a decoder that owns its K/V caches, keyed by text id; ids in, numpy logits out.

Upstream: `ferrum-models` `common/llm` (0.7.0's trait plus 0.7.7's additions).  Clauses: LM-LLM-* (specs/llm.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import InvalidParameterError, ModelError, ResourceExhaustedError, UnsupportedError
from ferrum_ref.types.record import Record, Usize

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LlmRuntimeConfig(Record):
    """What an engine must know about a decoder; counts, and `max_seq_len` in tokens.  [LM-LLM-11]"""

    hidden_size: Usize
    num_layers: Usize
    num_kv_heads: Usize
    head_dim: Usize
    vocab_size: Usize
    max_seq_len: Usize


class DecoderOnlyLLM(ABC):
    """A stateful decoder.  Every error is raised before any cache changes.  [LM-LLM-1..11; D-25, D-36]

    Errors: ModelError (empty prompt, wrong position, duplicate id in a batch), InvalidParameterError (token id
    outside the vocabulary), AlreadyExistsError (prefill on a live id), NotFoundError (decode on an unknown id),
    ResourceExhaustedError (context full). Upstream panics instead, or writes at wrong positions.
    """

    @abstractmethod
    def config(self) -> LlmRuntimeConfig:
        """Sizes of the model."""

    @abstractmethod
    def prefill(self, cache_id: str, tokens: Sequence[int]) -> Logits:
        """Run a whole prompt from position 0 in a new cache; logits `[V]` after its last token.  [LM-LLM-1]"""

    @abstractmethod
    def decode(self, cache_id: str, token: int, pos: int) -> Logits:
        """Run one token at `pos`, which must be the cache's length; logits `[V]`.  [LM-LLM-2]"""

    def decode_batch(self, batch: Sequence[tuple[str, int, int]]) -> list[Logits]:
        """`decode` of each (cache_id, token, pos), in order.  Raises ModelError on a repeated id.  [LM-LLM-3]

        This default checks the whole batch before it decodes the first (what lengths `cache_length` tells).
        """
        self._require_distinct([cache_id for cache_id, _, _ in batch])
        self._require_decodable(batch)
        return [self.decode(cache_id, token, pos) for cache_id, token, pos in batch]

    @abstractmethod
    def release(self, cache_id: str) -> None:
        """Drop a cache; an unknown id is no error.  [LM-LLM-4]"""

    def reset(self) -> None:
        """Drop every cache; default: nothing.  [LM-LLM-4]"""
        return

    # 0.7.7

    def cache_length(self, cache_id: str) -> int:
        """Tokens in a cache (an extension; `forward_verify` starts there).  Raises UnsupportedError by default."""
        raise UnsupportedError(f"DecoderOnlyLLM.cache_length: not offered by {type(self).__name__}")

    def cache_metrics_snapshot(self) -> dict[str, Any] | None:
        """Cache counters as JSON, or None (this default body): nothing is counted.  [LM-LLM-8]"""
        return None

    def lora_metrics_snapshot(self) -> dict[str, Any] | None:
        """Adapter counters as JSON, or None (this default body): no adapters.  [LM-LLM-9]"""
        return None

    def set_lora_adapter_for_cache(self, cache_id: str, adapter: str | None) -> None:
        """Bind an adapter to one sequence before its prefill; None clears the binding.  [LM-LLM-9]

        Raises UnsupportedError for an adapter (this default body); clearing where nothing is bound is no error.
        """
        if adapter is not None:
            raise UnsupportedError(f"set_lora_adapter_for_cache: no adapters here, got {adapter!r} for {cache_id!r}")

    def prepare(self, cache_id: str, max_tokens: int) -> None:
        """Allocate room for `max_tokens` of one sequence ahead; counts none of them.  Default: nothing.  [LM-LLM-7]"""
        return

    def kv_capacity(self) -> int:
        """Longest sequence one id may hold, in tokens; `config().max_seq_len` (this default body).  [LM-LLM-10]

        Upstream's models cap it at 4096 or an environment variable, and panic beyond it.
        """
        return self.config().max_seq_len

    def decode_batch_with_full_logits(
        self, batch: Sequence[tuple[str, int, int]], force_full_logits: bool
    ) -> list[Logits]:
        """`decode_batch`; `force_full_logits` asks for all V logits where a backend would give its argmax only.

        Logits are always complete here, so it changes nothing.  [LM-LLM-10]
        """
        return self.decode_batch(batch)

    def forward_verify(self, cache_id: str, tokens: Sequence[int]) -> Logits:
        """Append `tokens` at the cache's end; flat logits, len(tokens) * V, position-major.  [LM-LLM-5; D-36]

        Upstream's default runs them at positions 0, 1, ... whatever the cache holds.
        """
        start = self.cache_length(cache_id)
        self._require_decodable([(cache_id, token, start + i) for i, token in enumerate(tokens)], start)
        if not len(tokens):
            return np.empty(0, dtype=np.float32)
        rows = [self.decode(cache_id, token, start + i) for i, token in enumerate(tokens)]
        return np.concatenate(rows)

    def unified_forward(self, items: Sequence[tuple[str, Sequence[int], int, bool]]) -> list[Logits | None]:
        """A mixed forward of (cache_id, q_tokens, pos_offset, is_final), one entry for each.  [LM-LLM-6]

        Logits `[V]` after the last q token of a final item, None for the others.
        Raises UnsupportedError (this default body).
        """
        raise UnsupportedError(f"DecoderOnlyLLM.unified_forward: not offered by {type(self).__name__}")

    def truncate_kv(self, cache_id: str, new_len: int) -> None:
        """Cut a cache to its first `new_len` tokens.  [LM-LLM-5]

        Raises NotFoundError (id), InvalidParameterError outside [0, length]; UnsupportedError (this default body,
        where upstream panics).
        """
        raise UnsupportedError(f"DecoderOnlyLLM.truncate_kv: not offered by {type(self).__name__}")

    def _require_distinct(self, cache_ids: Sequence[str]) -> None:
        """Raises ModelError naming the first id that occurs twice.  [LM-LLM-3]"""
        seen: set[str] = set()
        for cache_id in cache_ids:
            if cache_id in seen:
                raise ModelError(f"decode_batch: cache id {cache_id!r} occurs twice; send its tokens in two calls")
            seen.add(cache_id)

    def _require_decodable(self, batch: Sequence[tuple[str, int, int]], start: int | None = None) -> None:
        """What `decode` would refuse about any of these, in their order; `start`: they all continue one cache.

        Raises InvalidParameterError (token id), ModelError (position), NotFoundError (id), ResourceExhaustedError.
        """
        vocab_size, capacity = self.config().vocab_size, self.kv_capacity()
        for cache_id, token, pos in batch:
            if start is None:
                try:
                    length = self.cache_length(cache_id)
                except UnsupportedError:  # this model does not tell: its `decode` has to find out
                    length = pos
                if pos != length:
                    raise ModelError(f"decode: position {pos} for {cache_id!r}, but its cache holds {length} tokens")
            if not 0 <= token < vocab_size:
                raise InvalidParameterError(f"decode: token id must be in [0, {vocab_size}), got {token}")
            if pos >= capacity:
                raise ResourceExhaustedError(
                    f"decode: position {pos} of {cache_id!r} is beyond its context of {capacity} tokens; release it"
                )
