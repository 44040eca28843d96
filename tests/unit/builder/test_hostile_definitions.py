"""Definitions that are none: each defect by its name, and no damage that raises anything but a FerrumError."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_ref.builder.export import export_definition
from ferrum_ref.builder.graph import IrGraph
from ferrum_ref.builder.ir_decoder import IrDecoder, check_decoder_graph
from ferrum_ref.builder.operators import Runtime
from ferrum_ref.builder.passes import default_passes
from ferrum_ref.builder.recipes import evaluate
from ferrum_ref.errors import AlreadyExistsError, ConfigError, FerrumError, ModelError, NotFoundError, UnsupportedError
from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.interfaces.model_builder import GraphEdge, InitializationStrategy, ModelIR, ParameterSpec
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory, KvShape
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.serialization import from_jsonable, to_jsonable
from ferrum_ref.types.devices import DataType
from ferrum_ref.types.models import ModelType

BACKEND = make_backend()
CONFIG = DecoderConfig(
    vocab_size=11, hidden_size=8, intermediate_size=6, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4,
    max_position_embeddings=16, rms_norm_eps=1e-5,
)  # fmt: skip


def plain() -> ModelIR:
    return export_definition(
        CONFIG, name="x", model_type=ModelType.Llama, dtype=DataType.FP32, max_tokens=16, additional={}
    )


def use(definition: ModelIR) -> Any:
    """Everything that is done with a definition: read, checked, optimised, its parameters made, one forward."""
    graph = IrGraph.read(definition)
    sizes = definition.architecture.dimensions
    check_decoder_graph(graph, sizes, 4)
    for each in default_passes(3):
        each.apply(definition)
    graph = IrGraph.read(definition)

    def load(name: str, shape: tuple[int, ...], dtype: DataType, strategy: Any) -> Any:
        if np.prod(shape, dtype=float) > 1e5:
            raise ModelError("no such tensor is stored")
        return np.ones(shape, np.float32)

    parameters = {name: evaluate(spec, Runtime(BACKEND), load) for name, spec in graph.parameters.items()}
    decoder = IrDecoder(graph, parameters, sizes, 4, BACKEND)
    batch = ForwardBatch.build([[1, 2]], [0])
    caches = ContiguousKvFactory(BACKEND, KvShape(1, 1, 4), 16)
    return decoder.forward(batch, caches.bind([caches.new_cache()], batch.lengths)).to_numpy()


def layer(definition: ModelIR, name: str, /, **changes: Any) -> None:
    definition.layers = [
        dataclasses.replace(each, **changes) if each.name == name else each for each in definition.layers
    ]


def attributes(definition: ModelIR, name: str, /, **changes: Any) -> None:
    config = next(each for each in definition.layers if each.name == name).config
    layer(definition, name, config={**config, **changes})


def graph(definition: ModelIR, **changes: Any) -> None:
    definition.graph = dataclasses.replace(definition.graph, **changes)


def edges(definition: ModelIR, *more: GraphEdge, without: str = "") -> None:
    kept = [edge for edge in definition.graph.edges if edge.target != without]
    graph(definition, edges=[*kept, *more])


DEFECTS: dict[str, tuple[Any, type[FerrumError], str]] = {
    "a node twice": (lambda d: graph(d, nodes=[*d.graph.nodes, d.graph.nodes[3]]), AlreadyExistsError, "embedding"),
    "a layer twice": (lambda d: d.layers.append(d.layers[3]), AlreadyExistsError, "embedding"),
    "a parameter twice": (lambda d: d.parameters.append(d.parameters[0]), AlreadyExistsError, "embed_tokens"),
    "an unknown layer": (lambda d: layer(d, "logits", name="other"), NotFoundError, "logits"),
    "an unknown source": (lambda d: edges(d, GraphEdge("moon", "logits", None, 1)), NotFoundError, "moon"),
    "an unknown target": (lambda d: edges(d, GraphEdge("logits", "moon", None, 1)), NotFoundError, "moon"),
    "an unknown parameter": (lambda d: layer(d, "logits", parameters=["moon"]), NotFoundError, "moon"),
    "an unknown exit": (lambda d: graph(d, outputs=["moon"]), NotFoundError, "moon"),
    "an unknown entry": (lambda d: graph(d, inputs=["moon"]), NotFoundError, "moon"),
    "a cycle": (
        lambda d: edges(d, GraphEdge("logits", "layers.0.q", None, None), without="layers.0.q"),
        ConfigError,
        "without cycles",
    ),
    "a slot twice": (lambda d: edges(d, GraphEdge("embedding", "logits", None, None)), ConfigError, "logits"),
    "a slot left out": (lambda d: edges(d, GraphEdge("embedding", "logits", None, 2)), ConfigError, "logits"),
    "a slot too far": (lambda d: edges(d, GraphEdge("embedding", "logits", None, 2**40)), ConfigError, "logits"),
    "an output that is not there": (
        lambda d: edges(d, GraphEdge("final_norm", "logits", 1, None), without="logits"),
        ConfigError,
        "output 1 of 'final_norm'",
    ),
    "no exit": (lambda d: graph(d, outputs=[]), ConfigError, "one exit"),
    "two exits": (lambda d: graph(d, outputs=["logits", "final_norm"]), ConfigError, "one exit"),
    "an exit that is no logits": (lambda d: graph(d, outputs=["final_norm"]), ConfigError, r"\(-1, 11\)"),
    "an entry that is none": (lambda d: attributes(d, "positions", name="token_ids"), ConfigError, "positions"),
    "an entry unknown here": (lambda d: attributes(d, "positions", name="moon"), ConfigError, "moon"),
    "an entry not declared": (lambda d: graph(d, inputs=["token_ids", "logit_rows"]), ConfigError, "positions"),
    "an unknown operation": (lambda d: layer(d, "logits", layer_type="moon"), UnsupportedError, "rms_norm"),
    "too few operands": (lambda d: edges(d, without="logits"), ConfigError, "got 1 operands, expected 2 to 3"),
    "integers for a tensor": (
        lambda d: edges(d, GraphEdge("token_ids", "logits", None, None), without="logits"),
        ConfigError,
        "expected a float tensor",
    ),
    "a tensor for integers": (
        lambda d: edges(d, GraphEdge("final_norm", "embedding", None, None), without="embedding"),
        ConfigError,
        "expected integers|cycles",
    ),
    "inner sizes": (
        lambda d: layer(d, "logits", parameters=["model.layers.0.mlp.down_proj.weight"]),
        ConfigError,
        "inner",
    ),
    "a cache layer too far": (lambda d: attributes(d, "layers.0.attention", layer=1), ConfigError, "not below 1"),
    "no whole layer": (lambda d: attributes(d, "layers.0.attention", layer=0.5), ConfigError, "layer: got 0.5"),
    "heads that do not divide": (lambda d: attributes(d, "layers.0.attention", num_heads=3), ConfigError, "attention"),
    "other heads": (
        lambda d: attributes(d, "layers.0.attention", head_dim=2), ConfigError, "attention"
    ),
    "eps as text": (lambda d: attributes(d, "final_norm", eps="1"), ConfigError, "eps: got '1'"),
    "eps without end": (lambda d: attributes(d, "final_norm", eps=float("inf")), ConfigError, "eps: got inf"),
    "a reshape to more": (lambda d: attributes(d, "layers.0.q_heads", shape=[-1, 3, 4]), ConfigError, "reshape"),
    "a reshape of two unknowns": (
        lambda d: attributes(d, "layers.0.q_heads", shape=[-1, -1, 4]), ConfigError, "at most one -1"
    ),
    "tables beyond memory": (
        lambda d: attributes(d, "layers.0.rope_tables", num_positions=2**24, head_dim=2**15), ConfigError, "too many"
    ),
    "theta 0": (lambda d: attributes(d, "layers.0.rope_tables", theta=0), ConfigError, "theta > 0"),
    "taps of no form": (
        lambda d: graph(d, nodes=[dataclasses.replace(each, metadata={"taps": [1]}) for each in d.graph.nodes]),
        ConfigError,
        "taps",
    ),
    "two element types": (
        lambda d: d.parameters.__setitem__(0, dataclasses.replace(d.parameters[0], dtype=DataType.FP16)),
        ConfigError,
        "one element type|one type",
    ),
    "a negative dim": (
        lambda d: d.parameters.__setitem__(0, dataclasses.replace(d.parameters[0], shape=[-11, 8])),
        ConfigError,
        "embed_tokens",
    ),
}  # fmt: skip


@pytest.mark.clause("MB-IR-4", "MB-IR-5")
@pytest.mark.parametrize("name", DEFECTS)
def test_each_defect_by_its_name(name: str) -> None:
    damage, kind, said = DEFECTS[name]
    definition = plain()
    damage(definition)
    with pytest.raises(kind, match=said) as caught:
        use(definition)
    assert type(caught.value) is kind


@pytest.mark.clause("MB-IR-5")
def test_a_cache_layer_twice() -> None:
    definition = plain()
    names = {"layers.0.attention": "again", "layers.0.attention_rows": "again_rows"}
    for old, new in names.items():
        source = next(each for each in definition.layers if each.name == old)
        definition.layers.append(dataclasses.replace(source, name=new))
        place = next(each for each in definition.graph.nodes if each.id == old)
        graph(definition, nodes=[*definition.graph.nodes, dataclasses.replace(place, id=new, layer_name=new)])
    more = [
        dataclasses.replace(edge, target=names[edge.target], source=names.get(edge.source, edge.source))
        for edge in definition.graph.edges
        if edge.target in names
    ]
    edges(definition, *more)
    with pytest.raises(ConfigError, match="got it twice"):
        use(definition)


RECIPES: dict[str, tuple[Any, type[FerrumError]]] = {
    "no object": ([1], ConfigError),
    "no op": ({"tensor": "x"}, ConfigError),
    "unknown op": ({"op": "moon"}, UnsupportedError),
    "an impure op": ({"op": "attention", "config": {}, "inputs": []}, UnsupportedError),
    "an op of integers": ({"op": "embedding", "inputs": []}, UnsupportedError),
    "config no object": ({"op": "fill", "config": 3}, ConfigError),
    "inputs no list": ({"op": "add", "inputs": {"a": 1}}, ConfigError),
    "too few inputs": ({"op": "add", "inputs": []}, ConfigError),
    "an output too far": (
        {"op": "fill", "config": {"shape": [8], "value": 1, "dtype": "FP32"}, "inputs": [], "output": 1}, ConfigError,
    ),
    "another shape": ({"op": "fill", "config": {"shape": [9], "value": 1, "dtype": "FP32"}, "inputs": []}, ModelError),
    "another type": ({"op": "fill", "config": {"shape": [8], "value": 1, "dtype": "FP16"}, "inputs": []}, ModelError),
    "no strategy": ({"op": "load", "tensor": "x", "shape": [8], "initialization": "Moon"}, ConfigError),
    "too large": ({"op": "load", "tensor": "x", "shape": [2**30, 2**30], "initialization": "Zeros"}, ConfigError),
    "fill beyond memory": (
        {"op": "fill", "config": {"shape": [2**30, 2**30], "value": 1, "dtype": "FP32"}, "inputs": []}, ConfigError,
    ),
}  # fmt: skip


@pytest.mark.clause("MB-IR-3", "MB-IR-4")
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_are_none(name: str) -> None:
    recipe, kind = RECIPES[name]
    spec = ParameterSpec("p", [8], DataType.FP32, True, InitializationStrategy.Ones, {"recipe": recipe})
    with pytest.raises(kind):
        evaluate(spec, Runtime(BACKEND), lambda name, shape, dtype, strategy: np.ones(shape, np.float32))


@pytest.mark.clause("MB-IR-3")
def test_a_recipe_without_end() -> None:
    recipe: dict[str, Any] = {"op": "fill", "config": {"shape": [8], "value": 1.0, "dtype": "FP32"}, "inputs": []}
    for _ in range(3000):
        recipe = {"op": "silu", "config": {}, "inputs": [recipe]}
    spec = ParameterSpec("p", [8], DataType.FP32, True, InitializationStrategy.Ones, {"recipe": recipe})
    with pytest.raises(ConfigError, match="32 deep"):
        evaluate(spec, Runtime(BACKEND), lambda name, shape, dtype, strategy: np.ones(shape, np.float32))
    for spoil in (
        lambda d: d.parameters.__setitem__(0, dataclasses.replace(d.parameters[0], metadata={"recipe": recipe})),
        lambda d: attributes(d, "logits", recipe=recipe),
        lambda d: graph(d, nodes=[dataclasses.replace(each, metadata={"x": recipe}) for each in d.graph.nodes]),
    ):
        definition = plain()
        spoil(definition)
        with pytest.raises(ConfigError, match="128 deep"):
            use(definition)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every spot in a JSON tree."""
    found = [path] if path else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


