"""Hidden states and attention weights of a forward, for whoever asks.

Weights come from the backend's own attention, applied to unit vectors in the place of values: row t of the result is
the row of probabilities itself, whatever windows, scales or caps that attention knows.
Clauses: MX-OUTPUT-4..5 (specs/model_executor.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.kernel_ops import AttentionOps, AttentionParams
from ferrum_ref.interfaces.kv_storage import KvBatch
from ferrum_ref.interfaces.tensor import TensorFactory, TensorRef

Array = npt.NDArray[Any]
Keys = Callable[[int, int], TensorRef]


@runtime_checkable
class ReadableKv(Protocol):
    """A storage whose cached keys can be looked at."""

    def read(self, layer: int, block_ids: Sequence[int], num_tokens: int) -> tuple[TensorRef, TensorRef]:
        """The first `num_tokens` K and V of those blocks, each `[num_tokens, G, D]`."""


class HiddenStates:
    """Listens to a decoder: the embedding, every layer's output but the last, and the final norm's.  [MX-OUTPUT-4]"""

    def __init__(self, num_layers: int) -> None:
        self._names = ["embedding", *(f"layers.{i}.hidden" for i in range(num_layers - 1)), "final_norm"]
        self._seen: dict[str, TensorRef] = {}

    def __call__(self, name: str, tensor: TensorRef) -> None:
        if name in self._names:
            self._seen[name] = tensor

    def states(self) -> list[Array]:
        """`num_layers + 1` arrays `[N, E]`.  Raises UnsupportedError if the decoder does not tell them."""
        missing = [name for name in self._names if name not in self._seen]
        if missing:
            raise UnsupportedError(f"hidden_states: this decoder does not report {missing[0]!r}; do not ask for them")
        return [np.asarray(self._seen[name].to_numpy()) for name in self._names]


class WeightRecorder:
    """A `KvBatch` that passes everything on and keeps each layer's attention weights.  [MX-OUTPUT-5]"""

    def __init__(
        self,
        inner: KvBatch,
        attention: AttentionOps,
        factory: TensorFactory,
        keys: Keys,
        num_new: Sequence[int],
        num_total: Sequence[int],
    ) -> None:
        """keys(layer, sequence) -> `[S, G, D]`; num_total counts each sequence's tokens, cached and new."""
        self._inner = inner
        self._attention = attention
        self._factory = factory
        self._keys = keys
        self._num_new = num_new
        self._num_total = num_total
        self.weights: list[list[Array]] = []

    def append(self, layer: int, k: TensorRef, v: TensorRef) -> None:
        self._inner.append(layer, k, v)

    def attend(self, layer: int, q: TensorRef, params: AttentionParams, *, sinks: TensorRef | None = None) -> TensorRef:
        rows, start = [], 0
        for sequence, (new, total) in enumerate(zip(self._num_new, self._num_total, strict=True)):
            query = q.view((start, 0, 0), (start + new, *q.shape()[1:])).reshape((1, new, *q.shape()[1:]))
            rows.append(self._probabilities(query, self._keys(layer, sequence), total, params, sinks))
            start += new
        self.weights.append(rows)
        return (
            self._inner.attend(layer, q, params) if sinks is None else self._inner.attend(layer, q, params, sinks=sinks)
        )

    def _probabilities(
        self, query: TensorRef, keys: TensorRef, total: int, params: AttentionParams, sinks: TensorRef | None
    ) -> Array:
        """`[H, T, S]`, head_dim keys at a time; with sinks a row sums to less than 1."""
        extra = {} if sinks is None else {"sinks": sinks}
        _, groups, head_dim = keys.shape()
        found = []
        for first in range(0, total, head_dim):
            units = np.zeros((1, total, groups, head_dim), dtype=np.float32)
            width = min(head_dim, total - first)
            units[0, np.arange(first, first + width), :, np.arange(width)] = 1.0
            values = self._factory.from_numpy(units).to_dtype(keys.dtype())
            part = self._attention.attention(query, keys.reshape((1, *keys.shape())), values, params, **extra)
            found.append(np.asarray(part.to_numpy())[0, :, :, :width])
        return np.concatenate(found, axis=-1).swapaxes(0, 1)


def padded(parts: Sequence[Array], columns: Sequence[slice], num_columns: int) -> Array:
    """Rows `[T_i, ...]` at their columns of `[B, num_columns, ...]`, zeros elsewhere. Pure."""
    out = np.zeros((len(parts), num_columns, *parts[0].shape[1:]), dtype=parts[0].dtype)
    for row, (part, where) in enumerate(zip(parts, columns, strict=True)):
        out[row, where] = part
    return out


def padded_weights(parts: Sequence[Array], columns: Sequence[slice], num_columns: int) -> Array:
    """Rows `[H, T_i, S_i]` as `[B, H, num_columns, max S]`, zeros elsewhere. Pure."""
    longest = max(part.shape[2] for part in parts)
    out = np.zeros((len(parts), parts[0].shape[0], num_columns, longest), dtype=parts[0].dtype)
    for row, (part, where) in enumerate(zip(parts, columns, strict=True)):
        out[row, :, where, : part.shape[2]] = part
    return out
