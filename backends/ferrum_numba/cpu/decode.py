"""`NumbaDecodeBackend`: a whole decode step in one kernel, over weights as they are stored, or quantised.

    h = embedding[id]
    a = h + W_o attention(rope(norm_q(q)), K, V) + b_o,     [q; k; v] = W_qkv rms_norm(h) + b_qkv
    h' = a + W_down (silu(gate) * up) + b_down,             [gate; up] = W_gate_up rms_norm(a) + b_gate_up
    logits = W_head rms_norm(h_L)

Everything but the weights is float32 and stays so until the logits are rounded to the weights' element type.
Clauses: BK-NCPU-18..20, BK-NCPU-23..24 (specs/backend_numba.md), DB-* (specs/decode_backend.md).
"""

from __future__ import annotations

import threading
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
from ferrum_ref.errors import BackendError, NotFoundError, ResourceExhaustedError
from ferrum_ref.interfaces.decode_backend import DecodeBackend
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.transformer import TransformerWeights
from ferrum_ref.interfaces.weight_parts import DecoderMatrix

Float32 = NDArray[np.float32]
FIRST_CAPACITY_TOKENS: Final = 64
TASKS_A_THREAD: Final = 4  # of a matrix product: more even out the threads, fewer cost less


class SequenceCache:
    """K and V of every layer, float32 `(L, 2, capacity, G, D)`, of which `num_tokens` rows count."""

    def __init__(self, layers: int, groups: int, size: int, most_tokens: int) -> None:
        self.num_tokens = 0
        self.data = np.zeros((layers, 2, 0, groups, size), FLOAT32)
        self._most_tokens = most_tokens

    @property
    def capacity(self) -> int:
        return int(self.data.shape[2])

    def reserve(self, num_tokens: int) -> None:
        """Room for that many tokens in all, from 64 by doubling up to the context; what is cached stays."""
        if num_tokens <= self.capacity:
            return
        wanted = min(max(num_tokens, 2 * self.capacity, FIRST_CAPACITY_TOKENS), self._most_tokens)
        layers, two, _, groups, size = self.data.shape
        grown = np.zeros((layers, two, max(num_tokens, wanted), groups, size), FLOAT32)
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


