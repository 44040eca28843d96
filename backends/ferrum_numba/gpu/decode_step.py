"""One decode step as a list of kernel launches over memory that stays where it is.

    h = embedding[id]
    a = h + W_o attention(rope(norm_q(q)), K, V) + b_o,     [q; k; v] = W_qkv rms_norm(h) + b_qkv
    h' = a + W_down (silu(gate) * up) + b_down,             [gate; up] = W_gate_up rms_norm(a) + b_gate_up
    logits = W_head rms_norm(h_L)

Each operation reads the weights' element type and rounds to it once. Token, position and length are read from device
memory, so the list is the same for every step over the same caches.   Clauses: BK-NCUDA-21..22.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ferrum_numba.gpu.attention import MOST_HEAD_DIM, is_wide, one_token
from ferrum_numba.gpu.attention import THREADS as ATTENTION_THREADS
from ferrum_numba.gpu.kernel import Kernel
from ferrum_numba.gpu.kernels import attend_one, attention, elementwise, gemv, norm
from ferrum_numba.gpu.kernels.copy import copy_rows, copy_runs
from ferrum_numba.gpu.kernels.decode import CURSOR_SIZE, LENGTH, TOKEN, place_cursor, turn_and_store
from ferrum_numba.gpu.machine import DeviceArray, Grid
from ferrum_numba.gpu.operands import beside, fitting
from ferrum_numba.gpu.runtime import THREADS, Runtime, whole_warps
from ferrum_numba.gpu.storage import BITS, Storage, storage_of
from ferrum_numba.gpu.tensor import NumbaTensor
from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.transformer import TransformerWeights

OPERATION = "make_decode_backend"
FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel with its grid and its arguments, ready to be queued any number of times."""

    make: Callable[..., Kernel]
    of: tuple[Any, ...]
    grid: Grid
    block: Grid
    arguments: tuple[Any, ...]
    shared_bytes: int = 0

    def queue(self, runtime: Runtime) -> None:
        """Mutates the arrays that the kernel writes."""
        grid, block = self.grid, self.block
        runtime.launch(self.make, self.of, grid, block, *self.arguments, shared_bytes=self.shared_bytes)


@dataclass(frozen=True, slots=True)
class Operand:
    """A weight: flat on the device, of `shape`, read as `storage`."""

    array: DeviceArray
    storage: Storage
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerOperands:
    """One layer's weights, by `TransformerWeights`' layout; None where the model has none."""

    input_norm: Operand
    qkv: Operand
    qkv_bias: Operand | None
    q_norm: Operand | None
    k_norm: Operand | None
    output: Operand
    output_bias: Operand | None
    post_norm: Operand
    gate_up: Operand
    gate_up_bias: Operand | None
    down: Operand
    down_bias: Operand | None


