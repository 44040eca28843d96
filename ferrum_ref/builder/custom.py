"""The user's layers: checked, and put into a definition at their positions.

Clauses: MB-CUSTOM-1..5 (specs/model_builder.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ferrum_ref.builder.graph import IrGraph, Node, Port
from ferrum_ref.builder.operators import INTEGERS, Signal, agree
from ferrum_ref.builder.operators_model import OPERATORS
from ferrum_ref.builder.signals import infer_signals
from ferrum_ref.errors import AlreadyExistsError, ConfigError, NotFoundError
from ferrum_ref.interfaces.model_builder import CustomLayer, InitializationStrategy, ModelIR, ParameterSpec
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.types.devices import DataType

_POSITION: Final = "after"
_NOT_CALLED: Final = ("input", "parameter", "attention", "custom")


def insert_layers(
    definition: ModelIR, layers: Sequence[CustomLayer]
) -> tuple[dict[str, CustomLayer], dict[str, TensorRef]]:
    """Put each layer behind the value its config names; what read the value reads the layer's result instead.

    Layers behind one value run in the order given. Mutates `definition`. Returns the layers to call, by name, and their
    parameters' tensors, by parameter name.  [MB-CUSTOM-1..4]
    Raises AlreadyExistsError (a name twice), NotFoundError (no such value), ConfigError (shapes, settings).
    """
    graph = IrGraph.read(definition)
    dtype = next(iter(graph.parameters.values())).dtype
    called: dict[str, CustomLayer] = {}
    tensors: dict[str, TensorRef] = {}
    names: set[str] = set()
    for layer in layers:
        name = layer.name()
        if not name or name in names or name in graph.nodes:
            raise AlreadyExistsError(f"custom layer {name!r:.80}: the name is empty or taken; names are unique")
        names.add(name)
        given = _parameters(layer, graph)
        port = _position(layer, graph)
        node = _node(layer, port, infer_signals(graph)[port], given)
        for parameter, tensor in given.items():
            full = f"{name}.{parameter}"
            graph.add_parameter(_spec(full, tensor, dtype))
            tensors[full] = tensor
        _insert(graph, port, node)
        if node.operation == "custom":
            called[name] = layer
        graph.sort()
        infer_signals(graph)
    graph.write(definition)
    return called, tensors


def _position(layer: CustomLayer, graph: IrGraph) -> Port:
    """The value behind which the layer stands, by the name an observer sees."""
    config = layer.config()
    wanted = config.get(_POSITION) if isinstance(config, Mapping) else None
    if not isinstance(wanted, str):
        raise ConfigError(
            f"custom layer {layer.name()!r:.80}: config: {_POSITION}: got {wanted!r:.80}, expected the name of a value,"
            " such as 'embedding' or 'layers.0.hidden'"
        )
    known: dict[str, Port] = {}
    for node in graph.nodes.values():
        for slot, taps in node.taps().items():
            known.update(dict.fromkeys(taps, Port(node.id, slot)))
    if wanted not in known:
        raise NotFoundError(
            f"custom layer {layer.name()!r:.80}: {_POSITION}: got {wanted!r:.80}, expected one of {', '.join(known)}"
        )
    return known[wanted]


def _parameters(layer: CustomLayer, graph: IrGraph) -> dict[str, TensorRef]:
    given = layer.initialize_parameters()
    if not isinstance(given, Mapping) or not all(isinstance(name, str) and name for name in given):
        raise ConfigError(f"custom layer {layer.name()!r:.80}: initialize_parameters: expected name -> tensor")
    for name in given:
        if f"{layer.name()}.{name}" in graph.parameters:
            raise AlreadyExistsError(f"custom layer {layer.name()!r:.80}: parameter {name!r:.80} exists already")
    return dict(given)


def _node(layer: CustomLayer, port: Port, signal: Signal, given: Mapping[str, TensorRef]) -> Node:
    """The layer as a node: its own forward, or the graph operation of its type."""
    name, shape = layer.name(), list(signal.shape)
    wanted = list(layer.input_shape())
    if signal.dtype is INTEGERS or len(wanted) != len(shape) or not all(map(agree, wanted, shape)):
        raise ConfigError(f"custom layer {name!r:.80}: input_shape: got {wanted}, expected {shape}")
    promised = list(layer.output_shape(shape))
    if len(promised) != len(shape) or not all(map(agree, promised, shape)):
        raise ConfigError(
            f"custom layer {name!r:.80}: output_shape: got {promised}, expected {shape}: what follows reads that shape"
        )
    parameters = [f"{name}.{parameter}" for parameter in given]
    has_forward = type(layer).forward is not CustomLayer.forward
    if has_forward or layer.layer_type() not in OPERATORS or layer.layer_type() in _NOT_CALLED:
        if not has_forward:
            raise ConfigError(
                f"custom layer {name!r:.80}: layer_type {layer.layer_type()!r:.80} is no operation of the graph, and"
                " the layer has no forward of its own"
            )
        config: dict[str, Any] = {"layer": name, "parameter_names": list(given), "output_shape": shape}
        return Node(name, "custom", [port], parameters, config, {"layer_type": layer.layer_type()})
    settings = {key: value for key, value in layer.config().items() if key != _POSITION}
    return Node(name, layer.layer_type(), [port], parameters, settings)


def _insert(graph: IrGraph, port: Port, node: Node) -> None:
    """Readers of the value read the node; the node itself reads the value, which keeps its own name."""
    inputs = list(node.inputs)
    taps = graph.nodes[port.node].taps()
    new = graph.add(node)
    graph.redirect({port: new})
    node.inputs = inputs
    graph.nodes[port.node].set_taps({slot: names for slot, names in taps.items() if slot != port.slot})


def _spec(name: str, tensor: TensorRef, dtype: DataType) -> ParameterSpec:
    """A custom parameter is kept in the model's element type, like every other."""
    if not tensor.dtype().is_float():
        raise ConfigError(f"custom parameter {name!r:.80}: got {tensor.dtype().name}, expected a float type")
    shape = [int(dim) for dim in tensor.shape()]
    return ParameterSpec(name, shape, dtype, True, InitializationStrategy.Custom(name), {"custom": True})
