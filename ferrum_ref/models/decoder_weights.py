"""Weights of a decoder as a backend's tensors, and how they are read from a checkpoint.

q, k, v are one matrix, and so are gate and up: fewer and larger products, row for row the same numbers.
Clauses: LM-WEIGHTS-1..5 (specs/llm.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import InvalidParameterError, ModelError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.family import PartReader, PartWeights
from ferrum_ref.models.finite import require_finite
from ferrum_ref.models.matrix import Weight
from ferrum_ref.models.matrix_reader import MatrixReader
from ferrum_ref.models.tensor_layout import TensorLayout, has_output_bias, layout_of
from ferrum_ref.models.tensor_names import family_of
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
    """One decoder layer. F feed-forward size; None for what the model does not have.

    qkv `[(H+2G)*D, E]`: the rows of q, then k, then v; output `[E, H*D]`; gate_up `[2F, E]`: gate, then up (`[F, E]`
    where nothing gates); down `[E, F]`; norms `[E]`, those of heads `[D]`; sinks `[H]`. A norm's offset is added to
    its weight. `attention_part` and `feed_forward_part` stand in place of the dense tensors where a family brings
    parts of its own.
    """

    attention_norm: TensorRef
    qkv: Weight | None
    qkv_bias: TensorRef | None
    output: Weight | None
    output_bias: TensorRef | None
    ffn_norm: TensorRef
    gate_up: Weight | None
    gate_up_bias: TensorRef | None
    down: Weight | None
    down_bias: TensorRef | None
    attention_norm_bias: TensorRef | None = None
    ffn_norm_bias: TensorRef | None = None
    q_norm: TensorRef | None = None
    k_norm: TensorRef | None = None
    sinks: TensorRef | None = None
    attention_post_norm: TensorRef | None = None
    ffn_post_norm: TensorRef | None = None
    attention_part: PartWeights | None = None
    feed_forward_part: PartWeights | None = None

    def dense(self, name: str) -> Weight:
        """The matrix of that name.  Raises ModelError if this layer has none."""
        found: Weight | None = getattr(self, name)
        if found is None:
            raise ModelError(f"decoder weights: {name}: got none, expected the matrix of a dense layer")
        return found

    def tensors(self) -> list[Weight]:
        """All that there are.  Pure."""
        parts = [part for part in (self.attention_part, self.feed_forward_part) if part is not None]
        own = [getattr(self, name) for name in LayerWeights.__slots__ if not name.endswith("_part")]
        return [t for t in own if t is not None] + [t for part in parts for t in part.tensors()]


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights; `lm_head` is the embedding itself when tied.  [LM-WEIGHTS-1]

    `positions` `[P, E]`: learned ones; `rope_factors`: those that lie in the file, by the names of their tensors.
    """

    embedding: Weight
    layers: tuple[LayerWeights, ...]
    final_norm: TensorRef
    lm_head: Weight
    final_norm_bias: TensorRef | None = None
    positions: TensorRef | None = None
    rope_factors: Mapping[str, Array] = field(default_factory=dict)

    def num_bytes(self) -> int:
        """Bytes of all distinct tensors."""
        tensors: list[Weight | None] = [self.embedding, self.final_norm, self.final_norm_bias, self.positions]
        if self.lm_head is not self.embedding:
            tensors.append(self.lm_head)
        for layer in self.layers:
            tensors += layer.tensors()
        return sum(t.size_bytes() for t in tensors if t is not None)


