"""Passes that do work once, when weights are loaded, instead of in every forward.

Clauses: MB-FOLD-1..3 (specs/model_builder.md).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from ferrum_ref.builder.graph import IrGraph, Node, Port
from ferrum_ref.builder.passes.rewrite import GraphPass, Rewrite, derived, only_user
from ferrum_ref.builder.recipes import combine, recipe_of
from ferrum_ref.builder.signals import infer_signals, operator_of
from ferrum_ref.interfaces.model_builder import (
    InitializationStrategy,
    OptimizationTechnique,
    ParameterSpec,
)

_FOLDED_NORM = "folded_norm"


class ConstantFolding(GraphPass):
    """Operations on constants alone become parameters with a recipe: rotary tables, transposed weights.  [MB-FOLD-1]"""

    label: ClassVar[str] = "constant-folding"
    technique: ClassVar[OptimizationTechnique] = OptimizationTechnique.ConstantFolding
    keeps_bits: ClassVar[bool] = True

    def rewrite(self, graph: IrGraph) -> Rewrite:
        signals = infer_signals(graph)
        folded = 0
        for node in list(graph.nodes.values()):
            if not self._is_constant(graph, node) or any(
                -1 in signal.shape for port, signal in signals.items() if port.node == node.id
            ):
                continue
            inputs = [recipe_of(graph.parameters[graph.nodes[port.node].parameters[0]]) for port in node.inputs]
            inputs += [recipe_of(graph.parameters[name]) for name in node.parameters]
            moves: dict[Port, Port] = {}
            used = {port for each in graph.nodes.values() for port in each.inputs} | {Port(e) for e in graph.exits}
            for port in [port for port in signals if port.node == node.id and port in used]:
                recipe = combine(node.operation, node.config, inputs, port.slot)
                spec = ParameterSpec(
                    f"{node.id}.{port.slot}",
                    list(signals[port].shape),
                    signals[port].dtype,
                    False,
                    InitializationStrategy.Zeros,
                    {"recipe": recipe},
                )
                moves[port] = graph.add(Node(f"{node.id}.{port.slot}", "parameter", [], [graph.add_parameter(spec)]))
            graph.redirect(moves)
            del graph.nodes[node.id]
            folded += 1
        if folded:
            self._drop_idle_constants(graph)
        return Rewrite(folded, [])

    @staticmethod
    def _is_constant(graph: IrGraph, node: Node) -> bool:
        operator = operator_of(node)
        if node.operation == "parameter" or not operator.is_pure:
            return False
        return not operator.integer_operands and all(
            graph.nodes[port.node].operation == "parameter" for port in node.inputs
        )

    @staticmethod
    def _drop_idle_constants(graph: IrGraph) -> None:
        """Parameter nodes whose readers were folded, and the parameters nobody takes any more."""
        read = {port.node for node in graph.nodes.values() for port in node.inputs} | set(graph.exits)
        for name in [name for name, node in graph.nodes.items() if node.operation == "parameter" and name not in read]:
            del graph.nodes[name]
        graph.drop_unused_parameters()


class ScaleFolding(GraphPass):
    """A constant factor moves into what is next to it.  [MB-FOLD-2]

    `attention(scale(q))` multiplies its softmax_scale; `scale(linear(x))` multiplies weight and bias, unless another
    operation takes them too.
    """

    label: ClassVar[str] = "scale-folding"
    technique: ClassVar[OptimizationTechnique] = OptimizationTechnique.ConstantFolding
    keeps_bits: ClassVar[bool] = False

    def rewrite(self, graph: IrGraph) -> Rewrite:
        folded = 0
        for node in list(graph.nodes.values()):
            if node.operation == "scale" and not node.taps() and node.id not in graph.exits:
                folded += self._into_attention(graph, node) or self._into_linear(graph, node)
        return Rewrite(folded, [])

    @staticmethod
    def _into_attention(graph: IrGraph, node: Node) -> bool:
        reader = only_user(graph.users(), graph, Port(node.id))
        if reader is None or reader.operation != "attention" or reader.inputs[0] != Port(node.id):
            return False
        reader.config = {**reader.config, "softmax_scale": reader.config["softmax_scale"] * node.config["factor"]}
        reader.inputs[0] = node.inputs[0]
        del graph.nodes[node.id]
        return True

    @staticmethod
    def _into_linear(graph: IrGraph, node: Node) -> bool:
        source = graph.nodes[node.inputs[0].node]
        counts = graph.parameter_users()
        if (
            source.operation != "linear"
            or len(source.inputs) != 1
            or source.taps()
            or only_user(graph.users(), graph, node.inputs[0]) is not node
            or any(counts[name] != 1 for name in source.parameters)
        ):
            return False
        config = {"factor": node.config["factor"]}
        scaled = []
        for name in source.parameters:
            spec = graph.parameters[name]
            recipe = combine("scale", config, [recipe_of(spec)])
            scaled.append(derived(graph, f"{name}.scaled", spec, spec.shape, recipe))
        source.parameters = scaled
        graph.redirect({Port(node.id): node.inputs[0]})
        del graph.nodes[node.id]
        graph.drop_unused_parameters()
        return True


class NormScaleFolding(GraphPass):
    """The weight of a norm moves into the columns of the projections that read it: W' = W diag(w).  [MB-FOLD-3]

    Afterwards all these norms share one vector of ones, and an observer sees them no more: their values are gone. A
    norm with another reader stays as it is, and so, with a warning, does one whose projection's weight is used twice.
    """

    label: ClassVar[str] = "norm-scale-folding"
    technique: ClassVar[OptimizationTechnique] = OptimizationTechnique.ConstantFolding
    keeps_bits: ClassVar[bool] = False

    def rewrite(self, graph: IrGraph) -> Rewrite:
        folded, warnings = 0, []
        for node in list(graph.nodes.values()):
            if node.operation not in ("rms_norm", "rms_norm_residual") or node.metadata.get(_FOLDED_NORM):
                continue
            users, counts = graph.users(), graph.parameter_users()
            readers = users.get(Port(node.id), [])
            if (
                not readers
                or node.id in graph.exits
                or not node.parameters
                or any(each.operation != "linear" or len(each.parameters) < 1 for each in readers)
            ):
                continue
            if any(counts[each.parameters[0]] != 1 for each in readers):
                warnings.append(f"{self.label}: {node.id}: a projection's weight is used elsewhere too; left alone")
                continue
            self._fold(graph, node, readers)
            folded += 1
        graph.drop_unused_parameters()
        return Rewrite(folded, warnings if folded else [])

    @staticmethod
    def _fold(graph: IrGraph, node: Node, readers: list[Node]) -> None:
        norm = graph.parameters[node.parameters[-1]]
        for reader in readers:
            spec = graph.parameters[reader.parameters[0]]
            recipe = combine("mul", {}, [recipe_of(spec), recipe_of(norm)])
            reader.parameters[0] = derived(graph, f"{spec.name}.normed", spec, spec.shape, recipe)
        node.parameters[-1] = _ones(graph, norm)
        node.metadata = {**node.metadata, _FOLDED_NORM: True}
        node.set_taps({slot: names for slot, names in node.taps().items() if slot != 0})


def _ones(graph: IrGraph, like: ParameterSpec) -> str:
    """The shared vector of ones of this length."""
    config = {"shape": list(like.shape), "value": 1.0, "dtype": like.dtype.value}
    recipe = combine("fill", config, [])
    for name, spec in graph.parameters.items():
        if spec.metadata.get("recipe") == recipe:
            return name
    return derived(graph, f"ones.{like.shape[0]}", replace(like, trainable=False), like.shape, recipe)
