"""Each pass: what it does to a graph, what it counts, and that the output stays."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_ref.builder.export import export_definition
from ferrum_ref.builder.graph import IrGraph, Node, Port
from ferrum_ref.builder.ir_decoder import IrDecoder
from ferrum_ref.builder.operators import Runtime
from ferrum_ref.builder.passes import (
    CommonSubexpressionElimination,
    ConstantFolding,
    DeadNodeElimination,
    GraphPass,
    NormScaleFolding,
    ResidualNormFusion,
    RotaryFusion,
    ScaleFolding,
    SiblingLinearFusion,
    SwigluFusion,
    apply_passes,
    default_passes,
    measure,
)
from ferrum_ref.builder.recipes import evaluate
from ferrum_ref.errors import ConfigError
from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.interfaces.model_builder import InitializationStrategy, ModelIR, ParameterSpec
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory, KvShape
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.types.devices import DataType
from ferrum_ref.types.models import ModelType

BACKEND = make_backend()
ALL = (
    CommonSubexpressionElimination, ConstantFolding, ScaleFolding, SiblingLinearFusion, RotaryFusion, SwigluFusion,
    ResidualNormFusion, NormScaleFolding, DeadNodeElimination,
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "biases, one kv head": {"num_kv_heads": 1, "attention_bias": True, "mlp_bias": True},
    "tied, wide heads": {"tie_word_embeddings": True, "hidden_size": 48, "head_dim": 16},
}


def export(tiny: Any) -> ModelIR:
    return export_definition(
        tiny.config, name="x", model_type=ModelType.Llama, dtype=DataType.FP32, max_tokens=96, additional={}
    )


def logits(definition: ModelIR, tiny: Any, ids: list[int]) -> Any:
    graph, config = IrGraph.read(definition), tiny.config

    def load(name: str, shape: Any, dtype: Any, strategy: Any) -> Any:
        return tiny.tensors[name]

    parameters = {name: evaluate(spec, Runtime(BACKEND), load) for name, spec in graph.parameters.items()}
    decoder = IrDecoder(graph, parameters, definition.architecture.dimensions, config.head_dim, BACKEND)
    caches = ContiguousKvFactory(BACKEND, KvShape(config.num_layers, config.num_kv_heads, config.head_dim), 96)
    batch = ForwardBatch.build([ids], [0]).with_all_logits()
    return decoder.forward(batch, caches.bind([caches.new_cache()], batch.lengths)).to_numpy()


def kinds(definition: ModelIR) -> list[str]:
    return [layer.layer_type for layer in definition.layers]


def before(pass_type: type[GraphPass], definition: ModelIR) -> None:
    """What a pass needs to find anything: the passes it depends on, and those it follows at level 3."""
    for each in default_passes(3):
        if each.name() == pass_type.label:
            return
        each.apply(definition)


@pytest.mark.clause("MB-PASS-1", "MB-PASS-2", "MB-PASS-4")
@pytest.mark.parametrize("pass_type", ALL)
@pytest.mark.parametrize("name", VARIANTS)
def test_output_stays(tiny_llama: Any, pass_type: type[GraphPass], name: str) -> None:
    """Random weights, random ids: the same bits where the pass promises them, the decoder's bound elsewhere."""
    tiny = tiny_llama(3, **VARIANTS[name])
    ids = np.random.default_rng(11).integers(0, 97, 30).tolist()
    exact = tiny.logits(ids, True)
    bound = 2 * np.abs(tiny.logits(ids, False) - exact).max()
    for prepare in (lambda d: None, lambda d: before(pass_type, d)):
        definition = export(tiny)
        prepare(definition)
        expected, old = logits(definition, tiny, ids), copy.deepcopy(definition)
        one = pass_type()
        applicable = one.is_applicable(definition)
        assert definition == old
        result = one.apply(definition)
        assert result.applied is applicable is (definition != old)
        found = logits(definition, tiny, ids)
        if pass_type.keeps_bits:
            np.testing.assert_array_equal(found, expected)
        assert np.abs(found - exact).max() <= bound
        assert not one.is_applicable(definition)
        again = copy.deepcopy(definition)
        assert not one.apply(definition).applied
        assert definition == again


