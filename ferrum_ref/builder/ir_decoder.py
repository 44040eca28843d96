"""Runs a graph as a decoder: a ragged batch in, logits out, keys and values into the cache it is given.

It keeps `RaggedDecoder`, so the executor that runs the hand-written decoder runs a graph as well.
Clauses: MB-RUN-1..4 (specs/model_builder.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ferrum_ref.builder.attributes import Attributes
from ferrum_ref.builder.graph import IrGraph, Port
from ferrum_ref.builder.operators import Operator, Runtime
from ferrum_ref.builder.operators_model import ENTRIES, attention_params
from ferrum_ref.builder.signals import attributes_of, infer_signals, operator_of
from ferrum_ref.errors import ConfigError, InvalidParameterError, ResourceExhaustedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.forward import ForwardBatch, Observer
from ferrum_ref.interfaces.kv_storage import KvBatch
from ferrum_ref.interfaces.model_builder import CustomLayer, ModelDimensions
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.types.devices import DataType, Device


@dataclass(frozen=True, slots=True)
class _Step:
    """One node, ready to run; `last_reads` are the values that nobody needs afterwards."""

    node: str
    operator: Operator
    attributes: Attributes
    inputs: tuple[Port, ...]
    parameters: tuple[str, ...]
    taps: tuple[tuple[int, str], ...]
    last_reads: tuple[str, ...]


class IrDecoder:
    """Stateless beside its parameters. Safe to share between threads.  [MB-RUN-1..4]"""

    def __init__(
        self,
        graph: IrGraph,
        parameters: Mapping[str, TensorRef],
        dimensions: ModelDimensions,
        head_dim: int,
        backend: ComputeBackend,
        custom_layers: Mapping[str, CustomLayer] | None = None,
    ) -> None:
        """`parameters` holds the tensor of every parameter of the graph.

        Raises ConfigError for a graph that is no decoder of these dimensions, UnsupportedError (an operation).
        """
        check_decoder_graph(graph, dimensions, head_dim)
        self.backend = backend
        self.max_tokens = dimensions.max_sequence_length
        self.vocab_size = dimensions.vocab_size
        self._parameters = dict(parameters)
        self._custom_layers = dict(custom_layers or {})
        self._exit = graph.exits[0]
        self._steps = _program(graph)

    @property
    def dtype(self) -> DataType:
        """Element type of weights, activations and K/V."""
        return next(iter(self._parameters.values())).dtype()

    @property
    def device(self) -> Device:
        """Where the parameters are."""
        return next(iter(self._parameters.values())).device()

    @property
    def num_steps(self) -> int:
        """Operations that one forward runs."""
        return len(self._steps)

    def num_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(tensor.size_bytes() for tensor in self._parameters.values())

    def forward(self, batch: ForwardBatch, kv: KvBatch, observe: Observer | None = None) -> TensorRef:
        """Logits `[R, V]` of batch.logit_rows, in that order. Appends the batch's K/V to `kv`.  [MB-RUN-1..3]

        `observe(name, tensor)` sees the values that the graph's taps name, in the order they are computed: of one
        operation the residual before the norm of it.
        Raises as `check` before anything is computed or stored.
        """
        self.check(batch)
        entries = {"token_ids": batch.token_ids, "positions": batch.positions, "logit_rows": batch.logit_rows}
        runtime = Runtime(self.backend, entries, kv, self._custom_layers)
        values: dict[str, Sequence[Any]] = {}
        for step in self._steps:
            operands = [values[port.node][port.slot] for port in step.inputs]
            operands += [self._parameters[name] for name in step.parameters]
            results = step.operator.run(runtime, step.attributes, operands)
            values[step.node] = results
            if observe is not None:
                for slot, name in step.taps:
                    observe(name, results[slot])
            for name in step.last_reads:
                del values[name]
        logits: TensorRef = values[self._exit][0]
        return logits

    def check(self, batch: ForwardBatch) -> None:
        """What `forward` refuses before it does anything.  [MB-RUN-3]

        Raises InvalidParameterError (token id or row out of range), ResourceExhaustedError (beyond the context). Pure.
        """
        low, high = int(batch.token_ids.min()), int(batch.token_ids.max())
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise InvalidParameterError(f"IrDecoder.forward: token id must be in [0, {self.vocab_size}), got {bad}")
        if batch.positions.max() >= self.max_tokens:
            raise ResourceExhaustedError(
                f"IrDecoder.forward: position {batch.positions.max()} is beyond the context of {self.max_tokens}"
                " tokens; shorten the prompt or generate less"
            )
        rows = batch.logit_rows
        if len(rows) and (rows.min() < 0 or rows.max() >= batch.num_tokens):
            raise InvalidParameterError(
                f"IrDecoder.forward: logit rows must be in [0, {batch.num_tokens}), got {rows.tolist()}"
            )


def check_decoder_graph(graph: IrGraph, dimensions: ModelDimensions, head_dim: int) -> None:
    """Whether a graph is a decoder of these dimensions. Pure.  [MB-IR-5]

    Raises ConfigError (entries, exits, shapes, attention layers), UnsupportedError (an operation).
    """
    signals = infer_signals(graph)
    if len(graph.exits) != 1 or not set(graph.entries) <= set(ENTRIES):
        raise ConfigError(
            f"graph: entries {graph.entries[:9]}, exits {graph.exits[:9]}; expected {ENTRIES} and one exit"
        )
    for node in graph.nodes.values():
        if node.operation == "input" and (node.id != node.config.get("name") or node.id not in graph.entries):
            raise ConfigError(f"graph: input node {node.id!r:.80}: expected an entry, called as what it brings")
    found = signals[Port(graph.exits[0])]
    if found.shape != (-1, dimensions.vocab_size):
        raise ConfigError(f"graph: exit has shape {found.shape}, expected (-1, {dimensions.vocab_size}): logits")
    if len({spec.dtype for spec in graph.parameters.values()}) != 1:
        raise ConfigError("graph: expected parameters of one element type, and at least one")
    _check_attention(graph, dimensions, head_dim)


def _check_attention(graph: IrGraph, dimensions: ModelDimensions, head_dim: int) -> None:
    kv_heads = dimensions.num_heads if dimensions.num_kv_heads is None else dimensions.num_kv_heads
    seen: set[int] = set()
    for node in graph.nodes.values():
        if node.operation != "attention":
            continue
        attributes = attributes_of(node)
        layer, params = attributes.whole("layer", 0), attention_params(attributes)
        if layer in seen or layer >= dimensions.num_layers:
            raise ConfigError(
                f"graph: node {node.id!r:.80}: cache layer {layer}: got it twice, or not below {dimensions.num_layers}"
            )
        if (params.num_kv_heads, params.head_dim) != (kv_heads, head_dim):
            raise ConfigError(
                f"graph: node {node.id!r:.80}: caches {params.num_kv_heads} heads of {params.head_dim},"
                f" expected {kv_heads} of {head_dim} as the architecture says"
            )
        seen.add(layer)


def _program(graph: IrGraph) -> list[_Step]:
    """The nodes that the exit needs, in order, each with what can be forgotten after it."""
    last_reader: dict[str, str] = {}
    for node in graph.nodes.values():
        last_reader[node.id] = node.id
        for port in node.inputs:
            last_reader[port.node] = node.id
    last_reader.pop(graph.exits[0], None)
    forgets: dict[str, list[str]] = {}
    for value, reader in last_reader.items():
        forgets.setdefault(reader, []).append(value)
    return [
        _Step(
            node.id,
            operator_of(node),
            attributes_of(node),
            tuple(node.inputs),
            tuple(node.parameters),
            tuple((slot, name) for slot, names in sorted(node.taps().items(), reverse=True) for name in names),
            tuple(forgets.get(node.id, ())),
        )
        for node in graph.nodes.values()
    ]
