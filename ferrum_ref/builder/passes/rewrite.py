"""What all passes share: rewrite a graph, count what went, tell honestly whether anything would change.

Clauses: MB-PASS-1..3 (specs/model_builder.md).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ferrum_ref.builder.graph import IrGraph, Node, Port
from ferrum_ref.builder.operators import Signal
from ferrum_ref.builder.signals import infer_signals, operand_signals, operator_of
from ferrum_ref.interfaces.model_builder import (
    ModelIR,
    OptimizationPass,
    OptimizationResult,
    OptimizationStats,
    OptimizationTechnique,
    ParameterSpec,
)


@dataclass(slots=True)
class Rewrite:
    """What a pass did: how many times it applied, and what its user should know."""

    num_changes: int
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class GraphSize:
    """Operations that compute, elements and bytes of the parameters, bytes that a forward of one row moves."""

    num_operations: int
    num_elements: int
    parameter_bytes: int
    traffic_bytes: int


class GraphPass(OptimizationPass):
    """A pass that rewrites the graph form.

    `keeps_bits`: the kernels get the same numbers as before, so float32 results are the same to the last bit;
    otherwise sums or products are taken in another order, and results agree as far as float32 does.  [MB-PASS-4]
    """

    label: ClassVar[str]
    technique: ClassVar[OptimizationTechnique]
    keeps_bits: ClassVar[bool]
    after: ClassVar[tuple[str, ...]] = ()

    def name(self) -> str:
        return self.label

    def dependencies(self) -> list[str]:
        return list(self.after)

    def is_applicable(self, definition: ModelIR) -> bool:
        """Found out by trying it on a copy.  [MB-PASS-2]"""
        graph = IrGraph.read(definition)
        infer_signals(graph)
        return self.rewrite(graph).num_changes > 0

    def apply(self, definition: ModelIR) -> OptimizationResult:
        """Rewrites `definition`; untouched if nothing applies or it is no valid graph.  [MB-PASS-1]"""
        graph = IrGraph.read(definition)
        before = measure(graph)
        done = self.rewrite(graph)
        if not done.num_changes:
            return OptimizationResult(False, OptimizationStats(0, 0, 0, 1.0), done.warnings)
        graph.sort()
        after = measure(graph)
        graph.write(definition)
        added = after.parameter_bytes - before.parameter_bytes
        if added > 0:
            done.warnings.append(f"{self.label}: parameters take {added} bytes more than before")
        return OptimizationResult(True, _stats(before, after), done.warnings)

    @abstractmethod
    def rewrite(self, graph: IrGraph) -> Rewrite:
        """Rewrite the graph in place."""


def measure(graph: IrGraph) -> GraphSize:
    """Counts of a graph, a dynamic dim taken as 1; views neither compute nor move anything. Pure.  [MB-PASS-3]"""
    signals = infer_signals(graph)
    operations = traffic = 0
    results: dict[str, list[Signal]] = {name: [] for name in graph.nodes}
    for port, signal in signals.items():
        results[port.node].append(signal)
    for node in graph.nodes.values():
        operator = operator_of(node)
        if operator.is_view:
            continue
        operations += 1
        operands = operand_signals(graph.parameters, node, signals)
        if operator.integer_operands:  # indexed: one row of each operand
            operands = [Signal((1, *signal.shape[1:]), signal.dtype) for signal in operands]
        traffic += sum(map(_bytes, [*operands, *results[node.id]]))
    return GraphSize(
        num_operations=operations,
        num_elements=sum(math.prod(spec.shape) for spec in graph.parameters.values()),
        parameter_bytes=sum(spec.dtype.packed_bytes(math.prod(spec.shape)) for spec in graph.parameters.values()),
        traffic_bytes=traffic,
    )


def only_user(users: dict[Port, list[Node]], graph: IrGraph, port: Port) -> Node | None:
    """The one node that reads this output, if no other does and it is no exit. Pure."""
    readers = users.get(port, [])
    return readers[0] if len(readers) == 1 and port.node not in graph.exits else None


def derived(graph: IrGraph, base: str, like: ParameterSpec, shape: Sequence[int], recipe: dict[str, object]) -> str:
    """Add a parameter that a recipe computes; its name.  Mutates the graph."""
    spec = ParameterSpec(base, list(shape), like.dtype, like.trainable, like.initialization, {"recipe": recipe})
    return graph.add_parameter(spec)


def _bytes(signal: Signal) -> int:
    return signal.dtype.packed_bytes(math.prod(1 if dim == -1 else dim for dim in signal.shape))


def _stats(before: GraphSize, after: GraphSize) -> OptimizationStats:
    return OptimizationStats(
        parameters_eliminated=max(0, before.num_elements - after.num_elements),
        operations_eliminated=max(0, before.num_operations - after.num_operations),
        memory_saved=max(0, before.parameter_bytes - after.parameter_bytes),
        estimated_speedup=before.traffic_bytes / after.traffic_bytes if after.traffic_bytes else 1.0,
    )
