"""Passes that join operations into the backend's fused ones.  Clauses: MB-FUSE-1..4 (specs/model_builder.md)."""

from __future__ import annotations

from typing import ClassVar

from ferrum_ref.builder.graph import IrGraph, Node, Port
from ferrum_ref.builder.operators import Signal
from ferrum_ref.builder.passes.rewrite import GraphPass, Rewrite, derived, only_user
from ferrum_ref.builder.recipes import combine, recipe_of
from ferrum_ref.builder.signals import infer_signals
from ferrum_ref.interfaces.model_builder import OptimizationTechnique


class SiblingLinearFusion(GraphPass):
    """Projections of one input become one, their weights stacked by rows: q, k, v; gate and up.  [MB-FUSE-1]

    Siblings read one value, carry one `group` (or none), have a bias all or none, and own their weights.
    """

    label: ClassVar[str] = "sibling-linear-fusion"
    technique: ClassVar[OptimizationTechnique] = OptimizationTechnique.OperatorFusion
    keeps_bits: ClassVar[bool] = False

    def rewrite(self, graph: IrGraph) -> Rewrite:
        signals, counts = infer_signals(graph), graph.parameter_users()
        groups: dict[tuple[object, ...], list[Node]] = {}
        for node in graph.nodes.values():
            if (
                node.operation == "linear"
                and len(node.inputs) == 1
                and len(node.parameters) in (1, 2)
                and not node.taps()
                and node.id not in graph.exits
                and all(counts[name] == 1 for name in node.parameters)
            ):
                group = node.metadata.get("group")
                key = (node.inputs[0], group if isinstance(group, str) else None, len(node.parameters))
                groups.setdefault(key, []).append(node)
        fused = 0
        for (_, group, _), siblings in groups.items():
            if len(siblings) > 1:
                self._fuse(graph, siblings, signals, group if isinstance(group, str) else None)
                fused += 1
        graph.drop_unused_parameters()
        return Rewrite(fused, [])

    @staticmethod
    def _fuse(graph: IrGraph, siblings: list[Node], signals: dict[Port, Signal], group: str | None) -> None:
        first = siblings[0]
        name = group or f"{first.id}.stacked"
        parameters = []
        for position, kind in enumerate(("weight", "bias")[: len(first.parameters)]):
            specs = [graph.parameters[node.parameters[position]] for node in siblings]
            shape = [sum(spec.shape[0] for spec in specs), *specs[0].shape[1:]]
            recipe = combine("concat", {"dim": 0}, [recipe_of(spec) for spec in specs])
            parameters.append(derived(graph, f"{name}.{kind}", specs[0], shape, recipe))
        whole = Node(name, "linear", list(first.inputs), parameters)
        tap = first.metadata.get("group_tap")
        if isinstance(tap, str):
            whole.set_taps({0: [tap]})
        port = graph.add(whole)
        start = 0
        for node in siblings:
            size = signals[Port(node.id)].shape
            config = {"dim": len(size) - 1, "start": start, "end": start + size[-1]}
            graph.redirect({Port(node.id): graph.add(Node(f"{node.id}.part", "slice", [port], [], config))})
            del graph.nodes[node.id]
            start += size[-1]


