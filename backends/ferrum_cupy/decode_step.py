"""One decode step of a whole transformer over device memory that stays where it is.  Clauses: BK-CUPY-17..18.

h = embedding[id]
a = h + W_o attention(rope(norm_q(q)), K, V) + b_o,     [q; k; v] = W_qkv rms_norm(h) + b_qkv
h' = a + W_down (silu(gate) * up) + b_down,             [gate; up] = W_gate_up rms_norm(a) + b_gate_up
logits = W_head rms_norm(h_L)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ferrum_cupy.launches import THREADS, row_threads
from ferrum_cupy.machine import STORAGE, DeviceArray, Machine
from ferrum_cupy.runtime import packable
from ferrum_cupy.tensor import CupyTensor
from ferrum_ref.errors import BackendError
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.transformer import TransformerWeights

KEYS_PER_SPLIT = 256
MAX_SPLITS = 64
SHARED_HEADS = 4


@dataclass(frozen=True, slots=True)
class LayerArrays:
    """One layer's weights, by `TransformerWeights`' layout; None where the model has none."""

    input_norm: DeviceArray
    qkv: DeviceArray
    qkv_bias: DeviceArray | None
    q_norm: DeviceArray | None
    k_norm: DeviceArray | None
    output: DeviceArray
    output_bias: DeviceArray | None
    post_norm: DeviceArray
    gate_up: DeviceArray
    gate_up_bias: DeviceArray | None
    down: DeviceArray
    down_bias: DeviceArray | None


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a step reads its token and position, and where it tells how many keys there are: one int64 each."""

    token: DeviceArray
    position: DeviceArray
    length: DeviceArray


