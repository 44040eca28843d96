"""`DecoderOnlyLLM` over the decoder: one contiguous cache per id, any number of ids in one forward.

Clauses: LM-LLM-1..6 (specs/llm.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from ferrum_ref.errors import AlreadyExistsError, InvalidParameterError, ModelError, NotFoundError
from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.interfaces.kv_storage import SequenceKv, SequenceKvFactory
from ferrum_ref.interfaces.llm import DecoderOnlyLLM, LlmRuntimeConfig, Logits
from ferrum_ref.models.decoder import Decoder

Cache = TypeVar("Cache", bound=SequenceKv)


class DecoderLlm(DecoderOnlyLLM, Generic[Cache]):
    """Caches by id; a call that raises has changed none of them.  [LM-LLM-1..6; D-25, D-36]"""

    def __init__(self, decoder: Decoder, caches: SequenceKvFactory[Cache]) -> None:
        self.decoder = decoder
        self._factory = caches
        self._caches: dict[str, Cache] = {}

    def config(self) -> LlmRuntimeConfig:
        model = self.decoder.config
        return LlmRuntimeConfig(
            hidden_size=model.hidden_size,
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            vocab_size=model.vocab_size,
            max_seq_len=self.decoder.max_tokens,
        )

    def prefill(self, cache_id: str, tokens: Sequence[int]) -> Logits:
        """[LM-LLM-1]"""
        if cache_id in self._caches:
            raise AlreadyExistsError(f"prefill: cache id {cache_id!r} is live; release it first")
        if not tokens:
            raise ModelError(f"prefill: the prompt of {cache_id!r} is empty; give at least one token")
        cache = self._factory.new_cache()
        (logits,) = self._run([cache], ForwardBatch.build([tokens], [0]))
        self._caches[cache_id] = cache
        return logits

    def decode(self, cache_id: str, token: int, pos: int) -> Logits:
        """[LM-LLM-2]"""
        return self.decode_batch([(cache_id, token, pos)])[0]

    def decode_batch(self, batch: Sequence[tuple[str, int, int]]) -> list[Logits]:
        """One forward for all.  [LM-LLM-3]"""
        for cache_id, _, _ in batch:
            self._existing(cache_id, "decode")
        found = self.unified_forward([(cache_id, [token], pos, True) for cache_id, token, pos in batch])
        return [row for row in found if row is not None]

    def unified_forward(self, items: Sequence[tuple[str, Sequence[int], int, bool]]) -> list[Logits | None]:
        """One mixed forward; an unknown id with pos_offset 0 starts a cache, as a prompt's first chunk.  [LM-LLM-6]"""
        self._require_distinct([cache_id for cache_id, *_ in items])
        if not items:
            return []
        caches = [self._cache_at(cache_id, pos) for cache_id, _, pos, _ in items]
        finals = [is_final for *_, is_final in items]
        batch = ForwardBatch.build([tokens for _, tokens, _, _ in items], [pos for _, _, pos, _ in items], finals)
        rows = iter(self._run(caches, batch))
        for (cache_id, *_), cache in zip(items, caches, strict=True):
            self._caches[cache_id] = cache
        return [next(rows) if is_final else None for is_final in finals]

    def forward_verify(self, cache_id: str, tokens: Sequence[int]) -> Logits:
        """All of `tokens` in one forward.  [LM-LLM-5; D-36]"""
        start = self.cache_length(cache_id)
        if not tokens:
            return np.empty(0, dtype=np.float32)
        batch = ForwardBatch.build([tokens], [start]).with_all_logits()
        return np.concatenate(self._run([self._caches[cache_id]], batch))

    def release(self, cache_id: str) -> None:
        """[LM-LLM-4]"""
        self._caches.pop(cache_id, None)

    def reset(self) -> None:
        """[LM-LLM-4]"""
        self._caches.clear()

    def cache_length(self, cache_id: str) -> int:
        """Tokens cached.  Raises NotFoundError."""
        return self._existing(cache_id, "cache_length").num_tokens

    def truncate_kv(self, cache_id: str, new_len: int) -> None:
        """Forget the tokens from `new_len` on.  Raises NotFoundError; InvalidParameterError outside [0, length]."""
        self._existing(cache_id, "truncate_kv").truncate(new_len)

    def prepare(self, cache_id: str, max_tokens: int) -> None:
        """Allocate room for `max_tokens` in a live cache; an unknown id is no error (nothing to prepare yet)."""
        if max_tokens < 0:
            raise InvalidParameterError(f"prepare: max_tokens must be >= 0, got {max_tokens}")
        cache = self._caches.get(cache_id)
        if cache is not None:
            cache.reserve(max(0, max_tokens - cache.num_tokens))

    def cache_metrics_snapshot(self) -> dict[str, Any] | None:
        """Counts of live caches, their tokens and bytes."""
        caches = list(self._caches.values())
        return {
            "num_caches": len(caches),
            "num_tokens": sum(cache.num_tokens for cache in caches),
            "size_bytes": sum(cache.size_bytes() for cache in caches),
        }

    def _run(self, caches: Sequence[Cache], batch: ForwardBatch) -> list[Logits]:
        bound = self._factory.bind(caches, batch.lengths)
        logits = np.asarray(self.decoder.forward(batch, bound).to_numpy(), dtype=np.float32)
        bound.commit()
        return list(logits)

    def _existing(self, cache_id: str, operation: str) -> Cache:
        if cache_id not in self._caches:
            raise NotFoundError(f"{operation}: no cache {cache_id!r}; prefill it first")
        return self._caches[cache_id]

    def _cache_at(self, cache_id: str, pos: int) -> Cache:
        """The cache that tokens at `pos` go into; a new one at 0.  Raises NotFoundError, ModelError."""
        if cache_id not in self._caches and pos == 0:
            return self._factory.new_cache()
        cache = self._existing(cache_id, "unified_forward")
        if pos != cache.num_tokens:
            raise ModelError(
                f"unified_forward: position {pos} for {cache_id!r}, but its cache holds {cache.num_tokens} tokens;"
                " a token's position is the number of tokens before it"
            )
        return cache
