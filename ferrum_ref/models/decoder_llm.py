"""`DecoderOnlyLLM` over the decoder: one contiguous cache per id, any number of ids in one forward.

Clauses: LM-LLM-1..10 (specs/llm.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from ferrum_ref.errors import AlreadyExistsError, InvalidParameterError, ModelError, NotFoundError
from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.interfaces.kv_storage import SequenceKv, SequenceKvFactory
from ferrum_ref.interfaces.llm import DecoderOnlyLLM, LlmRuntimeConfig, Logits
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.decoder import Decoder

Cache = TypeVar("Cache", bound=SequenceKv)


class DecoderLlm(DecoderOnlyLLM, Generic[Cache]):
    """Caches by id; a call that raises has changed none of them.  [LM-LLM-1..10; D-25, D-36]"""

    def __init__(self, decoder: Decoder, caches: SequenceKvFactory[Cache]) -> None:
        self.decoder = decoder
        self._factory = caches
        self._caches: dict[str, Cache] = {}
        self._prepared: dict[str, Cache] = {}  # room made ahead, for ids that are not live yet

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
        self._require_new(cache_id, tokens)
        return self._prefill(cache_id, ForwardBatch.build([tokens], [0]))

    def _require_new(self, cache_id: str, tokens: Sequence[int]) -> None:
        """Raises AlreadyExistsError (live id), ModelError (empty prompt).  [LM-LLM-1; D-25]"""
        if cache_id in self._caches:
            raise AlreadyExistsError(f"prefill: cache id {cache_id!r} is live; release it first")
        if not len(tokens):
            raise ModelError(f"prefill: the prompt of {cache_id!r} is empty; give at least one token")

    def _prefill(self, cache_id: str, batch: ForwardBatch, inputs: TensorRef | None = None) -> Logits:
        """Run a whole prompt; `inputs` as in Decoder.forward."""
        cache = self._new_cache(cache_id)
        (logits,) = self._run([cache], batch, inputs)
        self._admit(cache_id, cache)
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
            self._admit(cache_id, cache)
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
        self._prepared.pop(cache_id, None)

    def reset(self) -> None:
        """[LM-LLM-4]"""
        self._caches.clear()
        self._prepared.clear()

    def cache_length(self, cache_id: str) -> int:
        """Tokens cached.  Raises NotFoundError."""
        return self._existing(cache_id, "cache_length").num_tokens

    def truncate_kv(self, cache_id: str, new_len: int) -> None:
        """Forget the tokens from `new_len` on.  Raises NotFoundError; InvalidParameterError outside [0, length]."""
        self._existing(cache_id, "truncate_kv").truncate(new_len)

    def prepare(self, cache_id: str, max_tokens: int) -> None:
        """Allocate room for `max_tokens` in a live cache, or in the one that the next prefill of `cache_id` takes.

        [LM-LLM-7]  Raises InvalidParameterError (negative), ResourceExhaustedError (beyond the context).
        """
        if max_tokens < 0:
            raise InvalidParameterError(f"prepare: max_tokens must be >= 0, got {max_tokens}")
        live = cache_id in self._caches
        cache = self._caches[cache_id] if live else self._new_cache(cache_id)
        cache.reserve(max(0, max_tokens - cache.num_tokens))
        if not live:
            self._prepared[cache_id] = cache

    def cache_metrics_snapshot(self) -> dict[str, Any] | None:
        """Live caches, their tokens, and the bytes of live and prepared ones.  [LM-LLM-8]"""
        caches = [*self._caches.values(), *self._prepared.values()]
        return {
            "num_caches": len(self._caches),
            "num_tokens": sum(cache.num_tokens for cache in caches),
            "size_bytes": sum(cache.size_bytes() for cache in caches),
        }

    def _run(self, caches: Sequence[Cache], batch: ForwardBatch, inputs: TensorRef | None = None) -> list[Logits]:
        bound = self._factory.bind(caches, batch.lengths)
        logits = np.asarray(self.decoder.forward(batch, bound, inputs=inputs).to_numpy(), dtype=np.float32)
        bound.commit()
        return list(logits)

    def _new_cache(self, cache_id: str) -> Cache:
        """The prepared one, or an empty one."""
        return self._prepared[cache_id] if cache_id in self._prepared else self._factory.new_cache()

    def _admit(self, cache_id: str, cache: Cache) -> None:
        """The cache is live from here on."""
        self._caches[cache_id] = cache
        self._prepared.pop(cache_id, None)

    def _existing(self, cache_id: str, operation: str) -> Cache:
        if cache_id not in self._caches:
            raise NotFoundError(f"{operation}: no cache {cache_id!r}; prefill it first")
        return self._caches[cache_id]

    def _cache_at(self, cache_id: str, pos: int) -> Cache:
        """The cache that tokens at `pos` go into; a new one at 0.  Raises NotFoundError, ModelError."""
        if cache_id not in self._caches and pos == 0:
            return self._new_cache(cache_id)
        cache = self._existing(cache_id, "unified_forward")
        if pos != cache.num_tokens:
            raise ModelError(
                f"unified_forward: position {pos} for {cache_id!r}, but its cache holds {cache.num_tokens} tokens;"
                " a token's position is the number of tokens before it"
            )
        return cache