@pytest.mark.clause("MB-PASS-1")
@pytest.mark.parametrize("pass_type", ALL)
def test_a_graph_that_is_none_is_left_alone(tiny_llama: Any, pass_type: type[GraphPass]) -> None:
    definition = export(tiny_llama(3))
    definition.layers[5] = dataclasses.replace(definition.layers[5], config={"shape": "?"}, layer_type="reshape")
    old = copy.deepcopy(definition)
    for use in (pass_type().apply, pass_type().is_applicable):
        with pytest.raises(ConfigError):
            use(definition)
    assert definition == old


@pytest.mark.clause("MB-PASS-3")
def test_stats_are_counted(tiny_llama: Any) -> None:
    """3 layers: counted by hand from the list of nodes in MB-EXPORT-1 and the sizes of the tiny model."""
    definition = export(tiny_llama(3))
    graph = IrGraph.read(definition)
    size = measure(graph)
    num_views = 4 * 3 + 3  # reshapes and entries
    assert size.num_operations == len(graph.nodes) - num_views
    assert size.num_elements == sum(math.prod(spec.shape) for spec in definition.parameters)
    assert size.parameter_bytes == 4 * size.num_elements
    cse = CommonSubexpressionElimination().apply(definition).stats
    assert (cse.operations_eliminated, cse.parameters_eliminated, cse.memory_saved) == (2, 0, 0)
    table_bytes = 2 * 96 * 4 * 4
    after = size.traffic_bytes - 2 * table_bytes  # two operations less that write both tables
    assert cse.estimated_speedup == pytest.approx(size.traffic_bytes / after)
    folding = ConstantFolding().apply(definition)
    assert folding.stats.operations_eliminated == 1
    assert folding.stats.memory_saved == 0
    assert folding.warnings == [f"constant-folding: parameters take {table_bytes} bytes more than before"]
    assert folding.stats.estimated_speedup == pytest.approx(after / (after - table_bytes))
    assert ScaleFolding().apply(definition).stats.operations_eliminated == 3
    fusion = SiblingLinearFusion().apply(definition).stats
    assert (fusion.operations_eliminated, fusion.parameters_eliminated) == (9, 0)
    assert RotaryFusion().apply(definition).stats.operations_eliminated == 3
    assert SwigluFusion().apply(definition).stats.operations_eliminated == 3
    assert ResidualNormFusion().apply(definition).stats.operations_eliminated == 6
    norm = NormScaleFolding().apply(definition).stats
    assert (norm.parameters_eliminated, norm.memory_saved) == (6 * 32, 4 * 6 * 32)  # seven norms, one vector of ones


@pytest.mark.clause("MB-PASS-3")
def test_traffic_of_one_operation() -> None:
    """add of two [N, 8] float32: at one row 3 * 8 * 4 bytes; a projection reads its whole matrix.

    A look-up reads one id of 4 bytes and one row, and writes that.
    """
    graph = small()
    x = graph.add(Node("x", "embedding", [Port("ids")], ["table"]))
    one = graph.add(Node("sum", "add", [x, x]))
    graph.exits = [one.node]
    assert measure(graph).traffic_bytes == 4 + 2 * 8 * 4 + 3 * 8 * 4
    graph.exits = [graph.add(Node("y", "linear", [one], ["w"])).node]
    assert measure(graph).traffic_bytes == 4 + 2 * 8 * 4 + 3 * 8 * 4 + 8 * 4 + 6 * 8 * 4 + 6 * 4


def spec(name: str, *shape: int) -> ParameterSpec:
    return ParameterSpec(name, list(shape), DataType.FP32, True, InitializationStrategy.Ones, {})


def small() -> IrGraph:
    """Entries and parameters to build on: table [11, 8], w, w2 [6, 8], b, b2 [6], g [8], gain [8]."""
    entry = Node("ids", "input", [], [], {"name": "token_ids"})
    parameters = [spec("table", 11, 8), spec("w", 6, 8), spec("w2", 6, 8), spec("b", 6), spec("b2", 6), spec("g", 8)]
    return IrGraph([entry], parameters, ["ids"], [])


VALUES = {
    name: np.random.default_rng(i).standard_normal(shape).astype(np.float32)
    for i, (name, shape) in enumerate(
        {"table": (11, 8), "w": (6, 8), "w2": (6, 8), "b": (6,), "b2": (6,), "g": (8,)}.items()
    )
}


