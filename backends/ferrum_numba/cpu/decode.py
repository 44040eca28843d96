"""`NumbaDecodeBackend`: a whole decode step in one kernel, over weights as they are stored, or quantised.

    h = embedding[id]
    a = h + W_o attention(rope(norm_q(q)), K, V) + b_o,     [q; k; v] = W_qkv rms_norm(h) + b_qkv
    h' = a + W_down (silu(gate) * up) + b_down,             [gate; up] = W_gate_up rms_norm(a) + b_gate_up
    logits = W_head rms_norm(h_L)

Everything but the weights is float32 and stays so until the logits are rounded to the weights' element type.
Clauses: BK-NCPU-18..20, BK-NCPU-23..24 (specs/backend_numba.md), DB-* (specs/decode_backend.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numba
import numpy as np
from numpy.typing import NDArray

from ferrum_numba.cpu.addresses import address_of
from ferrum_numba.cpu.attending import KEYS_AT_A_TIME, attend_keys
from ferrum_numba.cpu.conversion import FLOAT32, NUMPY_TYPES, round_to, run_of, widen
from ferrum_numba.cpu.packing import StoredMatrix, stored_parts
from ferrum_numba.cpu.stepping import (
    COUNTER_BYTES,
    MATRIX_FIELDS,
    PART_FIELDS,
    PHASES_A_LAYER,
    VECTOR_FIELDS,
    attend_all,
    decode_step,
    project,
    work,
)
from ferrum_numba.cpu.tensor import NumbaTensor
from ferrum_ref.interfaces.decode_sequences import SequenceDecodeBackend, check_max_tokens, doubled_capacity
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.transformer import TransformerWeights
from ferrum_ref.interfaces.weight_parts import DecoderMatrix

Float32 = NDArray[np.float32]
TASKS_A_THREAD: Final = 4  # of a matrix product: more even out the threads, fewer cost less


class SequenceCache:
    """K and V of every layer, float32 `(L, 2, capacity, G, D)`, of which `num_tokens` rows count."""

    def __init__(self, layers: int, capacity: int, groups: int, size: int) -> None:
        self.num_tokens = 0
        self.data = np.zeros((layers, 2, capacity, groups, size), FLOAT32)

    @property
    def capacity(self) -> int:
        return int(self.data.shape[2])

    def size_bytes(self) -> int:
        """Bytes allocated."""
        return self.data.nbytes

    def grow(self, capacity: int) -> None:
        """Room for `capacity` tokens in all; what is cached stays."""
        layers, two, _, groups, size = self.data.shape
        grown = np.zeros((layers, two, capacity, groups, size), FLOAT32)
        grown[:, :, : self.num_tokens] = self.data[:, :, : self.num_tokens]
        self.data = grown

    def addresses(self) -> NDArray[np.int64]:
        """(L, 2): where each layer's keys and values lie."""
        layers, base = self.data.shape[0], address_of(self.data)
        steps: NDArray[np.int64] = np.arange(2 * layers, dtype=np.int64).reshape(layers, 2) * self.data[0, 0].nbytes
        steps += base
        return steps


LAYER_MATRICES: Final = (DecoderMatrix.QKV, DecoderMatrix.OUTPUT, DecoderMatrix.GATE_UP, DecoderMatrix.DOWN)


class DecodeWeights:
    """The tensors of `TransformerWeights` as the kernel wants them, kept alive, and the tables of their addresses."""

    def __init__(self, weights: TransformerWeights, weights_format: str) -> None:
        config = weights.config()
        self._kept: list[Any] = []
        self.matrices = np.zeros((4 * config.num_layers + 1, MATRIX_FIELDS), np.int64)
        self.vectors = np.zeros((config.num_layers, VECTOR_FIELDS), np.int64)
        self.num_bytes = 0
        self.formats: set[str] = set()
        for layer in range(config.num_layers):
            biases = (
                weights.layer_qkv_bias(layer),
                weights.layer_o_bias(layer),
                weights.layer_gate_up_bias(layer),
                weights.layer_down_bias(layer),
            )
            for index, (name, bias) in enumerate(zip(LAYER_MATRICES, biases, strict=True)):
                parts = stored_parts(weights.matrix_parts(name, layer), weights_format)
                self._put(4 * layer + index, parts, bias)
            norms = (weights.layer_input_norm_weight(layer), weights.layer_post_norm_weight(layer))
            heads = (weights.layer_q_norm_weight(layer), weights.layer_k_norm_weight(layer))
            self.vectors[layer] = [0 if norm is None else address_of(self._vector(norm)) for norm in (*norms, *heads)]
        head = stored_parts(weights.matrix_parts(DecoderMatrix.LM_HEAD), weights_format)
        self._put(4 * config.num_layers, head, None)
        self.final_norm = self._vector(weights.final_norm_weight())
        self.cos, self.sin = (self._vector(table) for table in (weights.rope_cos(), weights.rope_sin()))
        self._embedding = stored_parts(weights.matrix_parts(DecoderMatrix.EMBED), "stored")

    def row(self, token_id: int) -> Float32:
        """The embedding of a token, float32 `(E,)`."""
        start = 0
        for part in self._embedding:
            if token_id < start + part.rows:
                break
            start += part.rows
        found = np.empty(part.columns, FLOAT32)
        part.unpack(token_id - start, token_id - start + 1, found)
        return found

    def _put(self, index: int, parts: tuple[StoredMatrix, ...], bias: TensorRef | None) -> None:
        table, start = np.zeros((len(parts), PART_FIELDS), np.int64), 0
        for fields, part in zip(table, parts, strict=True):
            fields[:] = (*part.fields(), start, start + part.rows)
            start += part.rows
            self.num_bytes += part.num_bytes
            self.formats.add(part.format_name)
        self._kept += [table, *parts]
        added = 0 if bias is None else address_of(self._vector(bias))
        self.matrices[index] = (address_of(table), len(parts), start, parts[0].columns, added, 0)

    def _vector(self, tensor: TensorRef) -> Float32:
        found = run_of(widen(tensor.to_numpy(), "decode backend"))
        self._kept.append(found)
        return found


