"""K/V tensors of one sequence, of which the layers that slide keep no more than their window's tokens.

A layer that slides holds position p in row p % capacity; capacity is the window but for the query's own position, and
some slack, so that the last few tokens can be taken back. The other layers are those of a contiguous cache.
Clauses: LM-RING-1..5 (specs/llm.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import InvalidParameterError, ResourceExhaustedError, UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.kernel_ops import AttentionParams, LinearOps
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.kv_cache.storage_contiguous import (
    FIRST_CAPACITY_TOKENS,
    KvShape,
    require_attention,
    rows_of,
    with_batch_axis,
)

DEFAULT_SLACK_TOKENS = 16  # as many can be taken back at any time
IntArray = npt.NDArray[np.int64]


class RingKvCache:
    """K and V `[capacity, G, D]` per layer; capacity is the layer's own.  [LM-RING-1..3]"""

    def __init__(
        self,
        backend: ComputeBackend,
        shape: KvShape,
        max_tokens: int,
        windows: Sequence[int],
        slack_tokens: int = DEFAULT_SLACK_TOKENS,
    ) -> None:
        """`windows`: tokens that a query of each layer sees, itself included; 0: all.

        Raises InvalidParameterError for a bound below 1, a negative window or slack, or another number of windows.
        """
        if max_tokens < 1 or slack_tokens < 0 or len(windows) != shape.num_layers or min(windows, default=0) < 0:
            raise InvalidParameterError(
                f"RingKvCache: got max_tokens={max_tokens}, slack_tokens={slack_tokens} and windows {list(windows)}; "
                f"expected a positive bound, no negative numbers, and {shape.num_layers} windows"
            )
        self.shape = shape
        self.max_tokens = max_tokens
        self.windows = tuple(windows)
        self.slack_tokens = slack_tokens
        self.num_tokens = 0
        self.furthest = 0  # most tokens held since it was empty: what a ring lost, it lost to them
        self.capacities = [0] * shape.num_layers
        self.keys: list[TensorRef | None] = [None] * shape.num_layers
        self.values: list[TensorRef | None] = [None] * shape.num_layers
        self._backend = backend
        self._attention = require_attention(backend, "RingKvCache")

    def reserve(self, num_new: int) -> None:
        """Room for `num_new` more tokens; what is cached stays.  Raises ResourceExhaustedError.  [LM-RING-2]"""
        needed = self.num_tokens + num_new
        if needed > self.max_tokens:
            raise ResourceExhaustedError(
                f"KV cache: {self.num_tokens} cached + {num_new} new tokens exceed the context of {self.max_tokens};"
                " shorten the prompt or generate less"
            )
        for layer, capacity in enumerate(self.capacities):
            limit = self._limit(layer)
            if capacity < min(needed, limit):
                self._grow(layer, min(max(needed, 2 * capacity, FIRST_CAPACITY_TOKENS), limit))

    def truncate(self, new_len: int) -> None:
        """Forget the tokens from `new_len` on.  [LM-RING-3]

        Raises InvalidParameterError unless 0 <= new_len <= num_tokens, or where the window before `new_len` is gone:
        0 and the last `slack_tokens` lengths are always possible.
        """
        if not 0 <= new_len <= self.num_tokens:
            raise InvalidParameterError(
                f"KV cache: truncate to {new_len} tokens, but {self.num_tokens} are cached; expected 0 to that"
            )
        for window in self.windows:
            if window and new_len and max(0, new_len - window + 1) < self._kept_from(window):
                raise InvalidParameterError(
                    f"KV cache: truncate to {new_len} of {self.num_tokens} tokens: a window of {window} before them is "
                    f"no longer kept; expected 0, or at most {self.slack_tokens} tokens less than there are"
                )
        self.num_tokens = new_len
        self.furthest = 0 if not new_len else self.furthest

    def size_bytes(self) -> int:
        """Bytes allocated."""
        per_layer = self.shape.bytes_per_token() // self.shape.num_layers
        return sum(self.capacities) * per_layer

    def slots(self, layer: int, start: int, end: int) -> IntArray:
        """The rows of positions [start, end) in a layer's tensors.  Pure."""
        positions = np.arange(start, end)
        return positions % self.capacities[layer] if self.windows[layer] else positions

    def tensors(self, layer: int) -> tuple[TensorRef, TensorRef]:
        """K and V of a layer.  Raises ResourceExhaustedError before room is reserved."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            raise ResourceExhaustedError("KV cache: nothing is allocated yet; reserve room first")
        return keys, values

    def committed(self, num_new: int) -> None:
        """`num_new` tokens were written.  Mutates the length."""
        self.num_tokens += num_new
        self.furthest = max(self.furthest, self.num_tokens)

    def _kept_from(self, window: int) -> int:
        """First position that a layer of this window still holds for certain."""
        return max(0, self.furthest - (window - 1) - self.slack_tokens)

    def _limit(self, layer: int) -> int:
        window = self.windows[layer]
        ring = window - 1 + self.slack_tokens
        return min(self.max_tokens, max(ring, 1)) if window else self.max_tokens

    def _grow(self, layer: int, capacity: int) -> None:
        """A ring grows before it ever turns round: until then rows are positions."""
        dims = (capacity, self.shape.num_kv_heads, self.shape.head_dim)
        for held in (self.keys, self.values):
            tensor = self._backend.tensor_factory().zeros(dims, self.shape.dtype, self.shape.device)
            old = held[layer]
            if old is not None and self.num_tokens:
                cached = rows_of(old, 0, self.num_tokens)
                self._attention.write_kv(tensor, cached, np.arange(self.num_tokens))
            held[layer] = tensor
        self.capacities[layer] = capacity


@dataclass(slots=True)
class _Staged:
    """New rows of one layer that slides, kept until `commit`."""

    keys: TensorRef
    values: TensorRef


class RingKvBatch:
    """Several ring caches taking part in one forward.  [LM-RING-4]

    A layer that slides attends over its cached window and the new rows beside it; its new rows are written by
    `commit`, since they may displace what a forward that fails must leave.
    """

    def __init__(self, backend: ComputeBackend, parts: Sequence[tuple[RingKvCache, int]]) -> None:
        """Reserves room in every cache.  Raises ResourceExhaustedError before any length changes."""
        kernels = backend.kernel_ops()
        linear: LinearOps | None = kernels.linear_ops() if kernels is not None else None
        if linear is None:
            raise UnsupportedError(f"RingKvBatch: backend {backend.name()!r} has no row gather; choose another cache")
        self._linear = linear
        self._attention = require_attention(backend, "RingKvBatch")
        self._tensor_ops = backend.tensor_ops()
        self._parts = list(parts)
        for cache, num_new in self._parts:
            cache.reserve(num_new)
        ends = np.cumsum([num_new for _, num_new in self._parts]).tolist()
        self._rows = [(end - num_new, end) for (_, num_new), end in zip(self._parts, ends, strict=True)]
        self._staged: dict[int, _Staged] = {}

    def append(self, layer: int, k: TensorRef, v: TensorRef) -> None:
        """Take k, v `[N, G, D]` as each sequence's next rows. Mutates the caches of layers that see everything."""
        self._staged[layer] = _Staged(k, v)
        for (cache, num_new), (start, end) in zip(self._parts, self._rows, strict=True):
            if not cache.windows[layer]:
                self._write(cache, layer, start, end, cache.num_tokens, num_new)

    def attend(self, layer: int, q: TensorRef, params: AttentionParams, *, sinks: TensorRef | None = None) -> TensorRef:
        """q `[N, H, D]` -> `[N, H, D]`. Pure.  [LM-KV-2, LM-RING-4]

        Raises InvalidParameterError where the layer's window is wider than what its cache keeps.
        """
        extra = {} if sinks is None else {"sinks": sinks}
        outputs = []
        for (cache, num_new), (start, end) in zip(self._parts, self._rows, strict=True):
            window = cache.windows[layer]
            if window and not 0 < params.sliding_window <= window:
                raise InvalidParameterError(
                    f"RingKvBatch: layer {layer} attends with a window of {params.sliding_window}, but its cache keeps "
                    f"{window} tokens; expected at most that, and not 0"
                )
            keys, values = self._seen(cache, layer, start, end, num_new)
            query = q if len(self._parts) == 1 else rows_of(q, start, end)
            found = self._attention.attention(
                with_batch_axis(query), with_batch_axis(keys), with_batch_axis(values), params, **extra
            )
            outputs.append(found.reshape(query.shape()))
        return outputs[0] if len(outputs) == 1 else self._tensor_ops.concat(outputs, 0)

    def commit(self) -> None:
        """Write what is staged and count it. Mutates the caches.  [LM-RING-4]"""
        for (cache, num_new), (_start, end) in zip(self._parts, self._rows, strict=True):
            for layer in self._staged:
                if cache.windows[layer]:
                    kept = min(num_new, cache.capacities[layer])
                    self._write(cache, layer, end - kept, end, cache.num_tokens + num_new - kept, kept)
            cache.committed(num_new)

    def _write(self, cache: RingKvCache, layer: int, start: int, end: int, position: int, count: int) -> None:
        staged, slots = self._staged[layer], cache.slots(layer, position, position + count)
        for tensor, rows in zip(cache.tensors(layer), (staged.keys, staged.values), strict=True):
            self._attention.write_kv(tensor, rows_of(rows, start, end), slots)

    def _seen(self, cache: RingKvCache, layer: int, start: int, end: int, num_new: int) -> tuple[TensorRef, TensorRef]:
        """K and V that the new rows may see, in the order of their positions."""
        window = cache.windows[layer]
        if not window:
            keys, values = cache.tensors(layer)
            total = cache.num_tokens + num_new
            return rows_of(keys, 0, total), rows_of(values, 0, total)
        staged = self._staged[layer]
        new = rows_of(staged.keys, start, end), rows_of(staged.values, start, end)
        before = min(cache.num_tokens, window - 1)
        if not before:
            return new
        slots = cache.slots(layer, cache.num_tokens - before, cache.num_tokens)
        old = [self._gathered(tensor, slots) for tensor in cache.tensors(layer)]
        return self._tensor_ops.concat([old[0], new[0]], 0), self._tensor_ops.concat([old[1], new[1]], 0)

    def _gathered(self, tensor: TensorRef, slots: IntArray) -> TensorRef:
        capacity, heads, head_dim = tensor.shape()
        if int(slots[-1]) - int(slots[0]) == len(slots) - 1:
            return rows_of(tensor, int(slots[0]), int(slots[-1]) + 1)
        flat = tensor.reshape((capacity, heads * head_dim))
        return self._linear.embedding(flat, slots).reshape((len(slots), heads, head_dim))


class RingKvFactory:
    """Makes ring caches of one shape, and binds several of them for a forward.  [LM-RING-5]"""

    def __init__(
        self,
        backend: ComputeBackend,
        shape: KvShape,
        max_tokens: int,
        windows: Sequence[int],
        slack_tokens: int = DEFAULT_SLACK_TOKENS,
    ) -> None:
        """`windows`: of each layer, as in RingKvCache; `[config.window_of(i) for i in range(num_layers)]`."""
        self._backend = backend
        self._shape = shape
        self._max_tokens = max_tokens
        self._windows = tuple(windows)
        self._slack_tokens = slack_tokens

    def new_cache(self) -> RingKvCache:
        """An empty cache."""
        return RingKvCache(self._backend, self._shape, self._max_tokens, self._windows, self._slack_tokens)

    def bind(self, caches: Sequence[RingKvCache], num_new: Sequence[int]) -> RingKvBatch:
        """Room in every cache, or ResourceExhaustedError before any length changes."""
        return RingKvBatch(self._backend, list(zip(caches, num_new, strict=True)))