TREE = to_jsonable(plain())
SPOTS = places({key: TREE[key] for key in ("parameters", "layers", "graph")})
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.sampled_from([2**31, 2**63, -(2**40)]), st.floats(width=32),
    st.text(max_size=3),
    st.sampled_from(["logits", "embedding", "linear", "slice", "custom", "parameter", "FP16", "BOOL"]),
    st.lists(st.integers(-2, 12), max_size=3), st.just({}), st.just({"taps": {"0": ["x"]}}),
    st.just({"recipe": {"op": "silu", "inputs": [{"op": "load", "tensor": "t", "shape": [8]}]}}),
)  # fmt: skip


def damaged(tree: Any, data: st.DataObject) -> Any:
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(SPOTS))
        spot = tree
        try:
            for key in path:
                spot = spot[key]
            if data.draw(st.integers(0, 4)) == 0 and isinstance(spot, list):
                del spot[last]
            elif data.draw(st.integers(0, 4)) == 0 and isinstance(spot, list):
                spot.append(copy.deepcopy(spot[last]))
            else:
                spot[last] = data.draw(VALUES)
        except (KeyError, IndexError, TypeError):
            continue
    return tree


def survive(data: st.DataObject) -> None:
    tree = damaged(json.loads(json.dumps(TREE)), data)
    try:
        definition = from_jsonable(ModelIR, tree)
    except FerrumError:
        return
    try:
        logits = use(definition)
    except FerrumError:
        return
    assert logits.shape[1] == 11


@pytest.mark.clause("MB-IR-5")
@settings(max_examples=150)
@given(data=st.data())
def test_no_damage_raises_anything_else(data: st.DataObject) -> None:
    survive(data)


@pytest.mark.slow
@pytest.mark.clause("MB-IR-5")
@settings(max_examples=5000)
@given(data=st.data())
def test_no_damage_raises_anything_else_at_length(data: st.DataObject) -> None:
    survive(data)
