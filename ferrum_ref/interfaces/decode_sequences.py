"""A decode backend's bookkeeping: which key holds which sequence, how long each may grow, what is refused, in turn.

Clauses: DB-STEP-3..5, DB-INIT-1..4, DB-CACHE-1..4, DB-BASE-1..2 (specs/decode_backend.md).
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Sequence
from typing import Final, Generic, Protocol, TypeVar

from ferrum_ref.errors import BackendError, InvalidParameterError, NotFoundError, ResourceExhaustedError
from ferrum_ref.interfaces.decode_backend import DecodeBackend
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.transformer import TransformerConfig
from ferrum_ref.types.devices import DataType

FIRST_CAPACITY_TOKENS: Final = 64


class CachedSequence(Protocol):
    """K and V of one sequence, in whatever form a backend keeps them; `num_tokens` of its rows count."""

    num_tokens: int

    def size_bytes(self) -> int:
        """Bytes allocated."""


Held = TypeVar("Held", bound=CachedSequence)


class SequenceDecodeBackend(DecodeBackend, Generic[Held]):
    """Everything of a `DecodeBackend` but memory and arithmetic, which `_begun` and `_stepped` add.  [DB-BASE-1]

    Both are called with arguments that were checked. What they raise leaves keys and lengths as they were, so `_begun`
    must touch no sequence that exists, and `_stepped` no row of its sequence but the one at `position`.
    """

    def __init__(self, config: TransformerConfig, element: DataType, max_tokens: int | None = None) -> None:
        """element: of the weights, and so of K and V.  max_tokens bounds the context below that of the weights."""
        self._config, self._element = config, element
        self._max_tokens = min(max_tokens or config.max_seq_len, config.max_seq_len)
        self._sequences: dict[str, Held] = {}
        self._lock = threading.Lock()

    @abstractmethod
    def _begun(self, kv_data: Sequence[tuple[TensorRef, TensorRef]], prefill_len: int) -> Held:
        """A new sequence with copies of the first `prefill_len` rows; `num_tokens` says as many. Not locked."""

    @abstractmethod
    def _stepped(self, sequence: Held, token_id: int, position: int) -> TensorRef:
        """Logits `[1, 1, V]` after `token_id`, its K and V in row `position`, for which room is to be made. Locked."""

    @property
    def max_tokens(self) -> int:
        """Longest sequence, in tokens."""
        return self._max_tokens

    def decode_step(self, token_id: int, position: int, cache_key: str) -> TensorRef:
        """Logits `[1, 1, V]` after `token_id`.  [DB-STEP-1..6; D-43]"""
        with self._lock:
            sequence = self._existing(cache_key)
            self._check_step(sequence, token_id, position, cache_key)
            logits = self._stepped(sequence, token_id, position)
            sequence.num_tokens += 1
        return logits

    def init_kv_cache(self, cache_key: str, kv_data: Sequence[tuple[TensorRef, TensorRef]], prefill_len: int) -> None:
        """Copy a prefill's K and V, `[S, G, D]` a layer; replaces an existing key.  [DB-INIT-1..4]"""
        self._check_handover(cache_key, kv_data, prefill_len)
        sequence = self._begun(kv_data, prefill_len)
        with self._lock:
            self._sequences[cache_key] = sequence

    def has_kv_cache(self, cache_key: str) -> bool:
        with self._lock:
            return cache_key in self._sequences

    def release_kv_cache(self, cache_key: str) -> None:
        with self._lock:
            self._sequences.pop(cache_key, None)

    def cached_tokens(self, cache_key: str) -> int:
        """Tokens cached of a sequence (extension). Raises NotFoundError. Pure."""
        with self._lock:
            return self._existing(cache_key).num_tokens

    def size_bytes(self) -> int:
        """Bytes of all caches (extension). Pure."""
        with self._lock:
            return sum(sequence.size_bytes() for sequence in self._sequences.values())

    def _existing(self, cache_key: str) -> Held:
        if cache_key not in self._sequences:
            raise NotFoundError(f"decode_step: cache_key: {cache_key!r} is unknown; hand a prefill over first")
        return self._sequences[cache_key]

    def _check_step(self, sequence: Held, token_id: int, position: int, cache_key: str) -> None:
        if position != sequence.num_tokens:
            raise BackendError(
                f"decode_step: position: got {position}, expected {sequence.num_tokens}, "
                f"the number of tokens cached of {cache_key!r}"
            )
        if not 0 <= token_id < self._config.vocab_size:
            raise BackendError(
                f"decode_step: token_id: got {token_id}, expected [0, {self._config.vocab_size}); "
                "the tokenizer and the model disagree"
            )
        if position >= self._max_tokens:
            raise ResourceExhaustedError(
                f"decode_step: {cache_key!r} holds {position} tokens, the whole context of {self._max_tokens}; "
                "release it or generate less"
            )

    def _check_handover(self, cache_key: str, kv_data: Sequence[tuple[TensorRef, TensorRef]], prefill_len: int) -> None:
        config = self._config
        if prefill_len < 0 or len(kv_data) != config.num_layers:
            raise BackendError(
                f"init_kv_cache: {cache_key!r}: got {len(kv_data)} layers and prefill_len {prefill_len}, "
                f"expected {config.num_layers} pairs (K, V) and a length of 0 or more"
            )
        if prefill_len > self._max_tokens:
            raise ResourceExhaustedError(
                f"init_kv_cache: {cache_key!r}: {prefill_len} tokens exceed the context of {self._max_tokens}"
            )
        for layer, pair in enumerate(kv_data):
            for part, tensor in zip("KV", pair, strict=True):
                shape = tensor.shape()
                if len(shape) != 3 or shape[0] < prefill_len or shape[1:] != (config.num_kv_heads, config.head_dim):
                    raise BackendError(
                        f"init_kv_cache: {cache_key!r}: {part} of layer {layer} has shape {shape}, expected "
                        f"[at least {prefill_len}, {config.num_kv_heads}, {config.head_dim}] (tokens, heads, head size)"
                    )
                if tensor.dtype() is not self._element:
                    raise BackendError(
                        f"init_kv_cache: {cache_key!r}: {part} of layer {layer} is {tensor.dtype()}, "
                        f"expected {self._element} like the weights; convert it with to_dtype"
                    )


def doubled_capacity(num_tokens: int, most_tokens: int, first_tokens: int = FIRST_CAPACITY_TOKENS) -> int:
    """The first of first_tokens, twice that, ... that holds num_tokens, cut at most_tokens. Pure.  [DB-BASE-2]"""
    capacity = first_tokens
    while capacity < num_tokens:
        capacity *= 2
    return min(capacity, most_tokens)


def check_max_tokens(owner: str, max_tokens: int | None) -> None:
    """Raises InvalidParameterError for a bound below 1."""
    if max_tokens is not None and max_tokens < 1:
        raise InvalidParameterError(f"{owner}: max_tokens is {max_tokens}, expected at least 1")