class NumbaDecodeBackend(SequenceDecodeBackend[SequenceCache]):
    """Keeps K/V by key; a call that raises has changed nothing.  [BK-NCPU-18..20, BK-NCPU-23..24]"""

    def __init__(
        self, weights: TransformerWeights, *, weights_format: str = "stored", max_tokens: int | None = None
    ) -> None:
        """`weights_format`: "stored" (every matrix as it lies, packed ones too), "float32" (packed ones are unpacked),
        or "int8", "q8_0" or "q4_0", to which every matrix but the embedding is quantised here.  `max_tokens` bounds
        the context below that of the weights.

        Raises InvalidParameterError for another format or a bound below 1; ShapeError where blocks of 32 do not fit a
        matrix; UnsupportedError for packed matrices that `quantized_linear` does not take.
        """
        check_max_tokens("NumbaDecodeBackend", max_tokens)
        super().__init__(weights.config(), weights.element_type(), max_tokens)
        self.weights_format = weights_format
        self._weights = DecodeWeights(weights, weights_format)
        config, heads, size = self._config, self._config.num_attention_heads, self._config.head_dim
        self._counters = np.zeros((PHASES_A_LAYER * config.num_layers + 1) * COUNTER_BYTES // 8, np.int64)
        self._qkv = np.empty((heads + 2 * config.num_kv_heads) * size, FLOAT32)
        self._parts = np.empty(0, FLOAT32)
        self._both = np.empty(2 * config.intermediate_size, FLOAT32)
        self._updates = np.empty(2 * config.num_layers * config.hidden_size, FLOAT32)

    def name(self) -> str:
        return f"numba-cpu decode step, {' and '.join(sorted(self._weights.formats))} weights"

    @property
    def weights_bytes(self) -> int:
        """Bytes of matrices that a step reads: all but the embedding."""
        return self._weights.num_bytes

    def _begun(self, kv_data: Sequence[tuple[TensorRef, TensorRef]], prefill_len: int) -> SequenceCache:
        config = self._config
        capacity = doubled_capacity(max(1, prefill_len), self._max_tokens)
        cache = SequenceCache(config.num_layers, capacity, config.num_kv_heads, config.head_dim)
        for layer, pair in enumerate(kv_data):
            for index, tensor in enumerate(pair):
                cache.data[layer, index, :prefill_len] = widen(tensor.to_numpy()[:prefill_len], "init_kv_cache")
        cache.num_tokens = prefill_len
        return cache

    def _stepped(self, sequence: SequenceCache, token_id: int, position: int) -> NumbaTensor:
        if position >= sequence.capacity:
            sequence.grow(doubled_capacity(position + 1, self._max_tokens))
        logits = np.empty((1, 1, self._config.vocab_size), FLOAT32)
        self._launch(sequence, self._weights.row(token_id), position, logits)
        return NumbaTensor(round_to(logits, NUMPY_TYPES[self._element]))

    def _launch(self, cache: SequenceCache, embedding: Float32, position: int, logits: Float32) -> None:
        config, weights = self._config, self._weights
        heads, size = config.num_attention_heads, config.head_dim
        num_splits = position // KEYS_AT_A_TIME + 1
        if self._parts.size < num_splits * heads * (size + 2):
            self._parts = np.empty(2 * num_splits * heads * (size + 2), FLOAT32)
        self._counters[:] = 0
        rows, num_tasks = weights.matrices[:, 2], TASKS_A_THREAD * numba.get_num_threads()
        weights.matrices[:, 5] = np.maximum(16, -(-rows // num_tasks) + 3 & ~3)
        caches, half = cache.addresses(), 4 * (size // 2) * position
        decode_step(
            *(work.address, address_of(self._counters), project.address, attend_all.address, attend_keys.address),
            *(address_of(array) for array in (embedding, weights.matrices, weights.vectors)),
            *(address_of(weights.final_norm), address_of(caches)),
            *(address_of(weights.cos) + half, address_of(weights.sin) + half),
            *(position, config.num_layers, config.hidden_size, config.intermediate_size),
            *(heads, config.num_kv_heads, size, cache.capacity),
            *(address_of(array) for array in (self._qkv, self._parts, self._both, self._updates, logits)),
            *(float(config.rms_norm_eps), size**-0.5),
        )