class DecodeStep:
    """The weights of a transformer as device arrays, and the step over them."""

    def __init__(self, weights: TransformerWeights) -> None:
        """Raises BackendError for weights of another backend."""
        self.config = weights.config()
        embedding = _tensor(weights.embed_weight())
        self.machine: Machine = embedding.machine
        self.kind = embedding.kind
        self._embedding, self._head = embedding.array, _array(weights.lm_head_weight())
        self._final_norm = _array(weights.final_norm_weight())
        self._cos, self._sin = _array(weights.rope_cos()), _array(weights.rope_sin())
        self._layers = tuple(
            LayerArrays(
                _array(weights.layer_input_norm_weight(layer)),
                _array(weights.layer_qkv_weight(layer)),
                _optional(weights.layer_qkv_bias(layer)),
                _optional(weights.layer_q_norm_weight(layer)),
                _optional(weights.layer_k_norm_weight(layer)),
                _array(weights.layer_o_weight(layer)),
                _optional(weights.layer_o_bias(layer)),
                _array(weights.layer_post_norm_weight(layer)),
                _array(weights.layer_gate_up_weight(layer)),
                _optional(weights.layer_gate_up_bias(layer)),
                _array(weights.layer_down_weight(layer)),
                _optional(weights.layer_down_bias(layer)),
            )
            for layer in range(self.config.num_layers)
        )

    def cursor(self) -> Cursor:
        """Fresh device memory for the token, its position and the number of keys."""
        xp = self.machine.xp
        return Cursor(xp.zeros(1, np.int64), xp.zeros(1, np.int64), xp.zeros(1, np.int64))

    def run(self, cursor: Cursor, keys: list[DeviceArray], values: list[DeviceArray]) -> DeviceArray:
        """Logits (V,) after the cursor's token.  [BK-CUPY-17]

        keys, values: (capacity, G, D) a layer; the row at the cursor's position is written, those after are not read.
        Nothing here depends on a value in device memory, so the launches can be recorded.
        """
        config, xp = self.config, self.machine.xp
        residual = xp.empty(config.hidden_size, self._embedding.dtype)
        size = np.int32(config.hidden_size)
        self._launch("decode", "take_row", (1, 1, 1), THREADS, self._embedding, cursor.token, residual, size)
        normed = self._norm(residual[None], self._layers[0].input_norm)[0]
        for index, layer in enumerate(self._layers):
            attended = self._attend(layer, normed, cursor, keys[index], values[index])
            projected = self._product(attended, layer.output, layer.output_bias)
            normed, residual = self._add(projected, residual, layer.post_norm)
            gated = self._silu_mul(normed, layer.gate_up, layer.gate_up_bias)
            update = self._product(gated, layer.down, layer.down_bias)
            last = index + 1 == config.num_layers
            following = self._final_norm if last else self._layers[index + 1].input_norm
            normed, residual = self._add(update, residual, following)
        return self._product(normed, self._head, None)

    def _attend(
        self, layer: LayerArrays, normed: DeviceArray, cursor: Cursor, k_cache: DeviceArray, v_cache: DeviceArray
    ) -> DeviceArray:
        config, xp = self.config, self.machine.xp
        heads, kv_heads, size = config.num_attention_heads, config.num_kv_heads, config.head_dim
        qkv = self._product(normed, layer.qkv, layer.qkv_bias).reshape(heads + 2 * kv_heads, size)
        both, v = qkv[: heads + kv_heads], qkv[heads + kv_heads :]  # queries and keys are turned alike
        if layer.q_norm is not None and layer.k_norm is not None:
            normed = xp.empty_like(both)
            self._norm_into(normed[:heads], both[:heads], layer.q_norm)
            self._norm_into(normed[heads:], both[heads:], layer.k_norm)
            both = normed
        turned = self._rotate(both, cursor)
        q, k = turned[:heads], turned[heads:]
        rows = (k, v, k_cache, v_cache, cursor.position, cursor.length, np.int32(kv_heads * size))
        self._launch("decode", "store_rows", (2, 1, 1), THREADS, *rows)
        capacity = k_cache.shape[0]
        splits = max(1, min(MAX_SPLITS, -(-capacity // KEYS_PER_SPLIT)))
        partial, marks = xp.empty((heads, splits, size), np.float32), xp.empty((heads, splits, 2), np.float32)
        groups = -(-(heads // kv_heads) // SHARED_HEADS)
        sizes = (np.int32(heads), np.int32(kv_heads), np.int64(capacity), np.int32(0), np.int32(1), np.int32(splits))
        settings = (np.float32(size**-0.5), np.float32(0.0), np.int32(0))
        given = (q, k_cache, v_cache, None, cursor.length, partial, marks, *sizes, *settings)
        self._launch("attention", "attend_one", (splits, kv_heads * groups, 1), 128, *given)
        mixed = xp.empty_like(q)
        merged = (partial, marks, None, mixed, np.int32(heads), np.int32(splits))
        self._launch("attention", "merge_splits", (heads, 1, 1), 128, *merged)
        return mixed.reshape(-1)

    def _norm(self, x: DeviceArray, weight: DeviceArray) -> DeviceArray:
        y = self.machine.xp.empty_like(x)
        self._norm_into(y, x, weight)
        return y

    def _norm_into(self, y: DeviceArray, x: DeviceArray, weight: DeviceArray) -> None:
        length = x.shape[-1]
        given = (x, weight, y, np.int32(length), np.float32(self.config.rms_norm_eps), packable(length, x, weight, y))
        self._launch("norms", "rms_norm", (x.shape[0], 1, 1), row_threads(length, x.itemsize), *given)

    def _add(self, update: DeviceArray, residual: DeviceArray, weight: DeviceArray) -> tuple[DeviceArray, DeviceArray]:
        xp, length = self.machine.xp, len(update)
        y, r = xp.empty_like(update), xp.empty_like(update)
        packed = packable(length, update, residual, weight, y, r)
        given = (update, residual, weight, y, r, np.int32(length), np.float32(self.config.rms_norm_eps), packed)
        self._launch("norms", "rms_norm_residual", (1, 1, 1), row_threads(length, update.itemsize), *given)
        return y, r

    def _silu_mul(self, x: DeviceArray, weight: DeviceArray, bias: DeviceArray | None) -> DeviceArray:
        """silu(gate) * up of the product with a matrix of gates and ups, rounded and biased as `_product` does."""
        sums, count = self.machine.multiply(x[None], weight, self.kind)[0], self.config.intermediate_size
        y = self.machine.xp.empty(count, weight.dtype)
        self._launch("decode", "silu_sums", (-(-count // THREADS), 1, 1), THREADS, sums, bias, y, np.int32(count))
        return y

    def _rotate(self, x: DeviceArray, cursor: Cursor) -> DeviceArray:
        heads, half = x.shape[0], x.shape[1] // 2
        y = self.machine.xp.empty_like(x)
        sizes = (np.int64(1), np.int32(1), np.int32(heads), np.int32(half), np.int32(0))
        given = (x, self._cos, self._sin, cursor.position, y, *sizes)
        self._launch("pointwise", "rotary", (-(-heads * half // THREADS), 1, 1), THREADS, *given)
        return y

    def _product(self, x: DeviceArray, weight: DeviceArray, bias: DeviceArray | None) -> DeviceArray:
        """x (K,) @ weight (N, K).T, rounded to the weights' type, then the bias."""
        if bias is None:
            return self.machine.multiply(x[None], weight, self.kind, is_rounded=True)[0]
        sums = self.machine.multiply(x[None], weight, self.kind)[0]
        y, count = self.machine.xp.empty(len(sums), weight.dtype), np.int32(len(sums))
        self._launch("decode", "round_sums", (-(-len(sums) // THREADS), 1, 1), THREADS, sums, bias, y, count)
        return y

    def _launch(self, source: str, kernel: str, grid: tuple[int, int, int], threads: int, *arguments: object) -> None:
        defines = {"STORAGE": STORAGE[self.kind]}
        if source == "attention":
            defines |= {"HEAD_DIM": self.config.head_dim, "SHARED": SHARED_HEADS}
        self.machine.launch(source, kernel, defines, grid, threads, arguments)


def _tensor(tensor: TensorRef) -> CupyTensor:
    if not isinstance(tensor, CupyTensor) or tensor.kind not in STORAGE:
        raise BackendError(
            f"CupyDecodeBackend: got weights of {type(tensor).__name__}, expected float tensors of the cupy backend; "
            "read the weights with that backend"
        )
    return tensor


def _array(tensor: TensorRef) -> DeviceArray:
    found = _tensor(tensor)
    return found.machine.xp.ascontiguousarray(found.array)


def _optional(tensor: TensorRef | None) -> DeviceArray | None:
    return None if tensor is None else _array(tensor)
