"""The model as data: what is exported, what a graph computes, what is imported, and JSON in between."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_ref.builder import DecoderModelBuilder
from ferrum_ref.builder.export import IR_VERSION, export_definition
from ferrum_ref.builder.graph import IrGraph
from ferrum_ref.builder.ir_decoder import IrDecoder
from ferrum_ref.builder.operators import Runtime
from ferrum_ref.builder.passes import apply_passes, default_passes
from ferrum_ref.builder.recipes import evaluate
from ferrum_ref.builder.signals import infer_signals
from ferrum_ref.errors import (
    ConfigError,
    InvalidParameterError,
    ModelError,
    NotFoundError,
    ResourceExhaustedError,
    UnsupportedError,
)
from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.interfaces.model_builder import GraphEdge, ModelIR, TensorSpec
from ferrum_ref.interfaces.weights import TensorSpec as WeightSpec
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory, KvShape
from ferrum_ref.kv_cache.storage_paged import PagedKvStorage
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.models.tensor_names import expected_tensors
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.serialization import from_json, to_json
from ferrum_ref.types.devices import DataType
from ferrum_ref.types.models import ModelType

BACKEND = make_backend()
NUM_TOKENS = 40
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "biases, one kv head": {"num_kv_heads": 1, "attention_bias": True, "mlp_bias": True},
    "tied, wide heads": {"tie_word_embeddings": True, "hidden_size": 48, "head_dim": 16},
    "one layer, odd sizes": {"num_layers": 1, "hidden_size": 36, "intermediate_size": 33, "head_dim": 6},
}


def export(tiny: Any, dtype: DataType = DataType.FP32) -> ModelIR:
    return export_definition(
        tiny.config, name="tiny", model_type=ModelType.Llama, dtype=dtype, max_tokens=96, additional={}
    )


def decoder_of(definition: ModelIR, tiny: Any, dtype: Any = np.float32) -> IrDecoder:
    graph = IrGraph.read(definition)

    def load(name: str, shape: Any, kind: DataType, _: Any) -> Any:
        return tiny.read(name, dtype)

    parameters = {name: evaluate(spec, Runtime(BACKEND), load) for name, spec in graph.parameters.items()}
    sizes = definition.architecture.dimensions
    return IrDecoder(graph, parameters, sizes, definition.architecture.config["head_dim"], BACKEND)


class Case:
    """A tiny model, its decoder, a prompt and what is right."""

    def __init__(self, tiny: Any, seed: int) -> None:
        self.tiny = tiny
        self.decoder = Decoder(tiny.config, read_decoder_weights(tiny, BACKEND), BACKEND)
        self.ids = np.random.default_rng(seed).integers(0, 97, NUM_TOKENS).tolist()
        self.exact = tiny.logits(self.ids, True)
        self.bound = 2 * np.abs(tiny.logits(self.ids, False) - self.exact).max()
        config = tiny.config
        self.shape = KvShape(config.num_layers, config.num_kv_heads, config.head_dim)

    def whole(self, decoder: Any, observe: Any = None) -> Any:
        caches = ContiguousKvFactory(BACKEND, self.shape, 96)
        batch = ForwardBatch.build([self.ids], [0]).with_all_logits()
        return decoder.forward(batch, caches.bind([caches.new_cache()], batch.lengths), observe).to_numpy()


@pytest.fixture(scope="module")
def cases(tiny_llama: Any) -> Any:
    made: dict[str, Case] = {}

    def case(name: str = "gqa") -> Case:
        if name not in made:
            seed = sorted(VARIANTS).index(name)
            made[name] = Case(tiny_llama(seed, **VARIANTS[name]), seed)
        return made[name]

    return case


@pytest.mark.clause("MB-EXPORT-1", "MB-IR-1", "MB-IR-2")
@pytest.mark.parametrize("name", VARIANTS)
def test_the_plain_graph(cases: Any, name: str) -> None:
    tiny = cases(name).tiny
    definition = export(tiny)
    num_layers = tiny.config.num_layers
    assert len(definition.graph.nodes) == len(definition.layers) == 22 * num_layers + 8
    kinds = [layer.layer_type for layer in definition.layers]
    per_layer = {
        "linear": 7,
        "rms_norm": 2,
        "reshape": 4,
        "rotary": 2,
        "rope_tables": 1,
        "scale": 1,
        "add": 2,
        "mul": 1,
    }
    extra = {"linear": 1, "rms_norm": 1}
    for kind, count in per_layer.items():
        assert kinds.count(kind) == count * num_layers + extra.get(kind, 0)
    assert definition.graph.inputs == ["token_ids", "positions", "logit_rows"]
    assert definition.graph.outputs == ["logits"]
    stored = {spec.name: tuple(spec.shape) for spec in definition.parameters}
    assert stored == dict(expected_tensors(tiny.config))
    sizes = definition.architecture.dimensions
    assert (sizes.vocab_size, sizes.num_layers, sizes.max_sequence_length) == (97, num_layers, 96)
    layer = next(layer for layer in definition.layers if layer.name == "layers.0.attention")
    assert [spec.shape for spec in layer.outputs] == [[-1, tiny.config.num_heads, tiny.config.head_dim]]


@pytest.mark.clause("MB-EXPORT-2", "MB-IR-2")
@pytest.mark.parametrize("name", VARIANTS)
def test_the_plain_graph_keeps_the_decoders_bound(cases: Any, name: str) -> None:
    case = cases(name)
    logits = case.whole(decoder_of(export(case.tiny), case.tiny))
    assert np.abs(logits - case.exact).max() <= case.bound


@pytest.mark.clause("MB-RUN-1", "MB-RUN-2")
@pytest.mark.parametrize("name", VARIANTS)
def test_level_2_is_the_decoder_to_the_last_bit(cases: Any, name: str) -> None:
    case = cases(name)
    definition = export(case.tiny)
    apply_passes(definition, default_passes(2))
    theirs: list[tuple[str, Any]] = []
    ours: list[tuple[str, Any]] = []
    expected = case.whole(case.decoder, lambda name, tensor: theirs.append((name, tensor.to_numpy().copy())))
    graph = decoder_of(definition, case.tiny)
    np.testing.assert_array_equal(
        case.whole(graph, lambda name, tensor: ours.append((name, tensor.to_numpy().copy()))), expected
    )
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    for (_, mine), (_, decoders) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine.reshape(decoders.shape), decoders)
    assert graph.num_bytes() >= case.decoder.weights.num_bytes()


@pytest.mark.clause("MB-RUN-1")
@pytest.mark.parametrize("dtype", [DataType.FP16, DataType.BF16])
def test_level_2_in_narrow_types(cases: Any, dtype: DataType) -> None:
    from ferrum_ref.models.decoder_weights import element_type

    case = cases()
    decoder = Decoder(case.tiny.config, read_decoder_weights(case.tiny, BACKEND, dtype), BACKEND)
    definition = export(case.tiny, dtype)
    apply_passes(definition, default_passes(2))
    shape = KvShape(3, 2, 8, dtype)
    batch = ForwardBatch.build([case.ids], [0]).with_all_logits()
    logits = []
    for each in (decoder, decoder_of(definition, case.tiny, element_type(dtype))):
        caches = ContiguousKvFactory(BACKEND, shape, 96)
        logits.append(each.forward(batch, caches.bind([caches.new_cache()], batch.lengths)).to_numpy())
    np.testing.assert_array_equal(logits[0], logits[1])


@pytest.mark.clause("MB-RUN-3")
def test_a_graph_refuses_what_the_decoder_refuses(cases: Any) -> None:
    case = cases()
    graph = decoder_of(export(case.tiny), case.tiny)
    whole = ForwardBatch.build([[1, 2, 3]], [0])
    wrong = [
        (ForwardBatch.build([[97]], [0]), InvalidParameterError),
        (ForwardBatch.build([[-1]], [0]), InvalidParameterError),
        (ForwardBatch.build([[1]], [96]), ResourceExhaustedError),
        (dataclasses.replace(whole, logit_rows=np.array([3])), InvalidParameterError),
        (dataclasses.replace(whole, logit_rows=np.array([-1])), InvalidParameterError),
    ]
    for batch, kind in wrong:
        for decoder in (graph, case.decoder):
            with pytest.raises(kind):
                decoder.check(batch)
    storage = PagedKvStorage(BACKEND, case.shape, 1, 4)
    with pytest.raises(InvalidParameterError):
        graph.forward(ForwardBatch.build([[5, 97]], [0]), storage.bind([[0]], [0], [2]))
    assert not np.asarray(storage.keys[0].to_numpy()).any()
    for batch in (
        ForwardBatch.build([[96]], [95]),
        dataclasses.replace(whole, logit_rows=np.array([], dtype=np.int64)),
    ):
        graph.check(batch)


@pytest.mark.clause("MB-RUN-4")
@settings(max_examples=25)
@given(data=st.data())
def test_chunks_in_company_over_shuffled_blocks(cases: Any, data: st.DataObject) -> None:
    """The same forwards through decoder and graph, over caches of their own: equal rows, whatever the cut."""
    case = cases(data.draw(st.sampled_from(sorted(VARIANTS))))
    definition = export(case.tiny)
    apply_passes(definition, default_passes(2))
    graph = decoder_of(definition, case.tiny)
    cuts = sorted(data.draw(st.sets(st.integers(1, NUM_TOKENS - 1), max_size=4)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    blocks = rng.permutation(20).tolist()
    storages = [PagedKvStorage(BACKEND, case.shape, 20, 8) for _ in range(2)]
    start = 0
    for size in np.diff([0, *cuts, NUM_TOKENS]).tolist():
        other = rng.integers(0, 97, start + 1).tolist()
        batch = ForwardBatch.build([other[:1], case.ids[start : start + size]], [0, start])
        rows = [
            each.forward(batch, storage.bind([blocks[10:12], blocks[:6]], [0, start], batch.lengths)).to_numpy()
            for each, storage in zip((case.decoder, graph), storages, strict=True)
        ]
        np.testing.assert_array_equal(rows[0], rows[1])
        start += size
    assert np.abs(rows[1][-1] - case.exact[-1]).max() <= case.bound


@pytest.mark.clause("MB-RUN-4", "MB-IMPORT-1", "MB-IMPORT-4")
def test_an_imported_definition_serves(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any, stepped_logits: Any
) -> None:
    model = saved(1)
    settings = model.config(max_batch_size=2, extra_config={"block_size": 4})
    definition = run(builder.export_model_definition(settings))
    apply_passes(definition, default_passes(2))
    before = copy.deepcopy(definition)
    executor = run(builder.import_model_definition(definition, backend, loader))
    assert definition == before
    np.testing.assert_array_equal(
        prompt_logits(executor, model.ids),
        prompt_logits(run(builder.build_model(settings, backend, loader)), model.ids),
    )
    assert model.error(stepped_logits(executor, model.ids, 7)) <= model.bound
    info = executor.info()
    assert (str(info.model_id), info.num_kv_heads, info.metadata["head_dim"]) == ("tiny", 2, 8)
    assert info.num_parameters == sum(values.size for values in model.tiny.tensors.values())
    assert executor.capabilities().max_batch_size == 2
    assert executor.status().memory_usage.allocated_bytes == 2 * 96 * 2 * 3 * 2 * 8 * 4


@pytest.mark.clause("MB-IR-8", "MB-DATA-4")
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_json_and_back(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any, level: int
) -> None:
    model = saved(1, **VARIANTS["biases, one kv head"])
    definition = run(builder.export_model_definition(model.config()))
    apply_passes(definition, default_passes(level))
    text = to_json(definition)
    again = from_json(ModelIR, text)
    assert again == definition
    assert to_json(again) == text
    parsed = json.loads(text)
    assert parsed["metadata"]["version"] == "ferrum-ref-ir/1"
    assert parsed["graph"]["edges"][0].keys() == {"source", "target", "source_output", "target_input"}
    first = prompt_logits(run(builder.import_model_definition(definition, backend, loader)), model.ids)
    second = prompt_logits(run(builder.import_model_definition(again, backend, loader)), model.ids)
    np.testing.assert_array_equal(first, second)
    assert model.error(second) <= model.bound


@pytest.mark.clause("MB-IR-6")
def test_another_version_is_refused(saved: Any, builder: Any, backend: Any, loader: Any, run: Any) -> None:
    definition = run(builder.export_model_definition(saved(1).config()))
    assert definition.metadata.version == IR_VERSION
    definition.metadata = dataclasses.replace(definition.metadata, version="ferrum-ref-ir/2")
    with pytest.raises(UnsupportedError, match="ferrum-ref-ir/2"):
        run(builder.import_model_definition(definition, backend, loader))


@pytest.mark.clause("MB-IR-7", "MB-BUILD-3")
def test_the_head_size_is_stated_not_derived(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any
) -> None:
    """D-21: E / H is 12 here, and a cache of that size would not hold heads of 16."""
    model = saved(1, **VARIANTS["tied, wide heads"])
    definition = run(builder.export_model_definition(model.config()))
    assert definition.architecture.config["head_dim"] == 16
    executor = run(builder.import_model_definition(definition, backend, loader))
    assert model.error(prompt_logits(executor, model.ids)) <= model.bound
    upstream = definition.architecture.dimensions.hidden_size // definition.architecture.dimensions.num_heads
    definition.architecture = dataclasses.replace(
        definition.architecture, config={**definition.architecture.config, "head_dim": upstream}
    )
    with pytest.raises(ConfigError, match="heads of 16"):
        run(builder.import_model_definition(definition, backend, loader))


@pytest.mark.clause("MB-DATA-5")
def test_two_types_of_one_name() -> None:
    """D-30: three fields here, six in a request to a weight loader."""
    from ferrum_ref.interfaces import backend as backend_module

    assert TensorSpec is not WeightSpec
    assert [field.name for field in dataclasses.fields(TensorSpec)] == ["name", "shape", "dtype"]
    assert len(dataclasses.fields(WeightSpec)) == 6
    assert backend_module.TensorSpec is WeightSpec
    assert TensorSpec("x", [-1, 8], DataType.FP32).shape == [-1, 8]


@pytest.mark.clause("MB-EXPORT-3")
def test_what_the_graph_cannot_say_is_refused(cases: Any) -> None:
    config = cases().tiny.config
    for changes, named in (
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"architecture": "gemma"}, "gemma"),
    ):
        other = dataclasses.replace(config, **changes)
        with pytest.raises(UnsupportedError, match=named):
            export_definition(
                other, name="x", model_type=ModelType.Llama, dtype=DataType.FP32, max_tokens=8, additional={}
            )


@pytest.mark.clause("MB-EXPORT-4", "MB-IMPORT-4")
def test_what_a_definition_carries(saved: Any, builder: Any, run: Any) -> None:
    model = saved(1)
    settings = model.config(extra_config={"num_blocks": 9}, max_batch_size=3)
    additional = run(builder.export_model_definition(settings)).metadata.additional
    assert additional["source"] == {"Local": str(model.path)}
    assert additional["executor"] == {"max_batch_size": 3, "num_blocks": 9, "block_size": 16}
    config = json.loads((model.path / "config.json").read_text())
    nowhere = dataclasses.replace(settings, model_path="no/such/place", extra_config={"config": config})
    assert "source" not in run(builder.export_model_definition(nowhere)).metadata.additional
    with pytest.raises(NotFoundError):
        run(builder.export_model_definition(dataclasses.replace(nowhere, extra_config={})))


@pytest.mark.clause("MB-IMPORT-2")
def test_tensors_that_are_not_there(saved: Any, builder: Any, backend: Any, loader: Any, run: Any) -> None:
    definition = run(builder.export_model_definition(saved(1).config()))
    index = next(i for i, spec in enumerate(definition.parameters) if spec.name == "model.norm.weight")

    def with_parameter(**changes: Any) -> ModelIR:
        other = copy.deepcopy(definition)
        old = other.parameters[index]
        other.parameters[index] = dataclasses.replace(old, **changes)
        if "name" in changes:
            other.layers = [
                dataclasses.replace(each, parameters=[changes["name"] if n == old.name else n for n in each.parameters])
                for each in other.layers
            ]
        return other

    with pytest.raises(NotFoundError, match=r"model\.other\.weight"):
        run(builder.import_model_definition(with_parameter(name="model.other.weight"), backend, loader))
    recipe = {"op": "load", "tensor": "model.embed_tokens.weight", "shape": [32], "initialization": "Zeros"}
    with pytest.raises(ModelError, match=r"got shape \[97, 32\], expected \[32\]"):
        run(builder.import_model_definition(with_parameter(metadata={"recipe": recipe}), backend, loader))
    moved = copy.deepcopy(definition)
    moved.metadata.additional["source"] = {"Local": "/nowhere/at/all"}
    with pytest.raises(NotFoundError, match="nowhere"):
        run(builder.import_model_definition(moved, backend, loader))
    moved.metadata.additional["source"] = {"Moon": 1}
    with pytest.raises(ConfigError, match="source"):
        run(builder.import_model_definition(moved, backend, loader))


@pytest.mark.clause("MB-IMPORT-2", "MB-INIT-4")
def test_a_definition_without_a_source_is_initialised(
    saved: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any
) -> None:
    """Passes change no number: the stacked projections of a fused graph are made of the same draws."""
    model = saved(1)
    config = json.loads((model.path / "config.json").read_text())
    settings = dataclasses.replace(model.config(), model_path="nowhere", extra_config={"config": config})

    def build(seed: int, level: int) -> Any:
        builder = DecoderModelBuilder(seed=seed)
        definition = run(builder.export_model_definition(settings))
        apply_passes(definition, default_passes(level))
        return run(builder.import_model_definition(definition, backend, loader))

    first = prompt_logits(build(7, 1), model.ids)
    np.testing.assert_array_equal(first, prompt_logits(build(7, 0), model.ids))
    assert np.abs(first - prompt_logits(build(8, 1), model.ids)).max() > 0.1 * np.abs(first).max()
    apart, stacked = build(7, 1)._decoder._parameters, build(7, 2)._decoder._parameters
    parts = [apart[f"model.layers.1.self_attn.{part}_proj.weight"].to_numpy() for part in "qkv"]
    np.testing.assert_array_equal(stacked["layers.1.qkv.weight"].to_numpy(), np.concatenate(parts))


@pytest.mark.clause("MB-IR-3")
def test_a_recipe_is_what_the_nodes_would_have_computed(cases: Any) -> None:
    """Rotary tables and stacked weights, made by recipe, are those the decoder holds."""
    case = cases("biases, one kv head")
    definition = export(case.tiny)
    apply_passes(definition, default_passes(2))
    graph = decoder_of(definition, case.tiny)
    layer = case.decoder.weights.layers[0]
    for name, tensor in (
        ("layers.0.qkv.weight", layer.qkv),
        ("layers.0.qkv.bias", layer.qkv_bias),
        ("layers.0.gate_up.weight", layer.gate_up),
    ):
        np.testing.assert_array_equal(graph._parameters[name].to_numpy(), tensor.to_numpy())
    angles = np.arange(96)[:, None] * 10000.0 ** (-np.arange(0, 8, 2) / 8)
    assert np.abs(graph._parameters["layers.0.rope_tables.0"].to_numpy() - np.cos(angles)).max() < 1e-4


@pytest.mark.clause("MB-IR-4")
def test_shapes_are_known_before_anything_runs(cases: Any) -> None:
    definition = export(cases().tiny)
    signals = infer_signals(IrGraph.read(definition))
    shapes = {port.node: signal.shape for port, signal in signals.items() if port.slot == 0}
    assert shapes["logits"] == (-1, 97)
    assert shapes["layers.1.q_rotated"] == (-1, 4, 8)
    assert shapes["layers.1.k_heads"] == (-1, 2, 8)
    assert shapes["layers.2.gated"] == (-1, 56)
    assert shapes["layers.0.rope_tables"] == (96, 4)
    assert shapes["token_ids"] == (-1,)


@pytest.mark.clause("MB-IR-1")
def test_operands_are_inputs_then_parameters(cases: Any) -> None:
    """A weight may come over an edge from a parameter node instead: the operands, and the logits, are the same."""
    case = cases()
    plain, wired = export(case.tiny), export(case.tiny)
    from ferrum_ref.builder.graph import Node

    graph = IrGraph.read(wired)
    logits = graph.nodes["logits"]
    logits.inputs.append(graph.add(Node("head", "parameter", [], logits.parameters)))
    logits.parameters = []
    graph.write(wired)
    assert GraphEdge("head", "logits", None, 1) in wired.graph.edges
    np.testing.assert_array_equal(case.whole(decoder_of(plain, case.tiny)), case.whole(decoder_of(wired, case.tiny)))
