"""A forward without a cache: each layer's K/V live only as long as its attention.

Clauses: MX-FORWARD-1..2 (specs/model_executor.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Protocol, runtime_checkable

from ferrum_ref.errors import ModelError, UnsupportedError
from ferrum_ref.executor.inputs import prefill_rows
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.forward import ForwardBatch, Ints, Observer, RaggedDecoder
from ferrum_ref.interfaces.kernel_ops import AttentionOps, AttentionParams
from ferrum_ref.interfaces.kv_storage import KvBatch
from ferrum_ref.interfaces.model_executor import PrefillInput
from ferrum_ref.interfaces.tensor import TensorOps, TensorRef


@runtime_checkable
class OnBackend(Protocol):
    """A decoder that says what it runs on."""

    @property
    def backend(self) -> ComputeBackend:
        """The backend."""


@runtime_checkable
class FromEmbeddings(Protocol):
    """A decoder that also starts from embeddings."""

    def embed(self, token_ids: Ints) -> TensorRef:
        """What the first layer gets for these ids: `[N, E]`."""

    def forward(
        self, batch: ForwardBatch, kv: KvBatch, observe: Observer | None = None, *, inputs: TensorRef | None = None
    ) -> TensorRef:
        """`inputs` `[N, E]` stand in place of the embedding's rows."""


def forward_batch(input: TensorRef) -> tuple[ForwardBatch, tuple[int, int], TensorRef | None]:
    """(batch of whole rows from position 0, (B, T), embeddings `[B*T, E]` if that is what was given). Pure.

    Raises ModelError for another rank than 1 (ids), 2 (ids) or 3 (embeddings), no row or no token.  [MX-FORWARD-2]
    """
    shape, embeddings = input.shape(), None
    if len(shape) == 3:
        if 0 in shape:
            raise ModelError(f"forward: embeddings {list(shape)} hold no token; give at least one a row")
        rows = [[0] * shape[1]] * shape[0]
        embeddings = input.reshape((shape[0] * shape[1], shape[2]))
    else:
        rows = prefill_rows(PrefillInput.new(input)).tokens
    return ForwardBatch.build(rows, [0] * len(rows)).with_all_logits(), (len(rows), len(rows[0])), embeddings


def run_forward(decoder: RaggedDecoder, batch: ForwardBatch, kv: KvBatch, embeddings: TensorRef | None) -> TensorRef:
    """Logits `[N, V]`.  Raises UnsupportedError for embeddings where the decoder takes ids only.  [MX-FORWARD-1]"""
    if embeddings is None:
        return decoder.forward(batch, kv)
    if not isinstance(decoder, FromEmbeddings):
        raise UnsupportedError(f"forward: {type(decoder).__name__} starts from ids only; give ids [T] or [B, T]")
    return decoder.forward(batch, kv, inputs=embeddings)


def attention_of(decoder: object, operation: str) -> tuple[AttentionOps, TensorOps]:
    """The attention that `decoder` runs with.  Raises UnsupportedError if it tells no backend, or one without any."""
    backend = decoder.backend if isinstance(decoder, OnBackend) else None
    kernels = backend.kernel_ops() if backend is not None else None
    attention = kernels.attention_ops() if kernels is not None else None
    if backend is None or attention is None:
        raise UnsupportedError(f"{operation}: {type(decoder).__name__} gives no access to its attention")
    return attention, backend.tensor_ops()


class TransientKv:
    """`KvBatch` over nothing: sequences of lengths T_i from position 0, one layer at a time.  [MX-FORWARD-1]"""

    def __init__(self, attention: AttentionOps, tensor_ops: TensorOps, lengths: Sequence[int]) -> None:
        self._attention = attention
        self._tensor_ops = tensor_ops
        self._lengths = lengths
        self._layer: tuple[int, TensorRef, TensorRef] | None = None

    def append(self, layer: int, k: TensorRef, v: TensorRef) -> None:
        """Keep this layer's k, v `[N, G, D]` until the next layer's."""
        self._layer = (layer, k, v)

    def attend(self, layer: int, q: TensorRef, params: AttentionParams, *, sinks: TensorRef | None = None) -> TensorRef:
        """q `[N, H, D]` -> `[N, H, D]`; neighbours of equal length share one call.  Raises UnsupportedError."""
        if self._layer is None or self._layer[0] != layer:
            raise UnsupportedError(f"forward: layer {layer} attends over keys that were never given; use prefill")
        _, k, v = self._layer
        extra = {} if sinks is None else {"sinks": sinks}
        outputs, start = [], 0
        for length, members in groupby(self._lengths):
            batch = len(list(members))
            end = start + batch * length
            query, keys, values = (_cut(tensor, start, end, batch, length) for tensor in (q, k, v))
            found = self._attention.attention(query, keys, values, params, **extra)
            outputs.append(found.reshape((batch * length, *q.shape()[1:])))
            start = end
        return outputs[0] if len(outputs) == 1 else self._tensor_ops.concat(outputs, 0)


def _cut(tensor: TensorRef, start: int, end: int, batch: int, length: int) -> TensorRef:
    """Rows [start, end) of `[N, ...]` as `[batch, length, ...]`. Pure."""
    rest = tensor.shape()[1:]
    rows = tensor if (start, end) == (0, tensor.shape()[0]) else tensor.view((start, 0, 0), (end, *rest))
    return rows.reshape((batch, length, *rest))
