"""Weights of a Llama-family decoder as a backend's tensors, and how they are read from a checkpoint.

q, k, v are one matrix, and so are gate and up: fewer and larger products, row for row the same numbers.
Clauses: LM-WEIGHTS-1..3 (specs/llm.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.types.devices import DataType

Array = npt.NDArray[Any]
LOADER_THREADS = 2


class WeightSource(Protocol):
    """What is needed of a checkpoint: its configuration and its tensors, by Hugging Face names, `[out, in]`."""

    @property
    def config(self) -> DecoderConfig: ...

    def read(self, name: str, dtype: Any = np.float32, out: Array | None = None) -> Array: ...


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. F feed-forward size; biases are None where the model has none.

    qkv `[(H+2G)*D, E]`: the rows of q, then k, then v; output `[E, H*D]`; gate_up `[2F, E]`: gate, then up; down
    `[E, F]`.
    """

    attention_norm: TensorRef
    qkv: TensorRef
    qkv_bias: TensorRef | None
    output: TensorRef
    output_bias: TensorRef | None
    ffn_norm: TensorRef
    gate_up: TensorRef
    gate_up_bias: TensorRef | None
    down: TensorRef
    down_bias: TensorRef | None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights; `lm_head` is the embedding itself when tied.  [LM-WEIGHTS-1]"""

    embedding: TensorRef
    layers: tuple[LayerWeights, ...]
    final_norm: TensorRef
    lm_head: TensorRef

    def num_bytes(self) -> int:
        """Bytes of all distinct tensors."""
        tensors = [self.embedding, self.final_norm]
        if self.lm_head is not self.embedding:
            tensors.append(self.lm_head)
        for layer in self.layers:
            tensors += [t for t in (getattr(layer, name) for name in LayerWeights.__slots__) if t is not None]
        return sum(t.size_bytes() for t in tensors)


def read_decoder_weights(
    source: WeightSource,
    backend: ComputeBackend,
    dtype: DataType = DataType.FP32,
    *,
    num_threads: int = LOADER_THREADS,
    progress: Callable[[int, int], None] | None = None,
) -> DecoderWeights:
    """Read, dequantise and fuse the weights with a small pool of threads.  [LM-WEIGHTS-1..3]

    `progress(done, total)` counts layers, from the reading threads. Errors of the checkpoint pass through.
    Raises InvalidParameterError for a dtype that is not a float type or num_threads < 1.
    """
    if num_threads < 1:
        raise InvalidParameterError(f"read_decoder_weights: num_threads must be >= 1, got {num_threads}")
    reader = _Reader(source, backend, element_type(dtype))
    num_layers = source.config.num_layers
    done = iter(range(1, num_layers + 1))

    def layer(index: int) -> LayerWeights:
        found = reader.layer(index)
        if progress is not None:
            progress(next(done), num_layers)
        return found

    with ThreadPoolExecutor(num_threads, thread_name_prefix="weights") as pool:
        embedding = pool.submit(reader.tensor, "model.embed_tokens.weight")
        tied = source.config.tie_word_embeddings
        lm_head = embedding if tied else pool.submit(reader.tensor, "lm_head.weight")
        layers = tuple(pool.map(layer, range(num_layers)))
        return DecoderWeights(embedding.result(), layers, reader.tensor("model.norm.weight"), lm_head.result())


def element_type(dtype: DataType) -> Any:
    """The numpy element type of a float DataType. Pure.  Raises InvalidParameterError for the others."""
    if dtype is DataType.BF16:
        from ml_dtypes import bfloat16

        return bfloat16
    if dtype is DataType.FP16:
        return np.float16
    if dtype is DataType.FP32:
        return np.float32
    raise InvalidParameterError(f"element_type: weights are kept as FP32, FP16 or BF16, got {dtype.name}")


class _Reader:
    """Reads named tensors, matrices that belong together into one, and hands them to the backend."""

    def __init__(self, source: WeightSource, backend: ComputeBackend, element: Any) -> None:
        self._source = source
        self._config = source.config
        self._factory = backend.tensor_factory()
        self._element = element

    def tensor(self, name: str) -> TensorRef:
        return self._factory.from_numpy(self._source.read(name, self._element))

    def layer(self, index: int) -> LayerWeights:
        config, prefix = self._config, f"model.layers.{index}"
        query_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        qkv = {f"{prefix}.self_attn.q_proj": query_rows}
        qkv |= {f"{prefix}.self_attn.{part}_proj": kv_rows for part in "kv"}
        output = {f"{prefix}.self_attn.o_proj": hidden}
        gate_up = {f"{prefix}.mlp.{part}_proj": inner for part in ("gate", "up")}
        down = {f"{prefix}.mlp.down_proj": hidden}
        # One allocation for the layer's matrices: large enough for the system to give it large pages, which a
        # memory-bound decode step notices.
        arena = _Arena((query_rows + 2 * kv_rows + 2 * inner) * hidden + hidden * (query_rows + inner), self._element)
        return LayerWeights(
            attention_norm=self.tensor(f"{prefix}.input_layernorm.weight"),
            qkv=self._stacked(qkv, "weight", arena.take(query_rows + 2 * kv_rows, hidden)),
            qkv_bias=self._biases(qkv, config.attention_bias),
            output=self._stacked(output, "weight", arena.take(hidden, query_rows)),
            output_bias=self._biases(output, config.attention_bias),
            ffn_norm=self.tensor(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=self._stacked(gate_up, "weight", arena.take(2 * inner, hidden)),
            gate_up_bias=self._biases(gate_up, config.mlp_bias),
            down=self._stacked(down, "weight", arena.take(hidden, inner)),
            down_bias=self._biases(down, config.mlp_bias),
        )

    def _biases(self, rows_of: Mapping[str, int], present: bool) -> TensorRef | None:
        if not present:
            return None
        return self._stacked(rows_of, "bias", np.empty(sum(rows_of.values()), dtype=self._element))

    def _stacked(self, rows_of: Mapping[str, int], kind: str, whole: Array) -> TensorRef:
        """The tensors `<prefix>.<kind>`, one below the other, decoded straight into `whole`."""
        start = 0
        for prefix, rows in rows_of.items():
            self._source.read(f"{prefix}.{kind}", self._element, out=whole[start : start + rows])
            start += rows
        return self._factory.from_numpy(whole)


class _Arena:
    """One block of memory, handed out matrix by matrix."""

    def __init__(self, num_elements: int, element: Any) -> None:
        self._memory = np.empty(num_elements, dtype=element)
        self._taken = 0

    def take(self, rows: int, columns: int) -> Array:
        start, self._taken = self._taken, self._taken + rows * columns
        return self._memory[start : self._taken].reshape(rows, columns)
