"""A decode loop that keeps its own key/value caches and bypasses tensor operations: one token in, logits out.

Upstream: `ferrum_interfaces::decode_backend`.  Clauses: DB-* in specs/decode_backend.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from ferrum_ref.interfaces.tensor import TensorRef


class DecodeBackend(ABC):
    """Decodes one token of one sequence at a time; sequences are named by strings.  [DB-CACHE-1..4]

    Safe to share between threads: calls take exclusive access, one after the other (D-47).
    """

    @abstractmethod
    def decode_step(self, token_id: int, position: int, cache_key: str) -> TensorRef:
        """Run `token_id` at absolute `position`: logits `[1, 1, V]` (D-43).  [DB-STEP-1..5]

        Appends its K and V to the sequence. Raises NotFoundError (key), BackendError (position is not the cached
        length, token outside the vocabulary), ResourceExhaustedError (context full), all before anything changes.
        """

    @abstractmethod
    def init_kv_cache(self, cache_key: str, kv_data: Sequence[tuple[TensorRef, TensorRef]], prefill_len: int) -> None:
        """Take over the K and V of a prefill of `prefill_len` tokens.  [DB-INIT-1..4]

        One (K, V) a layer, each `[S, G, D]`, token-major, S >= prefill_len, K already rotated; the first prefill_len
        rows are copied. An existing key is replaced. Raises BackendError (layers, shapes, element type),
        ResourceExhaustedError (beyond the context); the old cache then stays.
        """

    @abstractmethod
    def has_kv_cache(self, cache_key: str) -> bool:
        """Whether the sequence is known. Pure."""

    @abstractmethod
    def release_kv_cache(self, cache_key: str) -> None:
        """Forget the sequence; an unknown key is no error."""

    @abstractmethod
    def name(self) -> str:
        """A label for logs."""
