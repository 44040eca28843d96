"""A ModelIR as a graph that can be walked and rewritten, and back.  Clauses: MB-IR-1, MB-IR-5 (specs/model_builder.md).

A node's operands are the outputs on its input edges, in slot order, and then its layer's parameters, in their order.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ferrum_ref.errors import AlreadyExistsError, ConfigError, NotFoundError
from ferrum_ref.interfaces.model_builder import (
    GraphDefinition,
    GraphEdge,
    GraphNode,
    LayerDefinition,
    ModelIR,
    ParameterSpec,
)

MAX_SLOTS = 4096
MAX_DEPTH = 128  # of JSON settings; a recipe of 32 operations takes 66


class Port(NamedTuple):
    """One output of a node."""

    node: str
    slot: int = 0


@dataclass(slots=True)
class Node:
    """An operation in its place; `taps` names its outputs as an observer of a forward knows them."""

    id: str
    operation: str
    inputs: list[Port]
    parameters: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def taps(self) -> dict[int, list[str]]:
        """Observer names by output slot. Pure.  Raises ConfigError for metadata of another form."""
        found = self.metadata.get("taps", {})
        if not isinstance(found, Mapping) or not all(
            isinstance(slot, str)
            and slot.isascii()
            and slot.isdigit()
            and len(slot) < 5
            and isinstance(names, list)
            and all(isinstance(name, str) for name in names)
            for slot, names in found.items()
        ):
            raise ConfigError(f"graph: node {self.id!r:.80}: taps: expected slot -> list of names")
        return {int(slot): list(names) for slot, names in found.items()}

    def set_taps(self, taps: Mapping[int, list[str]]) -> None:
        kept = {str(slot): list(names) for slot, names in sorted(taps.items()) if names}
        rest = {key: value for key, value in self.metadata.items() if key != "taps"}
        self.metadata = {**rest, "taps": kept} if kept else rest


class IrGraph:
    """The nodes in topological order, the parameters by name, entries and exits."""

    def __init__(
        self,
        nodes: Iterable[Node],
        parameters: Iterable[ParameterSpec],
        entries: list[str],
        exits: list[str],
    ) -> None:
        """Raises AlreadyExistsError (a name twice), NotFoundError (an unknown one), ConfigError (a cycle)."""
        self.nodes: dict[str, Node] = {}
        for node in nodes:
            if node.id in self.nodes:
                raise AlreadyExistsError(f"graph: node {node.id!r:.80} occurs twice; ids are unique")
            self.nodes[node.id] = node
        self.parameters: dict[str, ParameterSpec] = {}
        for parameter in parameters:
            if parameter.name in self.parameters:
                raise AlreadyExistsError(f"graph: parameter {parameter.name!r:.80} occurs twice; names are unique")
            self.parameters[parameter.name] = parameter
        self.entries = entries
        self.exits = exits
        self._require_known()
        self.sort()

    @staticmethod
    def read(definition: ModelIR) -> IrGraph:
        """The graph of a definition, which is not touched.  Raises as the constructor; ConfigError for bad slots."""
        for parameter in definition.parameters:
            _require_shallow(f"parameter {parameter.name!r:.80}", parameter.metadata)
        for place in definition.graph.nodes:
            _require_shallow(f"node {place.id!r:.80}", place.metadata)
        layers: dict[str, LayerDefinition] = {}
        for layer in definition.layers:
            _require_shallow(f"layer {layer.name!r:.80}", layer.config)
            if layer.name in layers:
                raise AlreadyExistsError(f"graph: layer {layer.name!r:.80} occurs twice; names are unique")
            layers[layer.name] = layer
        known = {node.id for node in definition.graph.nodes}
        slots: dict[str, dict[int, Port]] = {}
        for edge in definition.graph.edges:
            for end in (edge.source, edge.target):
                if end not in known:
                    raise NotFoundError(f"graph: edge names node {end!r:.80}, which does not exist")
            inputs, slot = slots.setdefault(edge.target, {}), edge.target_input or 0
            if slot in inputs or slot >= MAX_SLOTS:
                raise ConfigError(f"graph: node {edge.target!r:.80}: input {slot} twice, or not below {MAX_SLOTS}")
            inputs[slot] = Port(edge.source, edge.source_output or 0)
        nodes = [_node(each, layers, slots.get(each.id, {})) for each in definition.graph.nodes]
        return IrGraph(nodes, definition.parameters, list(definition.graph.inputs), list(definition.graph.outputs))

    def write(self, definition: ModelIR) -> None:
        """Replace parameters, layers and graph of the definition, in topological order.  Mutates `definition`.

        Raises ConfigError if the operations do not fit together.
        """
        from ferrum_ref.builder.signals import layer_specs

        self.sort()
        definition.layers = layer_specs(self)
        definition.parameters = list(self.parameters.values())
        nodes = [GraphNode(node.id, node.id, dict(node.metadata)) for node in self.nodes.values()]
        edges = [
            GraphEdge(port.node, node.id, port.slot or None, slot or None)
            for node in self.nodes.values()
            for slot, port in enumerate(node.inputs)
        ]
        definition.graph = GraphDefinition(list(self.entries), list(self.exits), nodes, edges)

    def sort(self) -> None:
        """Topological order; among what is ready, the order so far.  Raises ConfigError naming a node of a cycle."""
        rank = {name: index for index, name in enumerate(self.nodes)}
        waiting = {name: len({port.node for port in node.inputs}) for name, node in self.nodes.items()}
        users: dict[str, set[str]] = {name: set() for name in self.nodes}
        for name, node in self.nodes.items():
            for port in node.inputs:
                users[port.node].add(name)
        ready = [(rank[name], name) for name, count in waiting.items() if not count]
        heapq.heapify(ready)
        ordered: dict[str, Node] = {}
        while ready:
            _, name = heapq.heappop(ready)
            ordered[name] = self.nodes[name]
            for user in users[name]:
                waiting[user] -= 1
                if not waiting[user]:
                    heapq.heappush(ready, (rank[user], user))
        if len(ordered) < len(self.nodes):
            stuck = next(name for name in self.nodes if name not in ordered)
            raise ConfigError(f"graph: node {stuck!r:.80} depends on itself; expected a graph without cycles")
        self.nodes = ordered

    def users(self) -> dict[Port, list[Node]]:
        """Who reads each output, in order; a reader occurs once for each slot. Pure."""
        found: dict[Port, list[Node]] = {}
        for node in self.nodes.values():
            for port in node.inputs:
                found.setdefault(port, []).append(node)
        return found

    def parameter_users(self) -> dict[str, int]:
        """How often each parameter is an operand. Pure."""
        counts = dict.fromkeys(self.parameters, 0)
        for node in self.nodes.values():
            for name in node.parameters:
                counts[name] += 1
        return counts

    def redirect(self, moves: Mapping[Port, Port]) -> None:
        """Every reader of a key reads its value instead; exits and taps move along.  Mutates the graph."""
        for node in self.nodes.values():
            node.inputs = [moves.get(port, port) for port in node.inputs]
        for old, new in moves.items():
            self.exits = [new.node if name == old.node and old.slot == 0 else name for name in self.exits]
            names = self.nodes[old.node].taps().get(old.slot, []) if old.node in self.nodes else []
            if names and new.node in self.nodes and old.node != new.node:
                taps = self.nodes[new.node].taps()
                present = taps.get(new.slot, [])
                taps[new.slot] = present + [name for name in names if name not in present]
                self.nodes[new.node].set_taps(taps)

    def add(self, node: Node) -> Port:
        """Add a node, under a free id, and give its output 0.  Mutates the graph."""
        node.id = self._free(node.id, self.nodes)
        self.nodes[node.id] = node
        return Port(node.id)

    def add_parameter(self, spec: ParameterSpec) -> str:
        """Add a parameter, under a free name, and give the name.  Mutates the graph."""
        name = self._free(spec.name, self.parameters)
        self.parameters[name] = replace(spec, name=name)
        return name

    def drop_unused_parameters(self) -> int:
        """Forget the parameters that no node takes; how many.  Mutates the graph."""
        unused = [name for name, count in self.parameter_users().items() if not count]
        for name in unused:
            del self.parameters[name]
        return len(unused)

    def _require_known(self) -> None:
        for node in self.nodes.values():
            for port in node.inputs:
                if port.node not in self.nodes:
                    raise NotFoundError(f"graph: node {node.id!r:.80} reads {port.node!r:.80}, which does not exist")
            for name in node.parameters:
                if name not in self.parameters:
                    raise NotFoundError(f"graph: node {node.id!r:.80}: parameter {name!r:.80} does not exist")
        for name in (*self.entries, *self.exits):
            if name not in self.nodes:
                raise NotFoundError(f"graph: entry or exit {name!r:.80} does not exist")

    @staticmethod
    def _free(base: str, taken: Mapping[str, object]) -> str:
        name, number = base, 1
        while name in taken:
            number += 1
            name = f"{base}.{number}"
        return name


def _require_shallow(what: str, value: Any) -> None:
    """Raises ConfigError for JSON nested so deep that code which walks it would fail."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for each in level
            for item in (
                each.values() if isinstance(each, Mapping) else each if isinstance(each, (list, tuple)) else ()
            )
        ]
        if not level:
            return
    raise ConfigError(f"graph: {what}: settings nested more than {MAX_DEPTH} deep")


def _node(place: GraphNode, layers: Mapping[str, LayerDefinition], slots: Mapping[int, Port]) -> Node:
    layer = layers.get(place.layer_name)
    if layer is None:
        raise NotFoundError(f"graph: node {place.id!r:.80}: layer {place.layer_name!r:.80} does not exist")
    if sorted(slots) != list(range(len(slots))):
        raise ConfigError(f"graph: node {place.id!r:.80}: inputs {sorted(slots)[:9]}, expected 0, 1, 2, ...")
    inputs = [slots[slot] for slot in range(len(slots))]
    return Node(place.id, layer.layer_type, inputs, list(layer.parameters), dict(layer.config), dict(place.metadata))
