"""A `DecodeBackend` that runs a decode step as one function: eager, compiled, or replayed as a CUDA graph.

Clauses: BK-TORCH-22..25 (specs/backend_torch.md), DB-* (specs/decode_backend.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

import torch

from ferrum_ref.errors import (
    BackendError,
    InvalidParameterError,
    NotFoundError,
    ResourceExhaustedError,
    UnsupportedError,
)
from ferrum_ref.interfaces.decode_backend import DecodeBackend
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.transformer import TransformerWeights
from ferrum_torch.decode_step import DecodeStep
from ferrum_torch.tensor import TorchTensor

MODES: Final = ("eager", "compiled", "graph")
FIRST_CAPACITY_TOKENS: Final = 64
_WARM_UP_RUNS: Final = 3  # lazy initialisation inside torch's libraries must not happen while a graph is recorded

Step = Callable[[torch.Tensor, torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.Tensor]


class _Sequence:
    """K and V `[capacity, G, D]` a layer; the graph that was recorded over them, if any."""

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], num_tokens: int) -> None:
        self.keys, self.values, self.num_tokens = keys, values, num_tokens
        self.replay: Callable[[int, int], torch.Tensor] | None = None

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[0]


class TorchDecodeBackend(DecodeBackend):
    """Keeps K/V by key; a call that raises has changed nothing that is read later.  [BK-TORCH-22..25]"""

    def __init__(self, weights: TransformerWeights, mode: str = "eager", max_tokens: int | None = None) -> None:
        """mode: "eager"; "compiled" (torch.compile, once a capacity); "graph" (a CUDA graph a sequence and capacity).

        max_tokens bounds the context below that of the weights. Raises InvalidParameterError (mode, max_tokens),
        UnsupportedError ("graph" without CUDA), BackendError (weights of another backend).
        """
        if mode not in MODES:
            raise InvalidParameterError(f"TorchDecodeBackend: mode is {mode!r}, expected one of {', '.join(MODES)}")
        if max_tokens is not None and max_tokens < 1:
            raise InvalidParameterError(f"TorchDecodeBackend: max_tokens is {max_tokens}, expected at least 1")
        self._eager = DecodeStep(weights)
        self._config = self._eager.config
        self._device, self._dtype = self._eager.embedding.device, self._eager.embedding.dtype
        if mode == "graph" and self._device.type != "cuda":
            raise UnsupportedError(
                f"TorchDecodeBackend: mode 'graph' needs CUDA, the weights are on {self._device}; use 'compiled'"
            )
        self._mode = mode
        self._step: Step = torch.compile(self._eager.__call__, dynamic=False) if mode == "compiled" else self._eager
        self.max_tokens = min(max_tokens or self._config.max_seq_len, self._config.max_seq_len)
        self._sequences: dict[str, _Sequence] = {}
        self._lock = threading.Lock()

    def name(self) -> str:
        return f"torch, {self._mode}, on {self._device}"

    def decode_step(self, token_id: int, position: int, cache_key: str) -> TensorRef:
        """Logits `[1, 1, V]` after `token_id`.  [BK-TORCH-22, DB-STEP-1..5; D-43]"""
        with self._lock, torch.inference_mode():
            sequence = self._checked(token_id, position, cache_key)
            self._reserve(sequence, position + 1)
            if self._mode == "graph":
                sequence.replay = sequence.replay or self._recorded(sequence)
                logits = sequence.replay(token_id, position)
            else:
                ids = torch.tensor([token_id], device=self._device)
                where = torch.tensor([position], device=self._device)
                logits = self._step(ids, where, sequence.keys, sequence.values)
            sequence.num_tokens += 1
            return TorchTensor.wrap(logits.clone().view(1, 1, -1))

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
        fresh = _Sequence(*self._empty(self._capacity_for(max(1, prefill_len))), prefill_len)
        for layer, (k, v) in enumerate(pairs):
            fresh.keys[layer][:prefill_len] = k
            fresh.values[layer][:prefill_len] = v
        with self._lock:
            self._sequences[cache_key] = fresh

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
            return sum(t.nbytes for s in self._sequences.values() for t in (*s.keys, *s.values))

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

    def _rows(self, tensor: TensorRef, name: str, count: int) -> torch.Tensor:
        """The first `count` rows of a handed-over `[S, G, D]`.  Raises BackendError."""
        expected = (self._config.num_kv_heads, self._config.head_dim)
        if not isinstance(tensor, TorchTensor) or tensor.data.dtype != self._dtype:
            raise BackendError(
                f"init_kv_cache: {name}: got {type(tensor).__name__} of {tensor.dtype().name}, "
                f"expected torch tensors of the weights' type {self._dtype}"
            )
        shape = tensor.shape()
        if count < 0 or len(shape) != 3 or shape[1:] != expected or shape[0] < count:
            raise BackendError(
                f"init_kv_cache: {name}: got shape {shape} for {count} tokens, expected at least ({count}, "
                f"{expected[0]}, {expected[1]}) and a count of 0 or more"
            )
        return tensor.data[:count]

    def _capacity_for(self, num_tokens: int) -> int:
        capacity = FIRST_CAPACITY_TOKENS
        while capacity < num_tokens:
            capacity *= 2
        return min(capacity, self.max_tokens)

    def _empty(self, capacity: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Zeros, since an unread row still meets a weight of zero in the products: it must be no NaN."""
        shape = (capacity, self._config.num_kv_heads, self._config.head_dim)
        layers = range(self._config.num_layers)
        keys = [torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in layers]
        return keys, [torch.zeros_like(key) for key in keys]

    def _reserve(self, sequence: _Sequence, num_tokens: int) -> None:
        """Room for `num_tokens`; a graph over the old memory is forgotten.  [DB-CACHE-2]"""
        if num_tokens <= sequence.capacity:
            return
        keys, values = self._empty(self._capacity_for(num_tokens))
        for old, new in zip((*sequence.keys, *sequence.values), (*keys, *values), strict=True):
            new[: sequence.capacity] = old
        sequence.keys, sequence.values, sequence.replay = keys, values, None

    def _recorded(self, sequence: _Sequence) -> Callable[[int, int], torch.Tensor]:
        """The step over this sequence's memory as a CUDA graph, replayed with a token and a position.  [BK-TORCH-24]"""
        ids = torch.zeros(1, dtype=torch.int64, device=self._device)
        where = torch.full((1,), sequence.num_tokens, dtype=torch.int64, device=self._device)
        side: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_RUNS):  # each writes the row that the real step writes next
                self._eager(ids, where, sequence.keys, sequence.values)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._eager(ids, where, sequence.keys, sequence.values)

        def replay(token_id: int, position: int) -> torch.Tensor:
            ids.fill_(token_id)
            where.fill_(position)
            graph.replay()
            return logits

        return replay