def results(graph: IrGraph) -> list[Any]:
    """The exits' values for ids 3, 7, 3, computed node by node."""
    from ferrum_ref.builder.signals import attributes_of, operator_of

    runtime = Runtime(BACKEND, {"token_ids": np.array([3, 7, 3])})
    graph.sort()
    parameters = {
        name: evaluate(each, runtime, lambda name, *_: VALUES[name]) for name, each in graph.parameters.items()
    }
    found: dict[str, Any] = {}
    for node in graph.nodes.values():
        operands = [found[port.node][port.slot] for port in node.inputs] + [parameters[n] for n in node.parameters]
        found[node.id] = operator_of(node).run(runtime, attributes_of(node), operands)
    return [found[name][0].to_numpy() for name in graph.exits]


def rewritten(graph: IrGraph, one: GraphPass) -> tuple[int, IrGraph]:
    other = copy.deepcopy(graph)
    num_changes = one.rewrite(other).num_changes
    other.sort()
    return num_changes, other


def operations(graph: IrGraph) -> list[str]:
    return sorted(node.operation for node in graph.nodes.values() if node.operation != "input")


@pytest.mark.clause("MB-CSE-1")
def test_equal_operations_become_one(tiny_llama: Any) -> None:
    definition = export(tiny_llama(3))
    assert kinds(definition).count("rope_tables") == 3
    CommonSubexpressionElimination().apply(definition)
    assert kinds(definition).count("rope_tables") == 1
    assert kinds(definition).count("attention") == 3  # not pure: each has its cache
    graph = small()
    x = graph.add(Node("x", "embedding", [Port("ids")], ["table"]))
    y = graph.add(Node("y", "embedding", [Port("ids")], ["table"]))
    a = graph.add(Node("a", "scale", [x], [], {"factor": 2.0}))
    b = graph.add(Node("b", "scale", [y], [], {"factor": 2.0}))
    c = graph.add(Node("c", "scale", [y], [], {"factor": 3.0}))
    graph.nodes["b"].set_taps({0: ["doubled"]})
    graph.exits = [graph.add(Node("d", "mul", [a, b])).node, b.node, c.node]
    num_changes, after = rewritten(graph, CommonSubexpressionElimination())
    assert num_changes == 2
    assert operations(after) == ["embedding", "mul", "scale", "scale"]
    assert after.nodes["a"].taps() == {0: ["doubled"]}
    for old, new in zip(results(graph), results(after), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.clause("MB-CSE-1")
def test_parameters_of_one_recipe_become_one(tiny_llama: Any) -> None:
    """Folded first, three layers have three pairs of tables; afterwards one pair."""
    definition = export(tiny_llama(3))
    ConstantFolding().apply(definition)
    assert sum("rope_tables" in each.name for each in definition.parameters) == 6
    result = CommonSubexpressionElimination().apply(definition)
    assert sum("rope_tables" in each.name for each in definition.parameters) == 2
    assert (result.stats.parameters_eliminated, result.stats.memory_saved) == (4 * 96 * 4, 4 * 96 * 4 * 4)


@pytest.mark.clause("MB-DEAD-1")
def test_what_nobody_reads_goes() -> None:
    graph = small()
    x = graph.add(Node("x", "embedding", [Port("ids")], ["table"]))
    dead = graph.add(Node("dead", "linear", [x], ["w"]))
    graph.add(Node("deader", "silu", [dead]))
    graph.exits = [graph.add(Node("y", "linear", [x], ["w2", "b"])).node]
    num_changes, after = rewritten(graph, DeadNodeElimination())
    assert list(after.nodes) == ["ids", "x", "y"]
    assert sorted(after.parameters) == ["b", "table", "w2"]
    assert num_changes == 2 + 3  # w, b2, g
    np.testing.assert_array_equal(results(graph)[0], results(after)[0])


@pytest.mark.clause("MB-DEAD-1")
def test_a_clean_graph_has_nothing_dead(tiny_llama: Any) -> None:
    assert not DeadNodeElimination().is_applicable(export(tiny_llama(3)))


@pytest.mark.clause("MB-FOLD-1")
def test_constants_are_made_once() -> None:
    """transpose(w), scaled, reshaped, and a table: all of it becomes parameters; what ids reach does not."""
    graph = small()
    x = graph.add(Node("x", "embedding", [Port("ids")], ["table"]))
    w = graph.add(Node("weight", "parameter", [], ["w"]))
    turned = graph.add(Node("turned", "transpose", [w], [], {"dim0": 0, "dim1": 1}))
    doubled = graph.add(Node("doubled", "scale", [turned], [], {"factor": 2.0}))
    ones = graph.add(Node("ones", "fill", [], [], {"shape": [6], "value": 1.0, "dtype": "FP32"}))
    y = graph.add(Node("y", "matmul", [x, doubled]))
    graph.exits = [graph.add(Node("z", "add", [y, ones])).node]
    num_changes, after = rewritten(graph, ConstantFolding())
    assert num_changes == 3
    assert operations(after) == ["add", "embedding", "matmul", "parameter", "parameter"]
    assert after.parameters["doubled.0"].shape == [8, 6]
    assert "w" not in after.parameters
    np.testing.assert_array_equal(results(graph)[0], results(after)[0])
    x_w = VALUES["table"][[3, 7, 3]].astype(float) @ VALUES["w"].T.astype(float)
    assert np.abs(results(after)[0] - (2 * x_w + 1)).max() < 1e-5


@pytest.mark.clause("MB-FOLD-1")
def test_a_constant_exit_is_folded_too() -> None:
    graph = small()
    graph.exits = [graph.add(Node("ones", "fill", [], [], {"shape": [2], "value": 3.0, "dtype": "FP32"})).node]
    num_changes, after = rewritten(graph, ConstantFolding())
    assert (num_changes, operations(after)) == (1, ["parameter"])
    np.testing.assert_array_equal(results(after)[0], [3.0, 3.0])


def scaled(biased: bool, **more: Any) -> IrGraph:
    graph = small()
    x = graph.add(Node("x", "embedding", [Port("ids")], ["table"]))
    y = graph.add(Node("y", "linear", [x], ["w", "b"] if biased else ["w"]))
    z = graph.add(Node("z", "scale", [y], [], {"factor": 0.25}))
    graph.exits = [graph.add(Node("out", "silu", [z])).node, *more.get("exits", [])]
    if more.get("shared"):
        graph.exits.append(graph.add(Node("other", "linear", [x], ["w"])).node)
    if more.get("tap"):
        graph.nodes[more["tap"]].set_taps({0: ["seen"]})
    return graph


@pytest.mark.clause("MB-FOLD-2")
@pytest.mark.parametrize("biased", [False, True])
def test_a_factor_moves_into_the_weights(biased: bool) -> None:
    graph = scaled(biased)
    num_changes, after = rewritten(graph, ScaleFolding())
    assert (num_changes, operations(after)) == (1, ["embedding", "linear", "silu"])
    assert sorted(after.parameters) == sorted(["table", "w.scaled", *(["b.scaled"] if biased else [])])
    np.testing.assert_array_equal(results(graph)[0], results(after)[0])  # 0.25 is a power of two: exact


@pytest.mark.clause("MB-FOLD-2")
@pytest.mark.parametrize("more", [{"exits": ["y"]}, {"exits": ["z"]}, {"shared": True}, {"tap": "y"}, {"tap": "z"}])
def test_a_factor_that_others_would_notice_stays(more: dict[str, Any]) -> None:
    assert rewritten(scaled(True, **more), ScaleFolding())[0] == 0


@pytest.mark.clause("MB-FOLD-2")
def test_the_attention_scale_is_the_decoders(tiny_llama: Any) -> None:
    definition = export(tiny_llama(3))
    ScaleFolding().apply(definition)
    assert "scale" not in kinds(definition)
    found = [layer.config["softmax_scale"] for layer in definition.layers if layer.layer_type == "attention"]
    assert found == [8**-0.5] * 3


def normed(readers: int, **more: Any) -> IrGraph:
    graph = small()
    x = graph.add(Node("x", "embedding", [Port("ids")], ["table"]))
    n = graph.add(Node("n", "rms_norm", [x], ["g"], {"eps": 1e-5}))
    outs = [graph.add(Node(f"y{i}", "linear", [n], [["w", "b"], ["w2"]][i])).node for i in range(readers)]
    if more.get("shared"):
        outs.append(graph.add(Node("other", "linear", [x], ["w"])).node)
    if more.get("silu"):
        outs.append(graph.add(Node("active", "silu", [n])).node)
    graph.exits = [*outs, *more.get("exits", [])]
    return graph


@pytest.mark.clause("MB-FOLD-3")
def test_a_norms_weight_moves_into_its_projections() -> None:
    graph = normed(2)
    num_changes, after = rewritten(graph, NormScaleFolding())
    assert num_changes == 1
    assert after.nodes["n"].parameters == ["ones.8"]
    for old, new in zip(results(graph), results(after), strict=True):
        weights = np.abs(VALUES["w"]).max() * np.abs(VALUES["g"]).max()
        assert np.abs(old - new).max() <= 2 * 11 * 2.0**-24 * 8 * 3 * weights  # gamma_(K+3) on both sides, |norm| <= 3
    assert np.abs(results(after)[0]).max() > 0.1
    assert rewritten(after, NormScaleFolding())[0] == 0


@pytest.mark.clause("MB-FOLD-3")
@pytest.mark.parametrize("more", [{"shared": True}, {"silu": True}, {"exits": ["n"]}])
def test_a_norm_that_others_read_stays(more: dict[str, Any]) -> None:
    assert rewritten(normed(1, **more), NormScaleFolding())[0] == 0


@pytest.mark.clause("MB-FOLD-3")
def test_a_tied_head_keeps_its_norm(tiny_llama: Any) -> None:
    definition = export(tiny_llama(3, tie_word_embeddings=True))
    result = NormScaleFolding().apply(definition)
    assert result.warnings == [
        "norm-scale-folding: final_norm: a projection's weight is used elsewhere too; left alone"
    ]
    norms = {layer.name: layer.parameters for layer in definition.layers if layer.layer_type == "rms_norm"}
    assert norms["final_norm"] == ["model.norm.weight"]
    assert norms["layers.1.ffn_norm"] == ["ones.32"]


@pytest.mark.clause("MB-FUSE-1")
def test_projections_of_one_value_become_one(tiny_llama: Any) -> None:
    tiny = tiny_llama(3, attention_bias=True)
    definition = export(tiny)
    SiblingLinearFusion().apply(definition)
    assert kinds(definition).count("linear") == 4 * 3 + 1
    shapes = {each.name: each.shape for each in definition.parameters}
    assert shapes["layers.0.qkv.weight"] == [(4 + 2 * 2) * 8, 32]
    assert shapes["layers.0.qkv.bias"] == [64]
    assert shapes["layers.0.gate_up.weight"] == [2 * 56, 32]
    assert "model.layers.0.self_attn.q_proj.weight" not in shapes


def siblings(**more: Any) -> IrGraph:
    graph = small()
    x = graph.add(Node("x", "embedding", [Port("ids")], ["table"]))
    one = Node("one", "linear", [x], ["w", "b"], metadata=more.get("one", {}))
    two = Node("two", "linear", [x], more.get("weights", ["w2", "b2"]), metadata=more.get("two", {}))
    graph.exits = [graph.add(Node("out", "mul", [graph.add(one), graph.add(two)])).node, *more.get("exits", [])]
    return graph


@pytest.mark.clause("MB-FUSE-1")
def test_siblings_without_a_group() -> None:
    graph = siblings()
    num_changes, after = rewritten(graph, SiblingLinearFusion())
    assert (num_changes, operations(after)) == (1, ["embedding", "linear", "mul", "slice", "slice"])
    x = np.abs(VALUES["table"]).max() * np.abs(VALUES["w"]).max() + np.abs(VALUES["b"]).max()
    slack = 2 * 10 * 2.0**-24 * 8 * x  # gamma_10 on both sides of each factor of the product
    assert np.abs(results(graph)[0] - results(after)[0]).max() <= 2 * slack * np.abs(results(graph)[0]).max() + slack


@pytest.mark.clause("MB-FUSE-1")
@pytest.mark.parametrize(
    "more",
    [
        {"weights": ["w2"]},
        {"weights": ["w", "b2"]},
        {"one": {"group": "a"}},
        {"one": {"group": "a"}, "two": {"group": "b"}},
        {"exits": ["one"]},
        {"one": {"taps": {"0": ["seen"]}}},
    ],
)
def test_no_siblings(more: dict[str, Any]) -> None:
    assert rewritten(siblings(**more), SiblingLinearFusion())[0] == 0


@pytest.mark.clause("MB-FUSE-2")
def test_q_and_k_are_turned_at_once(tiny_llama: Any) -> None:
    definition = export(tiny_llama(3))
    CommonSubexpressionElimination().apply(definition)
    assert not RotaryFusion().is_applicable(definition)  # not yet parts of one projection
    SiblingLinearFusion().apply(definition)
    assert RotaryFusion().apply(definition).applied
    assert kinds(definition).count("rotary") == 3
    shapes = {each.name: each.outputs[0].shape for each in definition.layers}
    assert shapes["layers.0.qkv.turned"] == [-1, 6, 8]


@pytest.mark.clause("MB-FUSE-2")
@pytest.mark.parametrize("spoil", ["positions", "tables", "head size", "observed"])
def test_what_is_turned_differently_stays(tiny_llama: Any, spoil: str) -> None:
    graph = IrGraph.read(export(tiny_llama(3, num_layers=1)))
    SiblingLinearFusion().rewrite(graph)
    graph.sort()
    k = graph.nodes["layers.0.k_rotated"]
    if spoil == "positions":
        k.inputs[3] = Port("logit_rows")
    elif spoil == "tables":
        k.inputs[1:3] = [k.inputs[2], k.inputs[1]]
    elif spoil == "head size":
        graph.nodes["layers.0.q_heads"].config["shape"] = [-1, 8, 4]
        other = {"head_dim": 4, "num_positions": 96, "theta": 1e4, "dtype": "FP32"}
        tables = graph.add(Node("other", "rope_tables", [], [], other))
        graph.nodes["layers.0.q_rotated"].inputs[1:3] = [tables, Port(tables.node, 1)]
        turned = graph.add(Node("back", "reshape", [Port("layers.0.q_rotated")], [], {"shape": [-1, 4, 8]}))
        graph.nodes["layers.0.q_scaled"].inputs = [turned]
    else:
        k.set_taps({0: ["seen"]})
    graph.sort()
    assert rewritten(graph, RotaryFusion())[0] == 0


def gated(**more: Any) -> IrGraph:
    graph = small()
    x = graph.add(Node("x", "embedding", [Port("ids")], ["table"]))
    one, two = (graph.add(Node(name, "linear", [x], [name])) for name in ("w", "w2"))
    silu = graph.add(Node("silu", "silu", [one]))
    other = graph.add(Node("row", "parameter", [], ["b"])) if more.get("broadcast") else two
    order = [other, silu] if more.get("swapped") else [silu, other]
    graph.exits = [graph.add(Node("out", "mul", order)).node, *more.get("exits", [])]
    return graph


@pytest.mark.clause("MB-FUSE-3")
@pytest.mark.parametrize("swapped", [False, True])
def test_silu_times_up(swapped: bool) -> None:
    graph = gated(swapped=swapped)
    num_changes, after = rewritten(graph, SwigluFusion())
    assert (num_changes, operations(after)) == (1, ["embedding", "linear", "linear", "silu_mul"])
    np.testing.assert_array_equal(results(graph)[0], results(after)[0])


@pytest.mark.clause("MB-FUSE-3")
@pytest.mark.parametrize("more", [{"exits": ["silu"]}, {"broadcast": True}])
def test_silu_that_is_used_elsewhere_stays(more: dict[str, Any]) -> None:
    assert rewritten(gated(**more), SwigluFusion())[0] == 0


def summed(**more: Any) -> IrGraph:
    graph = small()
    x = graph.add(Node("x", "embedding", [Port("ids")], ["table"]))
    y = graph.add(Node("y", "silu", [x]))
    right = graph.add(Node("row", "parameter", [], ["g"])) if more.get("broadcast") else x
    total = graph.add(Node("total", "add", [y, right]))
    norm = graph.add(Node("norm", "rms_norm", [total], ["g"], {"eps": 1e-5}))
    graph.exits = [graph.add(Node("out", "mul", [norm, total])).node, *more.get("exits", [])]
    graph.nodes["total"].set_taps({0: ["sum"]})
    return graph


@pytest.mark.clause("MB-FUSE-4")
def test_a_sum_and_its_norm() -> None:
    graph = summed()
    num_changes, after = rewritten(graph, ResidualNormFusion())
    assert (num_changes, operations(after)) == (1, ["embedding", "mul", "rms_norm_residual", "silu"])
    assert after.nodes["norm"].taps() == {1: ["sum"]}
    np.testing.assert_array_equal(results(graph)[0], results(after)[0])


@pytest.mark.clause("MB-FUSE-4")
@pytest.mark.parametrize("more", [{"exits": ["total"]}, {"broadcast": True}])
def test_a_sum_that_is_more_stays(more: dict[str, Any]) -> None:
    assert rewritten(summed(**more), ResidualNormFusion())[0] == 0


def random_graph(data: st.DataObject) -> IrGraph:
    """A few dozen elementwise, shape and projection operations over ids and constants, with several exits."""
    graph = small()
    wide = [graph.add(Node("x", "embedding", [Port("ids")], ["table"])), graph.add(Node("c", "parameter", [], ["g"]))]
    narrow = [graph.add(Node("b", "parameter", [], ["b"]))]
    draw = data.draw
    for number in range(draw(st.integers(3, 20))):
        kind = draw(st.sampled_from(["add", "mul", "sub", "silu", "scale", "linear", "norm", "slice", "fill"]))
        pool = draw(st.sampled_from([wide, narrow]))
        a, b, name = draw(st.sampled_from(pool)), draw(st.sampled_from(pool)), f"n{number}"
        if kind in ("add", "mul", "sub"):
            pool.append(graph.add(Node(name, kind, [a, b])))
        elif kind == "silu":
            pool.append(graph.add(Node(name, "silu", [a])))
        elif kind == "scale":
            pool.append(graph.add(Node(name, "scale", [a], [], {"factor": draw(st.sampled_from([0.5, 2.0]))})))
        elif kind == "linear":
            weight = draw(st.sampled_from([["w"], ["w2", "b2"], ["w", "b"]]))
            narrow.append(graph.add(Node(name, "linear", [draw(st.sampled_from(wide))], weight)))
        elif kind == "norm":
            wide.append(graph.add(Node(name, "rms_norm", [draw(st.sampled_from(wide))], ["g"], {"eps": 1e-5})))
        elif kind == "slice":
            cut = draw(st.sampled_from(wide[:1]))
            narrow.append(graph.add(Node(name, "slice", [cut], [], {"dim": 1, "start": 1, "end": 7})))
        else:
            narrow.append(graph.add(Node(name, "fill", [], [], {"shape": [6], "value": 0.5, "dtype": "FP32"})))
    graph.exits = [draw(st.sampled_from([*wide, *narrow])).node for _ in range(draw(st.integers(1, 3)))]
    return graph


@pytest.mark.clause("MB-PASS-4", "MB-CSE-1", "MB-DEAD-1", "MB-FOLD-1", "MB-FUSE-3", "MB-FUSE-4")
@settings(max_examples=120)
@given(data=st.data())
def test_random_graphs_keep_every_bit(data: st.DataObject) -> None:
    """The passes that promise it, in a random order, on random graphs: equal exits, and never more operations."""
    graph = random_graph(data)
    with np.errstate(all="ignore"):
        expected = results(graph)
        exact = [each for each in ALL if each.keeps_bits and each is not RotaryFusion]
        for one in data.draw(st.permutations(exact)):
            num_before = measure(graph).num_operations
            _, graph = rewritten(graph, one())
            assert measure(graph).num_operations <= num_before
            assert one().rewrite(copy.deepcopy(graph)).num_changes == 0
        for old, new in zip(expected, results(graph), strict=True):
            np.testing.assert_array_equal(old, new)


@pytest.mark.clause("MB-ORDER-1", "MB-ORDER-3")
def test_levels_and_what_was_applied(tiny_llama: Any) -> None:
    exact = ["common-subexpression-elimination", "constant-folding", "swiglu-fusion", "residual-norm-fusion",
             "dead-node-elimination"]  # fmt: skip
    names = [[each.name() for each in default_passes(level)] for level in range(4)]
    assert names[0] == []
    assert sorted(names[1]) == sorted(exact)
    assert sorted(set(names[2]) - set(names[1])) == ["rotary-fusion", "scale-folding", "sibling-linear-fusion"]
    assert sorted(set(names[3]) - set(names[2])) == ["norm-scale-folding"]
    assert len(names[3]) == len(ALL)
    with pytest.raises(ConfigError, match="got 4"):
        default_passes(4)
    definition = export(tiny_llama(3))
    applied = apply_passes(definition, default_passes(3))
    assert "dead-node-elimination" not in applied
    assert all(result.applied for result in applied.values())
    assert apply_passes(definition, default_passes(3)) == {}
