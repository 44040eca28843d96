"""Keys and values of one sequence of a decode backend.   Clauses: DB-CACHE-1..2 (specs/decode_backend.md)."""

from __future__ import annotations

import numpy as np

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.kernel_ops import AttentionOps
from ferrum_ref.interfaces.tensor import TensorFactory, TensorOps, TensorRef
from ferrum_ref.interfaces.transformer import TransformerConfig
from ferrum_ref.types.devices import DataType, Device

FIRST_CAPACITY_TOKENS = 64


class SequenceCache:
    """K and V `[capacity, G, D]` of every layer, of which `num_tokens` rows count.

    Capacity doubles up to the context. Without a `write_kv` kernel the rows are joined by concatenation instead.
    """

    def __init__(
        self,
        config: TransformerConfig,
        dtype: DataType,
        device: Device,
        factory: TensorFactory,
        tensor_ops: TensorOps,
        attention: AttentionOps,
    ) -> None:
        self.num_tokens = 0
        self._capacity = 0
        self._config = config
        self._dtype, self._device = dtype, device
        self._factory, self._tensor_ops, self._attention = factory, tensor_ops, attention
        self._keys: list[TensorRef] = []
        self._values: list[TensorRef] = []

    def reserve(self, num_tokens: int) -> None:
        """Room for that many tokens in all; what is cached stays."""
        if num_tokens <= self._capacity:
            return
        wanted = max(num_tokens, 2 * self._capacity, FIRST_CAPACITY_TOKENS)
        self._capacity = max(num_tokens, min(wanted, self._config.max_seq_len))
        self._keys, self._values = (self._enlarged(tensors) for tensors in (self._keys, self._values))

    def store(self, layer: int, k: TensorRef, v: TensorRef) -> None:
        """Write k, v `[n, G, D]` behind the tokens that count; they count once `num_tokens` says so. Mutates."""
        for tensors, rows in ((self._keys, k), (self._values, v)):
            tensors[layer] = self._with_rows(tensors[layer], rows, self.num_tokens)

    def read(self, layer: int, num_tokens: int) -> tuple[TensorRef, TensorRef]:
        """K and V `[1, num_tokens, G, D]` of the first tokens. Pure."""
        k, v = (rows_of(tensors[layer], 0, num_tokens) for tensors in (self._keys, self._values))
        return k.reshape((1, *k.shape())), v.reshape((1, *v.shape()))

    def size_bytes(self) -> int:
        """Bytes allocated."""
        return sum(tensor.size_bytes() for tensor in (*self._keys, *self._values))

    def _enlarged(self, old: list[TensorRef]) -> list[TensorRef]:
        shape = (self._capacity, self._config.num_kv_heads, self._config.head_dim)
        new = [self._factory.zeros(shape, self._dtype, self._device) for _ in range(self._config.num_layers)]
        return [
            self._with_rows(tensor, rows_of(cached, 0, self.num_tokens), 0)
            for tensor, cached in zip(new, old or new, strict=True)
        ]

    def _with_rows(self, tensor: TensorRef, rows: TensorRef, start: int) -> TensorRef:
        """`tensor` with `rows` from `start` on: itself where the backend writes in place, else a new one."""
        end = start + rows.shape()[0]
        if start == end:
            return tensor
        try:
            self._attention.write_kv(tensor, rows, np.arange(start, end))
            return tensor
        except UnsupportedError:
            parts = [rows_of(tensor, 0, start), rows, rows_of(tensor, end, tensor.shape()[0])]
            return self._tensor_ops.concat([part for part in parts if part.shape()[0]], 0)


def rows_of(tensor: TensorRef, start: int, end: int) -> TensorRef:
    """Entries [start, end) of the first axis; the rest whole. Pure."""
    shape = tensor.shape()
    return tensor.view((start, *(0 for _ in shape[1:])), (end, *shape[1:]))
