"""A `DecodeBackend` that runs a decode step as one function: eager, compiled, or replayed as a CUDA graph.

Clauses: BK-TORCH-22..25 (specs/backend_torch.md), DB-* (specs/decode_backend.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch

from ferrum_ref.errors import BackendError, InvalidParameterError, UnsupportedError
from ferrum_ref.interfaces.decode_sequences import SequenceDecodeBackend, check_max_tokens, doubled_capacity
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.transformer import TransformerWeights
from ferrum_torch.decode_step import DecodeStep
from ferrum_torch.tensor import TorchTensor

MODES: Final = ("eager", "compiled", "graph")
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

    def size_bytes(self) -> int:
        """Bytes allocated."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


class TorchDecodeBackend(SequenceDecodeBackend[_Sequence]):
    """Keeps K/V by key; a call that raises has changed nothing that is read later.  [BK-TORCH-22..25]"""

    def __init__(self, weights: TransformerWeights, mode: str = "eager", max_tokens: int | None = None) -> None:
        """mode: "eager"; "compiled" (torch.compile, once a capacity); "graph" (a CUDA graph a sequence and capacity).

        max_tokens bounds the context below that of the weights. Raises InvalidParameterError (mode, max_tokens),
        UnsupportedError ("graph" without CUDA), BackendError (weights of another backend).
        """
        if mode not in MODES:
            raise InvalidParameterError(f"TorchDecodeBackend: mode is {mode!r}, expected one of {', '.join(MODES)}")
        check_max_tokens("TorchDecodeBackend", max_tokens)
        self._eager = DecodeStep(weights)
        super().__init__(self._eager.config, weights.embed_weight().dtype(), max_tokens)
        self._device, self._dtype = self._eager.embedding.device, self._eager.embedding.dtype
        if mode == "graph" and self._device.type != "cuda":
            raise UnsupportedError(
                f"TorchDecodeBackend: mode 'graph' needs CUDA, the weights are on {self._device}; use 'compiled'"
            )
        self._mode = mode
        self._step: Step = torch.compile(self._eager.__call__, dynamic=False) if mode == "compiled" else self._eager

    def name(self) -> str:
        return f"torch, {self._mode}, on {self._device}"

    def _begun(self, kv_data: Sequence[tuple[TensorRef, TensorRef]], prefill_len: int) -> _Sequence:
        pairs = [(self._rows(k, "K", prefill_len), self._rows(v, "V", prefill_len)) for k, v in kv_data]
        capacity = doubled_capacity(max(1, prefill_len), self._max_tokens)
        fresh = _Sequence(*self._empty(capacity), prefill_len)
        for layer, (k, v) in enumerate(pairs):
            fresh.keys[layer][:prefill_len] = k
            fresh.values[layer][:prefill_len] = v
        return fresh

    def _stepped(self, sequence: _Sequence, token_id: int, position: int) -> TensorRef:
        with torch.inference_mode():
            self._reserve(sequence, position + 1)
            if self._mode == "graph":
                sequence.replay = sequence.replay or self._recorded(sequence)
                logits = sequence.replay(token_id, position)
            else:
                ids = torch.tensor([token_id], device=self._device)
                where = torch.tensor([position], device=self._device)
                logits = self._step(ids, where, sequence.keys, sequence.values)
            return TorchTensor.wrap(logits.clone().view(1, 1, -1))

    def _rows(self, tensor: TensorRef, name: str, count: int) -> torch.Tensor:
        """The first `count` rows of a handed-over `[S, G, D]`.  Raises BackendError for another backend's tensor."""
        if not isinstance(tensor, TorchTensor):
            raise BackendError(
                f"init_kv_cache: {name}: got {type(tensor).__name__} of {tensor.dtype().name}, "
                f"expected torch tensors of the weights' type {self._dtype}"
            )
        return tensor.data[:count]

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
        keys, values = self._empty(doubled_capacity(num_tokens, self._max_tokens))
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
