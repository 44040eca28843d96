"""A `DecodeBackend` over device memory: every step launched, or recorded once as a CUDA graph and replayed.

Clauses: BK-CUPY-17..19 (specs/backend_cupy.md), DB-* (specs/decode_backend.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ferrum_cupy.decode_step import Cursor, DecodeStep
from ferrum_cupy.machine import DeviceArray
from ferrum_cupy.storage import ARRAY_TYPES
from ferrum_cupy.tensor import CupyTensor
from ferrum_ref.errors import BackendError
from ferrum_ref.interfaces.decode_sequences import (
    FIRST_CAPACITY_TOKENS,
    SequenceDecodeBackend,
    check_max_tokens,
    doubled_capacity,
)
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.transformer import TransformerWeights


class _Sequence:
    """K and V (capacity, G, D) a layer, the cursor over them, and the recorded step, if any."""

    def __init__(self, keys: list[DeviceArray], values: list[DeviceArray], cursor: Cursor, num_tokens: int) -> None:
        self.keys, self.values, self.cursor, self.num_tokens = keys, values, cursor, num_tokens
        self.replay: Callable[[], DeviceArray] | None = None

    @property
    def capacity(self) -> int:
        return int(self.keys[0].shape[0])

    def size_bytes(self) -> int:
        """Bytes allocated."""
        return sum(int(array.nbytes) for array in (*self.keys, *self.values))


class CupyDecodeBackend(SequenceDecodeBackend[_Sequence]):
    """Keeps K/V by key; a call that raises has changed nothing that is read later.  [BK-CUPY-17..19]"""

    def __init__(self, weights: TransformerWeights, *, use_graphs: bool = False, max_tokens: int | None = None) -> None:
        """use_graphs: record the step once for each sequence and capacity, and replay it.

        max_tokens bounds the context below that of the weights. Raises InvalidParameterError (max_tokens),
        UnsupportedError (graphs on a machine without them), BackendError (weights of another backend).
        """
        check_max_tokens("CupyDecodeBackend", max_tokens)
        self._step = DecodeStep(weights)
        super().__init__(self._step.config, self._step.kind, max_tokens)
        self._machine = self._step.machine
        if use_graphs:
            self._machine.check_graphs()
        self._use_graphs = use_graphs

    def name(self) -> str:
        return f"cupy{', graphs' if self._use_graphs else ''}, on {self._machine.device}"

    def _begun(self, kv_data: Sequence[tuple[TensorRef, TensorRef]], prefill_len: int) -> _Sequence:
        pairs = [(self._rows(k, "K", prefill_len), self._rows(v, "V", prefill_len)) for k, v in kv_data]
        keys, values = self._empty(self._capacity_for(max(1, prefill_len)))
        for layer, (k, v) in enumerate(pairs):
            keys[layer][:prefill_len], values[layer][:prefill_len] = k, v
        return _Sequence(keys, values, self._step.cursor(), prefill_len)

    def _stepped(self, sequence: _Sequence, token_id: int, position: int) -> TensorRef:
        self._reserve(sequence, position + 1)
        sequence.cursor.token.fill(token_id)
        sequence.cursor.position.fill(position)
        if self._use_graphs:
            sequence.replay = sequence.replay or self._machine.record(lambda: self._run(sequence))
            logits = sequence.replay()
        else:
            logits = self._run(sequence)
        return CupyTensor(self._machine, logits.copy().reshape(1, 1, -1), self._step.kind)

    def _run(self, sequence: _Sequence) -> DeviceArray:
        return self._step.run(sequence.cursor, sequence.keys, sequence.values)

    def _rows(self, tensor: TensorRef, name: str, count: int) -> DeviceArray:
        """The first `count` rows of a handed-over `[S, G, D]`.  Raises BackendError for another backend's tensor."""
        if not isinstance(tensor, CupyTensor) or tensor.machine is not self._machine:
            raise BackendError(
                f"init_kv_cache: {name}: got {type(tensor).__name__} of {tensor.dtype().name}, expected tensors of this"
                f" backend in the weights' type {self._step.kind.name}"
            )
        return tensor.array[:count]

    def _capacity_for(self, num_tokens: int) -> int:
        return doubled_capacity(num_tokens, self._max_tokens, FIRST_CAPACITY_TOKENS)

    def _empty(self, capacity: int) -> tuple[list[DeviceArray], list[DeviceArray]]:
        xp, kind = self._machine.xp, ARRAY_TYPES[self._step.kind]
        shape = (capacity, self._config.num_kv_heads, self._config.head_dim)
        keys = [xp.zeros(shape, kind) for _ in range(self._config.num_layers)]
        return keys, [xp.zeros(shape, kind) for _ in range(self._config.num_layers)]

    def _reserve(self, sequence: _Sequence, num_tokens: int) -> None:
        """Room for `num_tokens`; a recording over the old memory is forgotten.  [DB-CACHE-2]"""
        if num_tokens <= sequence.capacity:
            return
        keys, values = self._empty(self._capacity_for(num_tokens))
        for old, new in zip((*sequence.keys, *sequence.values), (*keys, *values), strict=True):
            new[: sequence.capacity] = old
        sequence.keys, sequence.values, sequence.replay = keys, values, None