class DecodeStep:
    """The weights of a transformer on the device, every buffer that a step fills, and the launches over them."""

    def __init__(self, runtime: Runtime, weights: TransformerWeights) -> None:
        """Raises BackendError for weights of another backend or of no float type; UnsupportedError for long heads."""
        self.runtime, self.config = runtime, weights.config()
        embedding = beside(runtime, OPERATION, "weights", weights.embed_weight())
        self._like, self.data_type = embedding, embedding.dtype()
        self.storage = storage_of(self.data_type, OPERATION)
        if self.config.head_dim > MOST_HEAD_DIM:
            raise UnsupportedError(
                f"{OPERATION}: head_dim: got {self.config.head_dim}, expected at most {MOST_HEAD_DIM}"
            )
        self._embedding = embedding.flat()
        self._final_norm, self._head = self._read(weights.final_norm_weight()), self._read(weights.lm_head_weight())
        self._cos, self._sin = self._read(weights.rope_cos()), self._read(weights.rope_sin())
        self._layers = [
            LayerOperands(
                self._read(weights.layer_input_norm_weight(layer)),
                self._read(weights.layer_qkv_weight(layer)),
                self._read_if(weights.layer_qkv_bias(layer)),
                self._read_if(weights.layer_q_norm_weight(layer)),
                self._read_if(weights.layer_k_norm_weight(layer)),
                self._read(weights.layer_o_weight(layer)),
                self._read_if(weights.layer_o_bias(layer)),
                self._read(weights.layer_post_norm_weight(layer)),
                self._read(weights.layer_gate_up_weight(layer)),
                self._read_if(weights.layer_gate_up_bias(layer)),
                self._read(weights.layer_down_weight(layer)),
                self._read_if(weights.layer_down_bias(layer)),
            )
            for layer in range(self.config.num_layers)
        ]
        self._allocate()

    def _allocate(self) -> None:
        config, empty = self.config, self.runtime.machine.empty
        self.cursor = self.runtime.integers(np.zeros(CURSOR_SIZE, np.int64))
        self._zero = self.runtime.integers(np.zeros(1, np.int64))  # row 0; the only block of a contiguous cache
        self._no_sinks = self.runtime.machine.upload(np.zeros(1, np.float32))
        self._no_parts = empty(1, FLOAT32)
        element, size = self.storage.element, config.head_dim
        self._residuals = [empty(config.hidden_size, element) for _ in range(2)]  # one is read, the other written
        self._normed, self._update = empty(config.hidden_size, element), empty(config.hidden_size, element)
        self._qkv = empty((config.num_attention_heads + 2 * config.num_kv_heads) * size, element)
        self._mixed = empty(config.num_attention_heads * size, element)
        self._both = empty(2 * config.intermediate_size, element)
        self._gated = empty(config.intermediate_size, element)
        self._logits = empty(config.vocab_size, element)

    def place(self, token_id: int, position: int) -> None:
        """Tell the device where the next step is. Mutates the cursor."""
        self.runtime.launch(place_cursor, (), 1, 32, self.cursor, token_id, position)

    def logits(self) -> NumbaTensor:
        """A copy `[1, 1, V]` of what the last step left."""
        result = NumbaTensor.empty(self.runtime, (1, 1, self.config.vocab_size), self.data_type)
        self.copy(self._logits, result.array, self.config.vocab_size)
        return result

    def copy(self, source: DeviceArray, target: DeviceArray, count: int) -> None:
        """The first `count` elements of target = those of source."""
        bits = BITS[self.storage.element.itemsize]
        self.runtime.launch_each(
            copy_runs, (bits,), count, source.view(bits), target.view(bits), *(count, count, 0, count)
        )

    def launches(self, keys: list[DeviceArray], values: list[DeviceArray], capacity: int) -> Iterator[Launch]:
        """A step at the cursor over caches (capacity, G, D), flat, one of each kind a layer: their row at the cursor's
        position is written, those after it are not read.  [BK-NCUDA-22]"""
        config, bits = self.config, BITS[self.storage.element.itemsize]
        (read, written), hidden = self._residuals, config.hidden_size
        ids, table, row = self.cursor[TOKEN : TOKEN + 1], self._embedding.view(bits), read.view(bits)
        yield _each(copy_rows, (bits,), hidden, (table, row, ids, self._zero, hidden, hidden))
        first = self._layers[0].input_norm if self._layers else self._final_norm
        yield self._norm(read, first, self._normed, 1)
        for index, layer in enumerate(self._layers):
            yield from self._attend(layer, keys[index], values[index], capacity)
            yield from self._product(self._mixed, layer.output, layer.output_bias, self._update)
            yield self._add_and_norm(read, layer.post_norm, written)
            yield from self._product(self._normed, layer.gate_up, layer.gate_up_bias, self._both)
            yield self._silu_mul()
            yield from self._product(self._gated, layer.down, layer.down_bias, self._update)
            last = index + 1 == len(self._layers)
            yield self._add_and_norm(written, self._final_norm if last else self._layers[index + 1].input_norm, read)
        yield from self._product(self._normed, self._head, None, self._logits)

    def _attend(self, layer: LayerOperands, keys: DeviceArray, values: DeviceArray, capacity: int) -> Iterator[Launch]:
        """q, k, v from the normed row; k and v into the caches; what q finds there."""
        config, kind = self.config, self.storage
        heads, kv_heads, size = config.num_attention_heads, config.num_kv_heads, config.head_dim
        yield from self._product(self._normed, layer.qkv, layer.qkv_bias, self._qkv)
        q, k = self._qkv[: heads * size], self._qkv[heads * size : (heads + kv_heads) * size]
        if layer.q_norm is not None and layer.k_norm is not None:
            yield self._norm(q, layer.q_norm, q, heads)
            yield self._norm(k, layer.k_norm, k, kv_heads)
        num_pairs = (heads + 2 * kv_heads) * size // 2
        tables, sizes = (self._cos.array, self._sin.array), (heads, kv_heads, size // 2)
        placed = (self._qkv, *tables, self.cursor, keys, values, *sizes)
        yield _each(turn_and_store, (kind, self._cos.storage), num_pairs, placed)
        split_keys = self.runtime.tuning.split_keys
        num_splits = -(-capacity // split_keys)
        parts = self._no_parts
        if num_splits > 1:
            parts = self.runtime.machine.empty(heads * num_splits * (size + 2), FLOAT32)
        lengths, causal, window, has_sinks = self.cursor[LENGTH : LENGTH + 1], 1, 0, 0
        memory = (q, keys, values, self._zero, lengths, self._no_sinks, self._mixed, parts)
        numbers = (
            capacity,
            1,
            num_splits,
            split_keys,
            np.float32(size**-0.5),
            np.float32(0.0),
            causal,
            window,
            has_sinks,
        )
        if is_wide(size):
            made = one_token(kind, 1, heads, kv_heads, num_splits)
            given = (*memory, heads, kv_heads, size, attend_one.lanes_of(size), *numbers)
            yield Launch(*made, given, attend_one.shared_bytes(kind, heads, kv_heads, size))
        else:
            grid = -(-(heads // kv_heads) // attention.ROWS) * num_splits * kv_heads
            given = (*memory, 1, heads, kv_heads, size, *numbers)
            yield Launch(attention.attention, (kind,), grid, ATTENTION_THREADS, given, 4 * attention.ROWS * size)
        if num_splits > 1:
            joined = (parts, lengths, self._no_sinks, self._mixed, 1, heads, size, num_splits)
            yield Launch(attention.merge, (kind,), heads, whole_warps(size), (*joined, causal, window, has_sinks))

    def _product(self, x: DeviceArray, matrix: Operand, bias: Operand | None, y: DeviceArray) -> Iterator[Launch]:
        """y = matrix @ x, rounded, then plus bias, rounded."""
        (num_columns, depth), kind = matrix.shape, self.storage
        given = (x, matrix.array, y, 1, num_columns, depth)
        yield Launch(gemv.gemv, (kind, matrix.storage), *gemv.blocks_for(1, num_columns), given)
        if bias is not None:
            count = num_columns
            arrays, sizes = (y, bias.array, y), (count, count, count)
            yield _each(
                elementwise.binary, ("add", kind, bias.storage, kind), elementwise.packs_of(count), (*arrays, *sizes)
            )

    def _norm(self, x: DeviceArray, weight: Operand, y: DeviceArray, num_rows: int) -> Launch:
        """y = rms_norm of each of the rows of x, which may be y."""
        length, eps = weight.shape[0], np.float32(self.config.rms_norm_eps)
        kinds = (self.storage, weight.storage)
        grid, block = norm.blocks_for(num_rows, length)
        return Launch(norm.rms_norm, kinds, grid, block, (x, weight.array, y, num_rows, length, eps))

    def _add_and_norm(self, residual: DeviceArray, weight: Operand, total: DeviceArray) -> Launch:
        """total = update + residual, normed = rms_norm(total) before it is rounded (D-16)."""
        length, eps = weight.shape[0], np.float32(self.config.rms_norm_eps)
        grid, block = norm.blocks_for(1, length)
        given = (self._update, residual, weight.array, self._normed, total, 1, length, eps)
        return Launch(norm.rms_norm_residual, (self.storage, weight.storage), grid, block, given)

    def _silu_mul(self) -> Launch:
        count, kind = self.config.intermediate_size, self.storage
        arrays = (self._both[:count], self._both[count : 2 * count], self._gated)
        given = (*arrays, count, count, count)
        return _each(elementwise.binary, ("silu_mul", kind, kind, kind), elementwise.packs_of(count), given)

    def _read(self, tensor: TensorRef) -> Operand:
        data = beside(self.runtime, OPERATION, "weights", tensor)
        fitted = fitting(OPERATION, self._like, data)
        return Operand(fitted.flat(), storage_of(fitted.dtype(), OPERATION), fitted.shape())

    def _read_if(self, tensor: TensorRef | None) -> Operand | None:
        return None if tensor is None else self._read(tensor)


def _each(make: Callable[..., Kernel], of: tuple[Any, ...], count: int, arguments: tuple[Any, ...]) -> Launch:
    """One thread for each of `count` elements, at least one."""
    block = min(THREADS, whole_warps(count))
    return Launch(make, of, -(-count // block), block, arguments)
