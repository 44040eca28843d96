"""K/V tensors cut into blocks that any sequence's block table may point at.

Holds data only: which block belongs to whom is the manager's business.  Clauses: LM-PAGED-1..4 (specs/llm.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import InvalidParameterError, UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.kernel_ops import AttentionParams, LinearOps
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.kv_cache.storage_contiguous import KvShape, require_attention, rows_of
from ferrum_ref.types.devices import Device

IntArray = npt.NDArray[np.int64]
MAX_SHARED_TOKENS = 16  # decodes and verified drafts; longer chunks fill an attention call by themselves


class PagedKvStorage:
    """K and V `[num_blocks, block_size, G, D]` per layer.  [LM-PAGED-1..4]"""

    def __init__(self, backend: ComputeBackend, shape: KvShape, num_blocks: int, block_size: int) -> None:
        """Allocates all blocks.  Raises InvalidParameterError unless both counts are positive."""
        for name, count in (("num_blocks", num_blocks), ("block_size", block_size)):
            if count < 1:
                raise InvalidParameterError(f"PagedKvStorage: {name} must be >= 1, got {count}")
        factory = backend.tensor_factory()
        dims = (num_blocks, block_size, shape.num_kv_heads, shape.head_dim)
        self.shape = shape
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keys = [factory.zeros(dims, shape.dtype, shape.device) for _ in range(shape.num_layers)]
        self.values = [factory.zeros(dims, shape.dtype, shape.device) for _ in range(shape.num_layers)]
        self._backend = backend
        self._attention = require_attention(backend, "PagedKvStorage")

    @property
    def num_layers(self) -> int:
        return self.shape.num_layers

    @property
    def num_kv_heads(self) -> int:
        return self.shape.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.shape.head_dim

    @property
    def device(self) -> Device:
        return self.shape.device

    def size_bytes(self) -> int:
        """Bytes allocated for K and V of all layers."""
        return self.num_blocks * self.block_size * self.shape.bytes_per_token()

    def bind(
        self, block_tables: Sequence[Sequence[int]], num_cached: Sequence[int], num_new: Sequence[int]
    ) -> PagedKvBatch:
        """The caches of one forward's sequences: num_cached[i] tokens there, num_new[i] to come. Pure.  [LM-PAGED-1]

        Raises InvalidParameterError for a block outside the storage or a table too short for its tokens.
        """
        for table, cached, new in zip(block_tables, num_cached, num_new, strict=True):
            self._check_blocks("bind", table)
            if cached < 0 or new < 1 or len(table) * self.block_size < cached + new:
                raise InvalidParameterError(
                    f"PagedKvStorage.bind: {len(table)} blocks of {self.block_size} tokens cannot hold"
                    f" {cached} cached + {new} new tokens (new must be >= 1); extend the table first"
                )
        return PagedKvBatch(self, self._backend, block_tables, num_cached, num_new)

    def copy_block(self, src: int, dst: int) -> None:
        """Block dst becomes a copy of block src in every layer. Mutates the storage.  [LM-PAGED-2]

        Raises InvalidParameterError for a block outside the storage.
        """
        self._check_blocks("copy_block", (src, dst))
        slots = self.slots_of([dst], 0, self.block_size)
        dims = (self.block_size, self.shape.num_kv_heads, self.shape.head_dim)
        for caches in (self.keys, self.values):
            for cache in caches:
                self._attention.write_kv(cache, rows_of(cache, src, src + 1).reshape(dims), slots)

    def read(self, layer: int, block_ids: Sequence[int], num_tokens: int) -> tuple[TensorRef, TensorRef]:
        """The first `num_tokens` cached K and V of a table, each `[num_tokens, G, D]`. Pure.  [LM-PAGED-3]

        Raises InvalidParameterError for an unknown layer or block, or more tokens than the blocks hold.
        """
        self._check_blocks("read", block_ids)
        if not 0 <= layer < self.num_layers:
            raise InvalidParameterError(f"PagedKvStorage.read: layer must be in [0, {self.num_layers}), got {layer}")
        if not 0 <= num_tokens <= len(block_ids) * self.block_size:
            raise InvalidParameterError(
                f"PagedKvStorage.read: {len(block_ids)} blocks of {self.block_size} hold no {num_tokens} tokens"
            )
        slots = self.slots_of(block_ids, 0, num_tokens)
        return self._gather(self.keys[layer], slots), self._gather(self.values[layer], slots)

    def slots_of(self, block_ids: Sequence[int], start: int, end: int) -> IntArray:
        """Slot (block * block_size + offset) of each position in [start, end) of a table. Pure."""
        positions = np.arange(start, end)
        blocks = np.asarray(block_ids, dtype=np.int64)
        return blocks[positions // self.block_size] * self.block_size + positions % self.block_size

    def _gather(self, cache: TensorRef, slots: IntArray) -> TensorRef:
        heads, head_dim = self.shape.num_kv_heads, self.shape.head_dim
        kernels = self._backend.kernel_ops()
        linear: LinearOps | None = kernels.linear_ops() if kernels is not None else None
        if linear is None:
            raise UnsupportedError(f"PagedKvStorage.read: backend {self._backend.name()!r} has no row gather")
        flat = cache.reshape((self.num_blocks * self.block_size, heads * head_dim))
        return linear.embedding(flat, slots).reshape((len(slots), heads, head_dim))

    def _check_blocks(self, operation: str, block_ids: Sequence[int]) -> None:
        for block in block_ids:
            if not 0 <= block < self.num_blocks:
                raise InvalidParameterError(
                    f"PagedKvStorage.{operation}: block must be in [0, {self.num_blocks}), got {block}"
                )


class PagedKvBatch:
    """Block tables of one forward's sequences. Neighbours with equally few new tokens share one attention call."""

    def __init__(
        self,
        storage: PagedKvStorage,
        backend: ComputeBackend,
        block_tables: Sequence[Sequence[int]],
        num_cached: Sequence[int],
        num_new: Sequence[int],
    ) -> None:
        self._storage = storage
        self._attention = require_attention(backend, "PagedKvBatch")
        self._tensor_ops = backend.tensor_ops()
        per_sequence = [
            storage.slots_of(table, cached, cached + new)
            for table, cached, new in zip(block_tables, num_cached, num_new, strict=True)
        ]
        self._slots = np.concatenate(per_sequence) if per_sequence else np.empty(0, dtype=np.int64)
        self._groups = list(_groups(storage.block_size, block_tables, num_cached, num_new))

    def append(self, layer: int, k: TensorRef, v: TensorRef) -> None:
        """Store k, v `[N, G, D]` at each sequence's next positions. Mutates the storage.  [LM-KV-1]"""
        self._attention.write_kv(self._storage.keys[layer], k, self._slots)
        self._attention.write_kv(self._storage.values[layer], v, self._slots)

    def attend(self, layer: int, q: TensorRef, params: AttentionParams, *, sinks: TensorRef | None = None) -> TensorRef:
        """q `[N, H, D]` -> `[N, H, D]`, causal over each row's own blocks. Pure.  [LM-KV-2]"""
        keys, values = self._storage.keys[layer], self._storage.values[layer]
        _, num_heads, head_dim = q.shape()
        extra = {} if sinks is None else {"sinks": sinks}
        outputs = []
        for start, batch, new, table, lens in self._groups:
            rows = q if len(self._groups) == 1 else rows_of(q, start, start + batch * new)
            query = rows.reshape((batch, new, num_heads, head_dim))
            found = self._attention.paged_attention(query, keys, values, table, params, context_lens=lens, **extra)
            outputs.append(found.reshape((batch * new, num_heads, head_dim)))
        return outputs[0] if len(outputs) == 1 else self._tensor_ops.concat(outputs, 0)


def _groups(
    block_size: int, block_tables: Sequence[Sequence[int]], num_cached: Sequence[int], num_new: Sequence[int]
) -> list[tuple[int, int, int, IntArray, IntArray]]:
    """(first row, sequences, new tokens each, block table [B, max_blocks], context lengths [B]) per attention call."""
    groups = []
    first = row = 0
    while first < len(num_new):
        last = first + 1
        while num_new[first] <= MAX_SHARED_TOKENS and last < len(num_new) and num_new[last] == num_new[first]:
            last += 1
        lens = np.array([num_cached[i] + num_new[i] for i in range(first, last)], dtype=np.int64)
        used = [block_tables[i][: -(-int(lens[i - first]) // block_size)] for i in range(first, last)]
        table = np.zeros((last - first, max(map(len, used))), dtype=np.int64)
        for i, blocks in enumerate(used):
            table[i, : len(blocks)] = blocks
        groups.append((row, last - first, num_new[first], table, lens))
        row += (last - first) * num_new[first]
        first = last
    return groups
