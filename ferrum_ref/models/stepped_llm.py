"""`DecoderOnlyLLM` that runs prompts through the decoder and single tokens through a `DecodeBackend`.

An id's keys and values lie in its contiguous cache up to some token; what was decoded after it is known here by its
tokens, and its K/V to the decode backend alone, which gives none back and forgets no single token. Whatever needs the
decoder again (a further chunk, a verification, a truncation followed by a decode) runs those tokens through it, once.

Clauses: LM-LLM-12..14 (specs/llm.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

import numpy as np

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.decode_backend import DecodeBackend
from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.interfaces.kv_storage import SequenceKv, SequenceKvFactory
from ferrum_ref.interfaces.llm import Logits
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_llm import DecoderLlm

CATCH_UP_TOKENS: Final = 512  # of one forward, so that its activations stay small
Item = tuple[str, Sequence[int], int, bool]


class ContiguousKv(SequenceKv, Protocol):
    """A cache whose first `num_tokens` rows are the keys and the values `[S, G, D]` of each layer."""

    keys: list[TensorRef]
    values: list[TensorRef]


@runtime_checkable
class CountingBytes(Protocol):
    """A decode backend that tells what its caches take."""

    def size_bytes(self) -> int:
        """Bytes of all caches."""


Cache = TypeVar("Cache", bound=ContiguousKv)


class SteppedLlm(DecoderLlm[Cache]):
    """Caches by id; a call that raises has changed none of them.  [LM-LLM-1..14; D-25, D-36]

    The first token after a prompt hands the prompt's K/V over, which are then held twice.
    """

    def __init__(self, decoder: Decoder, caches: SequenceKvFactory[Cache], step: DecodeBackend) -> None:
        """`step`: over the decoder's own weights, and used by nobody else: its keys are the cache ids."""
        super().__init__(decoder, caches)
        self.step = step
        self._stepped: dict[str, list[int]] = {}  # tokens behind those in the contiguous cache

    def decode_batch(self, batch: Sequence[tuple[str, int, int]]) -> list[Logits]:
        """One step each, in order, once all of them were checked.  [LM-LLM-3, LM-LLM-12]"""
        for cache_id, _, _ in batch:
            self._existing(cache_id, "decode")
        self._require_distinct([cache_id for cache_id, _, _ in batch])
        self._require_decodable(batch)
        return self._steps(batch)

    def unified_forward(self, items: Sequence[Item]) -> list[Logits | None]:
        """Single final tokens of live ids are steps; all others one forward of the decoder.  [LM-LLM-6, LM-LLM-13]"""
        self._require_distinct([cache_id for cache_id, *_ in items])
        steps = [(name, tokens[0], pos) for name, tokens, pos, _ in (one for one in items if self._is_step(one))]
        chunks = [one for one in items if not self._is_step(one)]
        self._require_decodable(steps)
        before: dict[str, int | None] = {}
        for cache_id, *_ in chunks:
            before[cache_id] = self.cache_length(cache_id) if cache_id in self._caches else None
            self._take_back(cache_id)
        of_chunks = dict(zip(before, super().unified_forward(chunks), strict=True))
        try:
            rows = self._steps(steps)
        except BaseException:
            for cache_id, length in before.items():
                self.release(cache_id) if length is None else self.truncate_kv(cache_id, length)
            raise
        found = of_chunks | dict(zip((cache_id for cache_id, _, _ in steps), rows, strict=True))
        return [found[cache_id] for cache_id, *_ in items]

    def forward_verify(self, cache_id: str, tokens: Sequence[int]) -> Logits:
        """All of `tokens` in one forward of the decoder.  [LM-LLM-5, LM-LLM-13; D-36]"""
        if len(tokens):
            self._existing(cache_id, "forward_verify")
            self._take_back(cache_id)
        return super().forward_verify(cache_id, tokens)

    def release(self, cache_id: str) -> None:
        """[LM-LLM-4]"""
        super().release(cache_id)
        self._stepped.pop(cache_id, None)
        self.step.release_kv_cache(cache_id)

    def reset(self) -> None:
        """[LM-LLM-4]"""
        for cache_id in list(self._caches):
            self.release(cache_id)
        super().reset()

    def cache_length(self, cache_id: str) -> int:
        """Tokens cached.  Raises NotFoundError."""
        return super().cache_length(cache_id) + len(self._stepped.get(cache_id, ()))

    def truncate_kv(self, cache_id: str, new_len: int) -> None:
        """Forget the tokens from `new_len` on.  Raises NotFoundError; InvalidParameterError outside [0, length]."""
        cache = self._existing(cache_id, "truncate_kv")
        length = self.cache_length(cache_id)
        if not 0 <= new_len <= length:
            raise InvalidParameterError(
                f"truncate_kv: {cache_id!r} to {new_len} tokens, but {length} are cached; expected 0 to that"
            )
        if new_len == length:
            return
        self.step.release_kv_cache(cache_id)
        del self._stepped.get(cache_id, [])[max(0, new_len - cache.num_tokens) :]
        cache.truncate(min(new_len, cache.num_tokens))

    def cache_metrics_snapshot(self) -> dict[str, Any] | None:
        """As ever, with the decode backend's bytes where it tells them.  [LM-LLM-8, LM-LLM-14]"""
        found = super().cache_metrics_snapshot() or {}
        num_tokens = found["num_tokens"] + sum(len(tokens) for tokens in self._stepped.values())
        step_bytes = self.step.size_bytes() if isinstance(self.step, CountingBytes) else 0
        return found | {"num_tokens": num_tokens, "size_bytes": found["size_bytes"] + step_bytes}

    def _is_step(self, item: Item) -> bool:
        cache_id, tokens, _, is_final = item
        return is_final and len(tokens) == 1 and cache_id in self._caches

    def _steps(self, batch: Sequence[tuple[str, int, int]]) -> list[Logits]:
        """A step each; if one raises, those before it are taken back."""
        rows: list[Logits] = []
        try:
            for cache_id, token, pos in batch:
                rows.append(self._step(cache_id, token, pos))
        except BaseException:
            for cache_id, _, pos in batch[: len(rows)]:
                self.truncate_kv(cache_id, pos)
            raise
        return rows

    def _step(self, cache_id: str, token: int, pos: int) -> Logits:
        if not self.step.has_kv_cache(cache_id):
            self._hand_over(cache_id)
        try:
            tensor = self.step.decode_step(token, pos, cache_id)
            logits = np.asarray(tensor.to_numpy(), dtype=np.float32).reshape(-1)
        except BaseException:  # whatever it left there, the tokens known here are the truth
            self.step.release_kv_cache(cache_id)
            raise
        self._stepped.setdefault(cache_id, []).append(token)
        return logits

    def _hand_over(self, cache_id: str) -> None:
        """The decode backend takes over all that is cached.  [DB-INIT-1]"""
        self._catch_up(cache_id)
        cache = self._caches[cache_id]
        pairs = zip(cache.keys, cache.values, strict=True)
        rows = [(_first_rows(k, cache.num_tokens), _first_rows(v, cache.num_tokens)) for k, v in pairs]
        self.step.init_kv_cache(cache_id, rows, cache.num_tokens)

    def _take_back(self, cache_id: str) -> None:
        """The decoder goes on with this id; the next step hands it over again. Changes no length."""
        self._catch_up(cache_id)
        self.step.release_kv_cache(cache_id)

    def _catch_up(self, cache_id: str) -> None:
        """Run what was stepped through the decoder, after which the contiguous cache holds every token."""
        waiting = self._stepped.get(cache_id, [])
        while waiting:
            chunk, cache = waiting[:CATCH_UP_TOKENS], self._caches[cache_id]
            self._run([cache], ForwardBatch.build([chunk], [cache.num_tokens], [False]))
            del waiting[: len(chunk)]


def _first_rows(tensor: TensorRef, count: int) -> TensorRef:
    """The first `count` entries of `[S, G, D]`. Pure."""
    shape = tensor.shape()
    return tensor.view((0, 0, 0), (count, *shape[1:]))
