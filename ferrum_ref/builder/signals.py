"""What is known of every value of a graph before it runs.  Clauses: MB-IR-4, MB-IR-5 (specs/model_builder.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ferrum_ref.builder.attributes import Attributes
from ferrum_ref.builder.graph import IrGraph, Node, Port
from ferrum_ref.builder.operators import MAX_ELEMENTS, Operator, Signal, static_size
from ferrum_ref.builder.operators_model import OPERATORS
from ferrum_ref.errors import ConfigError, UnsupportedError
from ferrum_ref.interfaces.model_builder import LayerDefinition, ParameterSpec, TensorSpec


def operator_of(node: Node) -> Operator:
    """Raises UnsupportedError for an operation that is not known. Pure."""
    operator = OPERATORS.get(node.operation)
    if operator is None:
        raise UnsupportedError(
            f"graph: node {node.id!r:.80}: operation {node.operation!r:.80} is not offered; known: "
            + ", ".join(sorted(OPERATORS))
        )
    return operator


def attributes_of(node: Node) -> Attributes:
    """The node's attributes, named after it. Pure."""
    return Attributes(f"graph node {node.id!r:.80} ({node.operation:.40})", node.config)


def infer_signals(graph: IrGraph) -> dict[Port, Signal]:
    """Shape and element type of every output.  Pure.

    Raises ConfigError where operations do not fit together, UnsupportedError for an unknown operation.
    """
    found: dict[Port, Signal] = {}
    for node in graph.nodes.values():
        operands = operand_signals(graph.parameters, node, found)
        for slot, signal in enumerate(operator_of(node).check(attributes_of(node), operands)):
            if static_size(signal.shape) > MAX_ELEMENTS:
                raise ConfigError(f"graph: node {node.id!r:.80}: shape {signal.shape} has too many elements")
            found[Port(node.id, slot)] = signal
    return found


def operand_signals(
    parameters: Mapping[str, ParameterSpec], node: Node, signals: Mapping[Port, Signal]
) -> list[Signal]:
    """Signals of a node's operands: its inputs, then its parameters. Pure.  Raises ConfigError for an absent output."""
    operands = []
    for port in node.inputs:
        if port not in signals:
            raise ConfigError(
                f"graph: node {node.id!r:.80} reads output {port.slot} of {port.node!r:.80}: there is none"
            )
        operands.append(signals[port])
    for name in node.parameters:
        spec = parameters[name]
        if any(not isinstance(dim, int) or dim < 0 for dim in spec.shape) or not spec.dtype.is_float():
            raise ConfigError(f"graph: parameter {name!r:.80}: expected a float type and dims of 0 or more")
        operands.append(Signal(tuple(spec.shape), spec.dtype))
    return operands


def layer_specs(graph: IrGraph) -> list[LayerDefinition]:
    """One layer per node, with the specs of its inputs and outputs. Pure.  Raises as `infer_signals`."""
    signals = infer_signals(graph)
    outputs: dict[str, list[TensorSpec]] = {name: [] for name in graph.nodes}
    for port, signal in signals.items():
        outputs[port.node].append(_spec(port, signal))
    return [
        LayerDefinition(
            name=node.id,
            layer_type=node.operation,
            inputs=_specs(node.inputs, signals),
            outputs=outputs[node.id],
            parameters=list(node.parameters),
            config=dict(node.config),
        )
        for node in graph.nodes.values()
    ]


def _specs(ports: Sequence[Port], signals: Mapping[Port, Signal]) -> list[TensorSpec]:
    return [_spec(port, signals[port]) for port in ports]


def _spec(port: Port, signal: Signal) -> TensorSpec:
    return TensorSpec(f"{port.node}:{port.slot}", list(signal.shape), signal.dtype)