class NumbaDecodeBackend(DecodeBackend):
    """Keeps K/V by key; a call that raises has changed nothing.

    [BK-NCPU-18..20, BK-NCPU-23..24, DB-STEP-1..6, DB-INIT-1..4]
    """

    def __init__(
        self, weights: TransformerWeights, *, weights_format: str = "stored", max_tokens: int | None = None
    ) -> None:
        """`weights_format`: "stored" (every matrix as it lies, packed ones too), "float32" (packed ones are unpacked),
        or "int8", "q8_0" or "q4_0", to which every matrix but the embedding is quantised here.  `max_tokens` bounds
        the context below that of the weights.

        Raises InvalidParameterError for another format; ShapeError where blocks of 32 do not fit a matrix;
        UnsupportedError for packed matrices that `quantized_linear` does not take.
        """
        self._config = weights.config()
        self.weights_format = weights_format
        self._weights = DecodeWeights(weights, weights_format)
        self._element = weights.element_type()
        self._max_tokens = min(max_tokens or self._config.max_seq_len, self._config.max_seq_len)
        self._caches: dict[str, SequenceCache] = {}
        self._lock = threading.Lock()
        config, heads, size = self._config, self._config.num_attention_heads, self._config.head_dim
        self._counters = np.zeros((PHASES_A_LAYER * config.num_layers + 1) * COUNTER_BYTES // 8, np.int64)
        self._qkv = np.empty((heads + 2 * config.num_kv_heads) * size, FLOAT32)
        self._parts = np.empty(0, FLOAT32)
        self._both = np.empty(2 * config.intermediate_size, FLOAT32)
        self._updates = np.empty(2 * config.num_layers * config.hidden_size, FLOAT32)

    def name(self) -> str:
        return f"numba-cpu decode step, {' and '.join(sorted(self._weights.formats))} weights"

    @property
    def max_tokens(self) -> int:
        """Longest sequence, in tokens."""
        return self._max_tokens

    @property
    def weights_bytes(self) -> int:
        """Bytes of matrices that a step reads: all but the embedding."""
        return self._weights.num_bytes

    def decode_step(self, token_id: int, position: int, cache_key: str) -> NumbaTensor:
        """Logits `[1, 1, V]` after `token_id`.  [DB-STEP-1..6; D-43]"""
        with self._lock:
            cache = self._existing(cache_key)
            self._check_step(cache, token_id, position, cache_key)
            cache.reserve(position + 1)
            logits = np.empty((1, 1, self._config.vocab_size), FLOAT32)
            self._launch(cache, self._weights.row(token_id), position, logits)
            cache.num_tokens += 1
        return NumbaTensor(round_to(logits, NUMPY_TYPES[self._element]))

    def init_kv_cache(self, cache_key: str, kv_data: Sequence[tuple[TensorRef, TensorRef]], prefill_len: int) -> None:
        """Copy a prefill's K and V, `[S, G, D]` a layer; replaces an existing key.  [DB-INIT-1..4]"""
        self._check_handover(cache_key, kv_data, prefill_len)
        config = self._config
        cache = SequenceCache(config.num_layers, config.num_kv_heads, config.head_dim, self._max_tokens)
        cache.reserve(max(1, prefill_len))
        for layer, pair in enumerate(kv_data):
            for index, tensor in enumerate(pair):
                cache.data[layer, index, :prefill_len] = widen(tensor.to_numpy()[:prefill_len], "init_kv_cache")
        cache.num_tokens = prefill_len
        with self._lock:
            self._caches[cache_key] = cache

    def has_kv_cache(self, cache_key: str) -> bool:
        with self._lock:
            return cache_key in self._caches

    def release_kv_cache(self, cache_key: str) -> None:
        with self._lock:
            self._caches.pop(cache_key, None)

    def cached_tokens(self, cache_key: str) -> int:
        """Tokens cached of a sequence (extension). Raises NotFoundError. Pure."""
        with self._lock:
            return self._existing(cache_key).num_tokens

    def size_bytes(self) -> int:
        """Bytes of all caches (extension). Pure."""
        with self._lock:
            return sum(cache.data.nbytes for cache in self._caches.values())

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

    def _existing(self, cache_key: str) -> SequenceCache:
        if cache_key not in self._caches:
            raise NotFoundError(f"decode_step: cache_key: {cache_key!r} is unknown; hand a prefill over first")
        return self._caches[cache_key]

    def _check_step(self, cache: SequenceCache, token_id: int, position: int, cache_key: str) -> None:
        if position != cache.num_tokens:
            raise BackendError(
                f"decode_step: position: got {position} for {cache_key!r}, which holds {cache.num_tokens} tokens; "
                "a token's position is the number of tokens before it"
            )
        if not 0 <= token_id < self._config.vocab_size:
            raise BackendError(
                f"decode_step: token_id: got {token_id}, expected 0 <= token_id < {self._config.vocab_size}; "
                "the tokenizer and the model disagree"
            )
        if position >= self._max_tokens:
            raise ResourceExhaustedError(
                f"decode_step: {cache_key!r} holds {position} tokens, the whole context of {self._max_tokens}; "
                "release it or generate less"
            )

    def _check_handover(self, cache_key: str, kv_data: Sequence[tuple[TensorRef, TensorRef]], prefill_len: int) -> None:
        config = self._config
        if prefill_len < 0 or len(kv_data) != config.num_layers:
            raise BackendError(
                f"init_kv_cache: {cache_key!r}: got {len(kv_data)} layers and prefill_len {prefill_len}, "
                f"expected {config.num_layers} pairs (K, V) and a length of 0 or more"
            )
        if prefill_len > self._max_tokens:
            raise ResourceExhaustedError(
                f"init_kv_cache: {cache_key!r}: {prefill_len} tokens exceed the context of {self._max_tokens}"
            )
        for layer, pair in enumerate(kv_data):
            for part, tensor in zip("KV", pair, strict=True):
                shape = tensor.shape()
                if len(shape) != 3 or shape[0] < prefill_len or shape[1:] != (config.num_kv_heads, config.head_dim):
                    raise BackendError(
                        f"init_kv_cache: {cache_key!r}: {part} of layer {layer} has shape {shape}, expected "
                        f"[at least {prefill_len}, {config.num_kv_heads}, {config.head_dim}] (tokens, heads, head size)"
                    )
                if tensor.dtype() is not self._element:
                    raise BackendError(
                        f"init_kv_cache: {cache_key!r}: {part} of layer {layer} is {tensor.dtype()}, "
                        f"expected {self._element} like the weights; convert it with to_dtype"
                    )
