"""A `DecodeBackend` over device memory: every step launched, or recorded once as a CUDA graph and replayed.

Clauses: BK-CUPY-17..19 (specs/backend_cupy.md), DB-* (specs/decode_backend.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

from ferrum_cupy.decode_step import Cursor, DecodeStep
from ferrum_cupy.machine import DeviceArray
from ferrum_cupy.storage import ARRAY_TYPES
from ferrum_cupy.tensor import CupyTensor
from ferrum_ref.errors import BackendError, InvalidParameterError, NotFoundError, ResourceExhaustedError
from ferrum_ref.interfaces.decode_backend import DecodeBackend
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.transformer import TransformerWeights

FIRST_CAPACITY_TOKENS: Final = 64


class _Sequence:
    """K and V (capacity, G, D) a layer, the cursor over them, and the recorded step, if any."""

    def __init__(self, keys: list[DeviceArray], values: list[DeviceArray], cursor: Cursor, num_tokens: int) -> None:
        self.keys, self.values, self.cursor, self.num_tokens = keys, values, cursor, num_tokens
        self.replay: Callable[[], DeviceArray] | None = None

    @property
    def capacity(self) -> int:
        return int(self.keys[0].shape[0])


class CupyDecodeBackend(DecodeBackend):
    """Keeps K/V by key; a call that raises has changed nothing that is read later.  [BK-CUPY-17..19]"""

    def __init__(self, weights: TransformerWeights, *, use_graphs: bool = False, max_tokens: int | None = None) -> None:
        """use_graphs: record the step once for each sequence and capacity, and replay it.

        max_tokens bounds the context below that of the weights. Raises InvalidParameterError (max_tokens),
        UnsupportedError (graphs on a machine without them), BackendError (weights of another backend).
        """
        if max_tokens is not None and max_tokens < 1:
            raise InvalidParameterError(f"CupyDecodeBackend: max_tokens is {max_tokens}, expected at least 1")
        self._step = DecodeStep(weights)
        self._config, self._machine = self._step.config, self._step.machine
        if use_graphs:
            self._machine.check_graphs()
        self._use_graphs = use_graphs
        self.max_tokens = min(max_tokens or self._config.max_seq_len, self._config.max_seq_len)
        self._sequences: dict[str, _Sequence] = {}
        self._lock = threading.Lock()

    def name(self) -> str:
        return f"cupy{', graphs' if self._use_graphs else ''}, on {self._machine.device}"

    def decode_step(self, token_id: int, position: int, cache_key: str) -> TensorRef:
        """Logits `[1, 1, V]` after `token_id`.  [BK-CUPY-17, DB-STEP-1..5; D-43]"""
        with self._lock:
            sequence = self._checked(token_id, position, cache_key)
            self._reserve(sequence, position + 1)
            sequence.cursor.token.fill(token_id)
            sequence.cursor.position.fill(position)
            if self._use_graphs:
                sequence.replay = sequence.replay or self._machine.record(lambda: self._run(sequence))
                logits = sequence.replay()
            else:
                logits = self._run(sequence)
            sequence.num_tokens += 1
            return CupyTensor(self._machine, logits.copy().reshape(1, 1, -1), self._step.kind)

    def init_kv_cache(self, cache_key: str, kv_data: Sequence[tuple[TensorRef, TensorRef]], prefill_len: int) -> None:
        """Copy a prefill's K and V, `[S, G, D]` a layer; replaces an existing key.  [DB-INIT-1..4]"""
        pairs = [(self._rows(k, "K", prefill_len), self._rows(v, "V", prefill_len)) for k, v in kv_data]
        if len(pairs) != self._config.num_layers:
            raise BackendError(
                f"init_kv_cache {cache_key!r}: got {len(pairs)} layers, expected {self._config.num_layers}"
            )
        if prefill_len > self.max_tokens:
            raise ResourceExhaustedError(
                f"init_kv_cache {cache_key!r}: {prefill_len} tokens exceed the context of {self.max_tokens}"
            )
        keys, values = self._empty(self._capacity_for(max(1, prefill_len)))
        for layer, (k, v) in enumerate(pairs):
            keys[layer][:prefill_len], values[layer][:prefill_len] = k, v
        with self._lock:
            self._sequences[cache_key] = _Sequence(keys, values, self._step.cursor(), prefill_len)

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
            return sum(int(a.nbytes) for s in self._sequences.values() for a in (*s.keys, *s.values))

    def _run(self, sequence: _Sequence) -> DeviceArray:
        return self._step.run(sequence.cursor, sequence.keys, sequence.values)

    def _existing(self, cache_key: str) -> _Sequence:
        if cache_key not in self._sequences:
            raise NotFoundError(f"decode: no sequence {cache_key!r}; call init_kv_cache first")
        return self._sequences[cache_key]

    def _checked(self, token_id: int, position: int, cache_key: str) -> _Sequence:
        sequence = self._existing(cache_key)
        if position != sequence.num_tokens:
            raise BackendError(
                f"decode_step {cache_key!r}: position is {position}, expected {sequence.num_tokens}, the tokens cached"
            )
        if not 0 <= token_id < self._config.vocab_size:
            raise BackendError(f"decode_step: token is {token_id}, expected one in [0, {self._config.vocab_size})")
        if position >= self.max_tokens:
            raise ResourceExhaustedError(f"decode_step {cache_key!r}: the context of {self.max_tokens} tokens is full")
        return sequence

    def _rows(self, tensor: TensorRef, name: str, count: int) -> DeviceArray:
        """The first `count` rows of a handed-over `[S, G, D]`.  Raises BackendError."""
        expected = (self._config.num_kv_heads, self._config.head_dim)
        if (
            not isinstance(tensor, CupyTensor)
            or tensor.machine is not self._machine
            or tensor.kind is not self._step.kind
        ):
            raise BackendError(
                f"init_kv_cache: {name}: got {type(tensor).__name__} of {tensor.dtype().name}, expected tensors of this"
                f" backend in the weights' type {self._step.kind.name}"
            )
        shape = tensor.shape()
        if count < 0 or len(shape) != 3 or shape[1:] != expected or shape[0] < count:
            raise BackendError(
                f"init_kv_cache: {name}: got shape {shape} for {count} tokens, expected at least ({count}, "
                f"{expected[0]}, {expected[1]}) and a count of 0 or more"
            )
        return tensor.array[:count]

    def _capacity_for(self, num_tokens: int) -> int:
        capacity = FIRST_CAPACITY_TOKENS
        while capacity < num_tokens:
            capacity *= 2
        return min(capacity, self.max_tokens)

    def _empty(self, capacity: int) -> tuple[list[DeviceArray], list[DeviceArray]]:
        xp, kind = self._machine.xp, ARRAY_TYPES[self._step.kind]
        shape = (capacity, self._config.num_kv_heads, self._config.head_dim)
        keys = [xp.zeros(shape, kind) for _ in range(self._config.num_layers)]
        return keys, [xp.zeros(shape, kind) for _ in range(self._config.num_layers)]

    def _reserve(self, sequence: _Sequence, num_tokens: int) -> None:
        """Room for `num_tokens`; a recording over the old memory is forgotten.  [DB-CACHE-2]"""
        if num_tokens <= sequence.capacity:
            return
        keys, values = self._empty(self._capacity_for(num_tokens))
        for old, new in zip((*sequence.keys, *sequence.values), (*keys, *values), strict=True):
            new[: sequence.capacity] = old
        sequence.keys, sequence.values, sequence.replay = keys, values, None
