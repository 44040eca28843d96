"""Caches of latent attention: one vector a token and layer, which is key and value at once, kept once.

Contiguous and paged, in the manner of the caches they derive from: the same slots, the same attention, half the bytes.
Clauses: LM-LATENT-3, LM-LATENT-6 (specs/decoder_families.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.kv_cache.storage_contiguous import (
    ContiguousKvBatch,
    ContiguousKvCache,
    ContiguousKvFactory,
    KvShape,
    require_attention,
    rows_of,
)
from ferrum_ref.kv_cache.storage_paged import PagedKvBatch, PagedKvStorage


class LatentKvCache(ContiguousKvCache):
    """A contiguous cache whose values are its keys.  [LM-LATENT-6]"""

    def size_bytes(self) -> int:
        return super().size_bytes() // 2

    def _grow(self, capacity: int) -> None:
        layers = range(self.shape.num_layers)
        self.keys = [self._enlarged(self.keys[i] if self.capacity else None, capacity) for i in layers]
        self.values = self.keys
        self.capacity = capacity


class LatentKvBatch(ContiguousKvBatch):
    """Several such caches taking part in one forward."""

    def append(self, layer: int, k: TensorRef, v: TensorRef) -> None:
        """Store k, which v must be, at each sequence's next positions. Mutates the caches.  [LM-LATENT-6]

        Raises InvalidParameterError for values of their own.
        """
        _require_shared(k, v)
        single = len(self._parts) == 1
        for (cache, _), (start, end), slots in zip(self._parts, self._rows, self._slots, strict=True):
            self._attention.write_kv(cache.keys[layer], k if single else rows_of(k, start, end), slots)


class LatentKvFactory(ContiguousKvFactory):
    """Makes contiguous latent caches, and binds several of them for a forward."""

    def new_cache(self) -> LatentKvCache:
        return LatentKvCache(self._backend, self._shape, self._max_tokens)

    def bind(self, caches: Sequence[ContiguousKvCache], num_new: Sequence[int]) -> LatentKvBatch:
        return LatentKvBatch(self._backend, list(zip(caches, num_new, strict=True)))


class LatentKvStorage(PagedKvStorage):
    """Latents `[num_blocks, block_size, G, D]` per layer.  [LM-LATENT-6]"""

    def __init__(self, backend: ComputeBackend, shape: KvShape, num_blocks: int, block_size: int) -> None:
        """Allocates all blocks.  Raises InvalidParameterError unless both counts are positive."""
        for name, count in (("num_blocks", num_blocks), ("block_size", block_size)):
            if count < 1:
                raise InvalidParameterError(f"LatentKvStorage: {name} must be >= 1, got {count}")
        factory = backend.tensor_factory()
        dims = (num_blocks, block_size, shape.num_kv_heads, shape.head_dim)
        self.shape = shape
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keys = [factory.zeros(dims, shape.dtype, shape.device) for _ in range(shape.num_layers)]
        self.values = self.keys
        self._backend = backend
        self._attention = require_attention(backend, "LatentKvStorage")

    def size_bytes(self) -> int:
        return super().size_bytes() // 2

    def bind(
        self, block_tables: Sequence[Sequence[int]], num_cached: Sequence[int], num_new: Sequence[int]
    ) -> LatentPagedBatch:
        super().bind(block_tables, num_cached, num_new)  # refuses what does not fit
        return LatentPagedBatch(self, self._backend, block_tables, num_cached, num_new)


class LatentPagedBatch(PagedKvBatch):
    """Block tables of one forward's sequences over latents."""

    def append(self, layer: int, k: TensorRef, v: TensorRef) -> None:
        """Store k, which v must be, at each sequence's next positions. Mutates the storage.  [LM-LATENT-6]

        Raises InvalidParameterError for values of their own.
        """
        _require_shared(k, v)
        self._attention.write_kv(self._storage.keys[layer], k, self._slots)


def _require_shared(k: TensorRef, v: TensorRef) -> None:
    if v is not k:
        raise InvalidParameterError(
            "latent cache: append: got values of their own, expected the keys themselves: this cache holds latents only"
        )
