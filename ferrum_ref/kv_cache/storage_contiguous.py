"""K/V tensors of one sequence each, tokens in a row: the simplest cache, and the yardstick for the paged one.

Clauses: LM-KV-1..4 (specs/llm.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from ferrum_ref.errors import InvalidParameterError, ResourceExhaustedError, UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.kernel_ops import AttentionOps, AttentionParams
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.types.devices import DataType, Device

FIRST_CAPACITY_TOKENS = 256


@dataclass(frozen=True, slots=True)
class KvShape:
    """Sizes that every cache of one model shares."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: DataType = DataType.FP32
    device: Device = Device.CPU

    def bytes_per_token(self) -> int:
        """K and V of every layer, in bytes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.size_bytes()


def require_attention(backend: ComputeBackend, operation: str) -> AttentionOps:
    """The backend's attention.  Raises UnsupportedError if it has none."""
    kernels = backend.kernel_ops()
    attention = kernels.attention_ops() if kernels is not None else None
    if attention is None:
        raise UnsupportedError(f"{operation}: backend {backend.name()!r} offers no attention; choose another backend")
    return attention


class ContiguousKvCache:
    """K and V `[capacity, G, D]` per layer; `num_tokens` of them are valid.  [LM-KV-3]

    Capacity doubles as needed up to `max_tokens`; growing copies what is cached and changes no value.
    """

    def __init__(self, backend: ComputeBackend, shape: KvShape, max_tokens: int) -> None:
        if max_tokens < 1:
            raise InvalidParameterError(f"ContiguousKvCache: max_tokens must be >= 1, got {max_tokens}")
        self.shape = shape
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self.capacity = 0
        self.keys: list[TensorRef] = []
        self.values: list[TensorRef] = []
        self._backend = backend
        self._attention = require_attention(backend, "ContiguousKvCache")

    def reserve(self, num_new: int) -> None:
        """Make room for `num_new` more tokens; the cached ones stay.  Raises ResourceExhaustedError.  [LM-KV-3]"""
        needed = self.num_tokens + num_new
        if needed > self.max_tokens:
            raise ResourceExhaustedError(
                f"KV cache: {self.num_tokens} cached + {num_new} new tokens exceed the context of {self.max_tokens};"
                " shorten the prompt or generate less"
            )
        if needed > self.capacity:
            self._grow(min(max(needed, 2 * self.capacity, FIRST_CAPACITY_TOKENS), self.max_tokens))

    def truncate(self, new_len: int) -> None:
        """Forget the tokens from `new_len` on.  Raises InvalidParameterError unless 0 <= new_len <= num_tokens."""
        if not 0 <= new_len <= self.num_tokens:
            raise InvalidParameterError(
                f"KV cache: truncate to {new_len} tokens, but {self.num_tokens} are cached; expected 0 to that"
            )
        self.num_tokens = new_len

    def size_bytes(self) -> int:
        """Bytes allocated."""
        return self.capacity * self.shape.bytes_per_token()

    def _grow(self, capacity: int) -> None:
        layers = range(self.shape.num_layers)
        self.keys = [self._enlarged(self.keys[i] if self.capacity else None, capacity) for i in layers]
        self.values = [self._enlarged(self.values[i] if self.capacity else None, capacity) for i in layers]
        self.capacity = capacity

    def _enlarged(self, old: TensorRef | None, capacity: int) -> TensorRef:
        shape = self.shape
        dims = (capacity, shape.num_kv_heads, shape.head_dim)
        tensor = self._backend.tensor_factory().zeros(dims, shape.dtype, shape.device)
        if old is not None and self.num_tokens:
            cached = old.view((0, 0, 0), (self.num_tokens, *dims[1:]))
            self._attention.write_kv(tensor, cached, np.arange(self.num_tokens))
        return tensor


class ContiguousKvBatch:
    """Several contiguous caches taking part in one forward; nothing counts as cached before `commit`.  [LM-KV-4]"""

    def __init__(self, backend: ComputeBackend, parts: Sequence[tuple[ContiguousKvCache, int]]) -> None:
        """`parts` pairs each cache with its number of new tokens; reserves room in all of them.

        Raises ResourceExhaustedError before any cache changes its length.
        """
        self._parts = list(parts)
        self._attention = require_attention(backend, "ContiguousKvBatch")
        self._tensor_ops = backend.tensor_ops()
        for cache, num_new in self._parts:
            cache.reserve(num_new)
        self._slots = [np.arange(c.num_tokens, c.num_tokens + n) for c, n in self._parts]
        ends = list(accumulate(n for _, n in self._parts))
        self._rows = [(end - n, end) for (_, n), end in zip(self._parts, ends, strict=True)]

    def append(self, layer: int, k: TensorRef, v: TensorRef) -> None:
        """Store k, v `[N, G, D]` at each sequence's next positions. Mutates the caches.  [LM-KV-1]"""
        single = len(self._parts) == 1
        for (cache, _), (start, end), slots in zip(self._parts, self._rows, self._slots, strict=True):
            self._attention.write_kv(cache.keys[layer], k if single else rows_of(k, start, end), slots)
            self._attention.write_kv(cache.values[layer], v if single else rows_of(v, start, end), slots)

    def attend(self, layer: int, q: TensorRef, params: AttentionParams, *, sinks: TensorRef | None = None) -> TensorRef:
        """q `[N, H, D]` -> `[N, H, D]`, causal, one attention per sequence. Pure.  [LM-KV-2]"""
        extra = {} if sinks is None else {"sinks": sinks}
        outputs = []
        for (cache, num_new), (start, end) in zip(self._parts, self._rows, strict=True):
            total = cache.num_tokens + num_new
            query = q if len(self._parts) == 1 else rows_of(q, start, end)
            found = self._attention.attention(
                with_batch_axis(query),
                with_batch_axis(rows_of(cache.keys[layer], 0, total)),
                with_batch_axis(rows_of(cache.values[layer], 0, total)),
                params,
                **extra,
            )
            outputs.append(found.reshape(query.shape()))
        return outputs[0] if len(outputs) == 1 else self._tensor_ops.concat(outputs, 0)

    def commit(self) -> None:
        """Count the new tokens as cached. Mutates the caches' lengths.  [LM-KV-4]"""
        for cache, num_new in self._parts:
            cache.num_tokens += num_new


class ContiguousKvFactory:
    """Makes contiguous caches of one shape, and binds several of them for a forward."""

    def __init__(self, backend: ComputeBackend, shape: KvShape, max_tokens: int) -> None:
        self._backend = backend
        self._shape = shape
        self._max_tokens = max_tokens

    def new_cache(self) -> ContiguousKvCache:
        """An empty cache."""
        return ContiguousKvCache(self._backend, self._shape, self._max_tokens)

    def bind(self, caches: Sequence[ContiguousKvCache], num_new: Sequence[int]) -> ContiguousKvBatch:
        """Room in every cache, or ResourceExhaustedError before any length changes."""
        return ContiguousKvBatch(self._backend, list(zip(caches, num_new, strict=True)))


def rows_of(tensor: TensorRef, start: int, end: int) -> TensorRef:
    """Entries [start, end) of the first axis; the rest whole. Pure."""
    shape = tensor.shape()
    return tensor.view((start, *(0 for _ in shape[1:])), (end, *shape[1:]))


def with_batch_axis(tensor: TensorRef) -> TensorRef:
    """`[...]` -> `[1, ...]`. Pure."""
    return tensor.reshape((1, *tensor.shape()))
