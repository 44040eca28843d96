"""Passes that remove what is computed twice, or for nobody.  Clauses: MB-CSE-1, MB-DEAD-1 (specs/model_builder.md)."""

from __future__ import annotations

import json
from typing import ClassVar

from ferrum_ref.builder.graph import IrGraph, Node, Port
from ferrum_ref.builder.passes.rewrite import GraphPass, Rewrite
from ferrum_ref.builder.signals import infer_signals, operator_of
from ferrum_ref.interfaces.model_builder import OptimizationTechnique, ParameterSpec


class CommonSubexpressionElimination(GraphPass):
    """Pure operations with equal operands and attributes become one; so do parameters of one recipe.  [MB-CSE-1]"""

    label: ClassVar[str] = "common-subexpression-elimination"
    technique: ClassVar[OptimizationTechnique] = OptimizationTechnique.DeadCodeElimination
    keeps_bits: ClassVar[bool] = True

    def rewrite(self, graph: IrGraph) -> Rewrite:
        merged = self._merge_parameters(graph)
        num_slots: dict[str, int] = {}
        for port in infer_signals(graph):
            num_slots[port.node] = num_slots.get(port.node, 0) + 1
        first: dict[str, Node] = {}
        for node in list(graph.nodes.values()):
            if not operator_of(node).is_pure:
                continue
            key = json.dumps([node.operation, node.config, node.parameters, node.inputs], sort_keys=True, default=repr)
            kept = first.setdefault(key, node)
            if kept is node:
                continue
            graph.redirect({Port(node.id, slot): Port(kept.id, slot) for slot in range(num_slots[node.id])})
            del graph.nodes[node.id]
            merged += 1
        return Rewrite(merged, [])

    @staticmethod
    def _merge_parameters(graph: IrGraph) -> int:
        """Parameters that the same recipe computes."""
        first: dict[str, str] = {}
        same: dict[str, str] = {}
        for name, spec in graph.parameters.items():
            key = _recipe_key(spec)
            if key is not None and first.setdefault(key, name) != name:
                same[name] = first[key]
        if not same:
            return 0
        for node in graph.nodes.values():
            node.parameters = [same.get(name, name) for name in node.parameters]
        for name in same:
            del graph.parameters[name]
        return len(same)


def _recipe_key(spec: ParameterSpec) -> str | None:
    recipe = spec.metadata.get("recipe")
    return None if recipe is None else json.dumps([spec.shape, spec.dtype.value, recipe], sort_keys=True, default=repr)


class DeadNodeElimination(GraphPass):
    """Nodes that no exit depends on go, and parameters that no node takes; entries stay.  [MB-DEAD-1]"""

    label: ClassVar[str] = "dead-node-elimination"
    technique: ClassVar[OptimizationTechnique] = OptimizationTechnique.DeadCodeElimination
    keeps_bits: ClassVar[bool] = True

    def rewrite(self, graph: IrGraph) -> Rewrite:
        live: set[str] = set()
        waiting = list(graph.exits)
        while waiting:
            name = waiting.pop()
            if name not in live:
                live.add(name)
                waiting += [port.node for port in graph.nodes[name].inputs]
        dead = [name for name in graph.nodes if name not in live and name not in graph.entries]
        for name in dead:
            del graph.nodes[name]
        return Rewrite(len(dead) + graph.drop_unused_parameters(), [])