class RotaryFusion(GraphPass):
    """Neighbouring slices of one projection that are turned alike are turned at once: q and k.  [MB-FUSE-2]

    The projection is cut into heads first, so every slice of it that becomes heads of this size is one of heads.
    """

    label: ClassVar[str] = "rotary-fusion"
    technique: ClassVar[OptimizationTechnique] = OptimizationTechnique.OperatorFusion
    keeps_bits: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("sibling-linear-fusion",)

    def rewrite(self, graph: IrGraph) -> Rewrite:
        fused = 0
        for port, signal in infer_signals(graph).items():
            if port.node in graph.nodes and graph.nodes[port.node].operation == "linear" and len(signal.shape) == 2:
                fused += self._fuse(graph, port, signal.shape[1])
        return Rewrite(fused, [])

    @classmethod
    def _fuse(cls, graph: IrGraph, source: Port, width: int) -> bool:
        users = graph.users()
        cuts = [cut for cut in users.get(source, []) if cut.operation == "slice" and not cut.taps()]
        heads = {cut.id: cls._heads(graph, users, cut) for cut in cuts}
        turned = [(cut, cls._turn(graph, users, heads[cut.id])) for cut in cuts]
        pairs = [(cut, turn) for cut, turn in turned if turn is not None]
        pairs.sort(key=lambda pair: pair[0].config["start"])
        if len(pairs) < 2 or len(pairs) != sum(turn is not None for _, turn in turned):
            return False
        (first, first_turn), *rest = pairs
        for (left, _), (right, turn) in zip(pairs, rest):
            if left.config["end"] != right.config["start"] or turn.inputs[1:] != first_turn.inputs[1:]:
                return False
        head_dim = heads[first.id].config["shape"][2]  # type: ignore[union-attr]
        bounds = [cut.config[key] for cut, _ in pairs for key in ("start", "end")]
        same = all(heads[cut.id].config["shape"][2] == head_dim for cut, _ in pairs)  # type: ignore[union-attr]
        if not same or any(size % head_dim for size in (width, *bounds)):
            return False
        cls._replace(graph, source, width // head_dim, head_dim, pairs, heads)
        return True

    @staticmethod
    def _replace(
        graph: IrGraph,
        source: Port,
        num_heads: int,
        head_dim: int,
        pairs: list[tuple[Node, Node]],
        heads: dict[str, Node | None],
    ) -> None:
        base = source.node
        whole = graph.add(Node(f"{base}.heads", "reshape", [source], [], {"shape": [-1, num_heads, head_dim]}))
        low, high = pairs[0][0].config["start"] // head_dim, pairs[-1][0].config["end"] // head_dim
        cut = graph.add(Node(f"{base}.turning", "slice", [whole], [], {"dim": 1, "start": low, "end": high}))
        turned = graph.add(Node(f"{base}.turned", "rotary", [cut, *pairs[0][1].inputs[1:]]))
        taken = {old.id for old, _ in pairs}
        for old, turn in pairs:
            start, end = (old.config[key] // head_dim - low for key in ("start", "end"))
            config = {"dim": 1, "start": start, "end": end}
            graph.redirect({Port(turn.id): graph.add(Node(f"{turn.id}.part", "slice", [turned], [], config))})
        for old_id, reshape in heads.items():
            old = graph.nodes[old_id]
            if old_id in taken or reshape is None or reshape.config["shape"][2] != head_dim:
                continue
            start, end = (old.config[key] // head_dim for key in ("start", "end"))
            if start * head_dim != old.config["start"]:
                continue
            config = {"dim": 1, "start": start, "end": end}
            graph.redirect({Port(reshape.id): graph.add(Node(f"{reshape.id}.part", "slice", [whole], [], config))})
            taken.add(old_id)
        for old_id in taken:
            reshape = heads[old_id]
            for gone in (old_id, reshape.id if reshape else "", *(turn.id for old, turn in pairs if old.id == old_id)):
                graph.nodes.pop(gone, None)

    @staticmethod
    def _heads(graph: IrGraph, users: dict[Port, list[Node]], cut: Node) -> Node | None:
        """The reshape of a slice to [rows, heads, D], if that is all that is done with it."""
        reader = only_user(users, graph, Port(cut.id))
        if reader is None or reader.operation != "reshape" or reader.taps():
            return None
        shape = reader.config["shape"]
        return reader if len(shape) == 3 and shape[0] == -1 and cut.config["dim"] == 1 else None

    @staticmethod
    def _turn(graph: IrGraph, users: dict[Port, list[Node]], heads: Node | None) -> Node | None:
        if heads is None:
            return None
        reader = only_user(users, graph, Port(heads.id))
        if reader is None or reader.operation != "rotary" or reader.inputs[0] != Port(heads.id) or reader.taps():
            return None
        return reader if reader.id not in graph.exits and len(reader.inputs) == 4 else None


class SwigluFusion(GraphPass):
    """`mul(silu(gate), up)` becomes `silu_mul(gate, up)`.  [MB-FUSE-3]"""

    label: ClassVar[str] = "swiglu-fusion"
    technique: ClassVar[OptimizationTechnique] = OptimizationTechnique.OperatorFusion
    keeps_bits: ClassVar[bool] = True

    def rewrite(self, graph: IrGraph) -> Rewrite:
        signals, users = infer_signals(graph), graph.users()
        fused = 0
        for node in list(graph.nodes.values()):
            if node.operation != "mul" or len(node.inputs) != 2:
                continue
            for slot, port in enumerate(node.inputs):
                active, up = graph.nodes[port.node], node.inputs[1 - slot]
                if (
                    active.operation == "silu"
                    and not active.taps()
                    and len(active.inputs) == 1
                    and only_user(users, graph, port) is node
                    and signals[active.inputs[0]].shape == signals[up].shape
                ):
                    node.operation, node.inputs = "silu_mul", [active.inputs[0], up]
                    del graph.nodes[active.id]
                    fused += 1
                    break
        return Rewrite(fused, [])


class ResidualNormFusion(GraphPass):
    """`r = add(update, residual)` and `rms_norm(r)` become one operation that gives both.  [MB-FUSE-4]"""

    label: ClassVar[str] = "residual-norm-fusion"
    technique: ClassVar[OptimizationTechnique] = OptimizationTechnique.OperatorFusion
    keeps_bits: ClassVar[bool] = True

    def rewrite(self, graph: IrGraph) -> Rewrite:
        signals = infer_signals(graph)
        fused = 0
        for node in list(graph.nodes.values()):
            if node.operation != "rms_norm" or len(node.inputs) != 1:
                continue
            total = graph.nodes[node.inputs[0].node]
            if (
                total.operation != "add"
                or len(total.inputs) != 2
                or total.id in graph.exits
                or signals[total.inputs[0]].shape != signals[total.inputs[1]].shape
            ):
                continue
            node.operation, node.inputs = "rms_norm_residual", list(total.inputs)
            signals[Port(node.id, 1)] = signals[Port(total.id)]
            graph.redirect({Port(total.id): Port(node.id, 1)})
            del graph.nodes[total.id]
            fused += 1
        return Rewrite(fused, [])