def read_decoder_weights(
    source: WeightSource,
    backend: ComputeBackend,
    dtype: DataType = DataType.FP32,
    *,
    num_threads: int = LOADER_THREADS,
    progress: Callable[[int, int], None] | None = None,
    packed: bool = False,
    check_finite: bool = True,
) -> DecoderWeights:
    """Read, dequantise and fuse the weights with a small pool of threads.  [LM-WEIGHTS-1..5]

    `progress(done, total)` counts layers, from the reading threads. `packed`: matrices stay as the file packs them
    where the backend multiplies by that form. Errors of the checkpoint pass through.
    `check_finite`: a NaN or an infinity in what is read dense raises InvalidFormatError with the tensor's name.
    Raises InvalidParameterError for a dtype that is not a float type or num_threads < 1.
    """
    if num_threads < 1:
        raise InvalidParameterError(f"read_decoder_weights: num_threads must be >= 1, got {num_threads}")
    reader = _Reader(source, backend, dtype, packed, check_finite)
    config, names = source.config, layout_of(source.config)
    num_layers = config.num_layers
    done = iter(range(1, num_layers + 1))

    def layer(index: int) -> LayerWeights:
        found = reader.layer(index)
        if progress is not None:
            progress(next(done), num_layers)
        return found

    with ThreadPoolExecutor(num_threads, thread_name_prefix="weights") as pool:
        embedding = pool.submit(reader.matrix, f"{names.embedding}.weight")
        tied = config.tie_word_embeddings
        lm_head = embedding if tied else pool.submit(reader.matrix, f"{names.lm_head}.weight")
        layers = tuple(pool.map(layer, range(num_layers)))
        return DecoderWeights(
            embedding=embedding.result(),
            layers=layers,
            final_norm=reader.norm(names.final_norm),
            lm_head=lm_head.result(),
            final_norm_bias=reader.norm_bias(names.final_norm),
            positions=reader.tensor(f"{names.positions}.weight") if config.learned_positions else None,
            rope_factors=reader.rope_factors(),
        )


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

    def __init__(
        self, source: WeightSource, backend: ComputeBackend, dtype: DataType, packed: bool, check_finite: bool
    ) -> None:
        self._source = source
        self._config = source.config
        self._names: TensorLayout = layout_of(source.config)
        self._factory = backend.tensor_factory()
        self._element = element_type(dtype)
        self._packed = packed
        self._checks = check_finite
        self._matrices = MatrixReader(source, backend, dtype, packed)
        self._parts = PartReader(source, self._matrices, backend, dtype)

    def tensor(self, name: str) -> TensorRef:
        return self._factory.from_numpy(self._read(name))

    def _read(self, name: str, out: Array | None = None, element: Any = None) -> Array:
        """The tensor's numbers.  Raises InvalidFormatError for a NaN or an infinity, where asked to.  [MD-CKPT-7]"""
        found = self._source.read(name, element or self._element, out=out)
        if self._checks:
            require_finite(name, found)
        return found

    def matrix(self, name: str) -> Weight:
        return self._matrices.stacked([name]) if self._packed else self.tensor(name)

    def norm(self, name: str) -> TensorRef:
        """A norm's weight with its offset, which is added in float32 and rounded once.  [LM-WEIGHTS-4]"""
        offset = self._config.norm_offset
        if not offset:
            return self.tensor(f"{name}.weight")
        gain = self._read(f"{name}.weight", element=np.float32) + np.float32(offset)
        return self._factory.from_numpy(gain.astype(self._element))

    def norm_bias(self, name: str) -> TensorRef | None:
        return self.tensor(f"{name}.bias") if self._config.norm == "layer" else None

    def rope_factors(self) -> dict[str, Array]:
        rope = self._config.rope
        names = {} if rope is None else rope.stored_tensors()
        return {name: self._read(name, element=np.float32) for name in names}

    def layer(self, index: int) -> LayerWeights:
        config, names, prefix = self._config, self._names, self._names.prefix(index)
        family = family_of(config)
        attention, feed_forward = family.attention(config, index), family.feed_forward(config, index)
        # One allocation for the layer's matrices: large enough for the system to give it large pages, which a
        # memory-bound decode step notices.
        arena = _Arena(self._num_dense(attention is None, feed_forward is None), self._element)
        found: dict[str, Any] = dict.fromkeys(LayerWeights.__slots__)
        found["attention_norm"] = self.norm(prefix + names.attention_norm)
        found["attention_norm_bias"] = self.norm_bias(prefix + names.attention_norm)
        found["ffn_norm"] = self.norm(prefix + names.ffn_norm)
        found["ffn_norm_bias"] = self.norm_bias(prefix + names.ffn_norm)
        if config.post_norms:
            found["attention_post_norm"] = self.norm(prefix + names.attention_post_norm)
            found["ffn_post_norm"] = self.norm(prefix + names.ffn_post_norm)
        if attention is None:
            found |= self._attention(prefix, arena)
        else:
            found["attention_part"] = attention.read(self._parts, config, index)
        if feed_forward is None:
            found |= self._feed_forward(prefix, arena)
        else:
            found["feed_forward_part"] = feed_forward.read(self._parts, config, index)
        return LayerWeights(**found)

    def _num_dense(self, attention: bool, feed_forward: bool) -> int:
        """Elements of a layer's dense matrices, none where they may stay packed."""
        config = self._config
        query, both = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
        taken = (2 * query + both if attention else 0) + self._num_inner() * int(feed_forward)
        return 0 if self._packed else taken * config.hidden_size

    def _num_inner(self) -> int:
        """Rows of gate, up and down together."""
        return self._config.intermediate_size * (3 if self._config.gated else 2)

    def _attention(self, prefix: str, arena: _Arena) -> dict[str, Any]:
        config, names = self._config, self._names
        query_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        hidden, rows = config.hidden_size, query_rows + 2 * kv_rows
        qkv = [prefix + name for name in names.qkv]
        sizes = [query_rows, kv_rows, kv_rows] if len(qkv) == 3 else [rows]
        found: dict[str, Any] = {
            "qkv": self._stacked(qkv, sizes, hidden, arena, by_head=names.by_head),
            "qkv_bias": self._bias(qkv, names.by_head) if config.attention_bias else None,
            "output": self._stacked([prefix + names.output], [hidden], query_rows, arena),
            "output_bias": self._bias([prefix + names.output]) if has_output_bias(config) else None,
        }
        if config.qk_norm:
            found["q_norm"], found["k_norm"] = self.norm(prefix + names.q_norm), self.norm(prefix + names.k_norm)
        if config.attention_sinks:
            found["sinks"] = self.tensor(prefix + names.sinks)
        return found

    def _feed_forward(self, prefix: str, arena: _Arena) -> dict[str, Any]:
        config, names = self._config, self._names
        hidden, inner = config.hidden_size, config.intermediate_size
        gate_up, down = [prefix + name for name in names.gate_up], [prefix + names.down]
        rows = 2 * inner if config.gated else inner
        return {
            "gate_up": self._stacked(gate_up, [rows // len(gate_up)] * len(gate_up), hidden, arena),
            "gate_up_bias": self._bias(gate_up) if config.mlp_bias else None,
            "down": self._stacked(down, [hidden], inner, arena),
            "down_bias": self._bias(down) if config.mlp_bias else None,
        }

    def _stacked(
        self, names: Sequence[str], rows: Sequence[int], columns: int, arena: _Arena, by_head: bool = False
    ) -> Weight:
        """The matrices one below the other, decoded straight into the arena where they lie as they are used."""
        stored = [f"{name}.weight" for name in names]
        rearranged = self._names.transposed or by_head
        if self._packed and not rearranged:
            return self._matrices.stacked(stored)
        whole = np.empty((sum(rows), columns), self._element) if self._packed else arena.take(sum(rows), columns)
        start = 0
        for name, count in zip(stored, rows, strict=True):
            target = whole[start : start + count]
            if not rearranged:
                self._read(name, target)
            else:
                values = self._read(name)
                values = values.T if self._names.transposed else values
                target[...] = self._heads_apart(values) if by_head else values
            start += count
        return self._factory.from_numpy(whole)

    def _bias(self, names: Sequence[str], by_head: bool = False) -> TensorRef:
        """The biases end to end."""
        values = [self._read(f"{name}.bias") for name in names]
        whole = np.concatenate(values) if len(values) > 1 else values[0]
        return self._factory.from_numpy(np.ascontiguousarray(self._heads_apart(whole)) if by_head else whole)

    def _heads_apart(self, values: Array) -> Array:
        """Rows of (head, q k v, D) as (q k v, head, D).  [LM-WEIGHTS-5]"""
        by_head = values.reshape(self._config.num_heads, 3, self._config.head_dim, -1)
        return by_head.swapaxes(0, 1).reshape(values.shape)


class _Arena:
    """One block of memory, handed out matrix by matrix."""

    def __init__(self, num_elements: int, element: Any) -> None:
        self._memory = np.empty(num_elements, dtype=element)
        self._taken = 0

    def take(self, rows: int, columns: int) -> Array:
        start, self._taken = self._taken, self._taken + rows * columns
        return self._memory[start : self._taken].reshape(rows, columns)
