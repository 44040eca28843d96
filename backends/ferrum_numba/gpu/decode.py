"""`NumbaCudaDecodeBackend`: a decode step as a fixed sequence of kernels on one stream, or as a CUDA graph of them.

Clauses: BK-NCUDA-21..23 (specs/backend_numba_cuda.md), DB-* (specs/decode_backend.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ferrum_numba.gpu.decode_step import OPERATION, DecodeStep, Launch
from ferrum_numba.gpu.machine import DeviceArray
from ferrum_numba.gpu.operands import beside
from ferrum_numba.gpu.runtime import Runtime
from ferrum_numba.gpu.tensor import NumbaTensor
from ferrum_ref.interfaces.decode_sequences import (
    FIRST_CAPACITY_TOKENS,
    SequenceDecodeBackend,
    check_max_tokens,
    doubled_capacity,
)
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.transformer import TransformerWeights

LayerArrays = list[DeviceArray]


class SequenceCache:
    """K and V of every layer, flat (capacity, G, D), of which `num_tokens` rows count, and the launches over them.

    `replay` repeats those launches at once, if they were recorded.
    """

    def __init__(self, keys: LayerArrays, values: LayerArrays, capacity: int, launches: Sequence[Launch]) -> None:
        self.num_tokens = 0
        self.keys, self.values, self.capacity = keys, values, capacity
        self.launches = launches
        self.replay: Callable[[], None] | None = None

    def size_bytes(self) -> int:
        """Bytes allocated."""
        return sum(int(array.size) * int(array.dtype.itemsize) for array in (*self.keys, *self.values))


class NumbaCudaDecodeBackend(SequenceDecodeBackend[SequenceCache]):
    """Keeps K/V by key; a call that raises has changed nothing that is read later.  [BK-NCUDA-21..23]"""

    def __init__(
        self,
        runtime: Runtime,
        weights: TransformerWeights,
        *,
        max_tokens: int | None = None,
        use_graphs: bool = False,
    ) -> None:
        """max_tokens bounds the context below that of the weights. use_graphs: replay each sequence's step as a CUDA
        graph where the machine records one, else launch its kernels as ever.

        Raises InvalidParameterError (max_tokens), BackendError (weights of another backend), UnsupportedError (heads).
        """
        check_max_tokens(OPERATION, max_tokens)
        self._step, self._runtime, self._use_graphs = DecodeStep(runtime, weights), runtime, use_graphs
        super().__init__(self._step.config, self._step.data_type, max_tokens)

    def name(self) -> str:
        machine = self._runtime.machine
        how = "a graph" if self._use_graphs and machine.records_graphs else "launches"
        return f"numba-cuda decode step by {how}, on {machine.description}"

    def _begun(self, kv_data: Sequence[tuple[TensorRef, TensorRef]], prefill_len: int) -> SequenceCache:
        self._runtime.begin("init_kv_cache")
        pairs = [(self._rows("K", k, prefill_len), self._rows("V", v, prefill_len)) for k, v in kv_data]
        cache = self._new_cache(self._capacity_for(max(1, prefill_len)))
        for layer, (k, v) in enumerate(pairs):
            self._step.copy(k.flat(), cache.keys[layer], k.numel())
            self._step.copy(v.flat(), cache.values[layer], v.numel())
        cache.num_tokens = prefill_len
        return cache

    def _stepped(self, sequence: SequenceCache, token_id: int, position: int) -> TensorRef:
        self._runtime.begin("decode_step")
        self._reserve(sequence, position + 1)
        self._step.place(token_id, position)
        if sequence.replay is not None:
            sequence.replay()
            return self._step.logits()
        launches = sequence.launches
        self._queue(launches)
        if self._use_graphs:  # after a first run, which compiled and loaded every kernel
            sequence.replay = self._runtime.machine.record(lambda: self._queue(launches))
        return self._step.logits()

    def _queue(self, launches: Sequence[Launch]) -> None:
        for launch in launches:
            launch.queue(self._runtime)

    def _reserve(self, sequence: SequenceCache, num_tokens: int) -> None:
        """Room for `num_tokens`; launches over the old memory are forgotten.  [DB-CACHE-2]"""
        if num_tokens <= sequence.capacity:
            return
        grown = self._new_cache(self._capacity_for(num_tokens))
        count = sequence.num_tokens * self._config.num_kv_heads * self._config.head_dim
        for old, new in zip((*sequence.keys, *sequence.values), (*grown.keys, *grown.values), strict=True):
            self._step.copy(old, new, count)
        sequence.keys, sequence.values, sequence.capacity = grown.keys, grown.values, grown.capacity
        sequence.launches, sequence.replay = grown.launches, None

    def _capacity_for(self, num_tokens: int) -> int:
        return doubled_capacity(num_tokens, self._max_tokens, FIRST_CAPACITY_TOKENS)

    def _new_cache(self, capacity: int) -> SequenceCache:
        config, element = self._config, self._step.storage.element
        count, machine = capacity * config.num_kv_heads * config.head_dim, self._runtime.machine
        keys, values = ([machine.empty(count, element) for _ in range(config.num_layers)] for _ in range(2))
        return SequenceCache(keys, values, capacity, tuple(self._step.launches(keys, values, capacity)))

    def _rows(self, name: str, tensor: TensorRef, count: int) -> NumbaTensor:
        """The first rows of a handed-over `[S, G, D]`. Raises BackendError for another backend's tensor."""
        data = beside(self._runtime, "init_kv_cache", name, tensor)
        return data.view((0, 0, 0), (count, *data.shape()[1:]))
