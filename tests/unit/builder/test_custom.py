"""The user's layers in a built model: called where they stand, with their parameters, and held to their shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ferrum_ref.builder import DecoderModelBuilder
from ferrum_ref.builder.custom import insert_layers
from ferrum_ref.builder.graph import IrGraph
from ferrum_ref.builder.passes import apply_passes, default_passes
from ferrum_ref.errors import AlreadyExistsError, ConfigError, NotFoundError, UnsupportedError
from ferrum_ref.interfaces.model_builder import CustomLayer
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.types.devices import DataType

BACKEND = make_backend()
FACTORY = BACKEND.tensor_factory()


class Layer(CustomLayer):
    """A layer whose every answer can be chosen."""

    def __init__(
        self,
        name: str = "mine",
        after: Any = "layers.1.hidden",
        function: Callable[..., Any] | None = None,
        parameters: dict[str, Any] | None = None,
        **answers: Any,
    ) -> None:
        self._name, self._after, self._parameters, self._answers = name, after, parameters or {}, answers
        self.function = function or (lambda x, parameters, backend: x)
        self.calls: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def name(self) -> str:
        return self._name

    def layer_type(self) -> str:
        return self._answers.get("layer_type", "adapter")

    def input_shape(self) -> list[int]:
        return self._answers.get("input_shape", [-1, 32])

    def output_shape(self, input_shape: Any) -> list[int]:
        return self._answers.get("output_shape", list(input_shape))

    def initialize_parameters(self) -> dict[str, Any]:
        return {name: FACTORY.from_numpy(np.asarray(values)) for name, values in self._parameters.items()}

    def config(self) -> Any:
        return {**({} if self._after is None else {"after": self._after}), **self._answers.get("config", {})}

    def forward(self, input: Any, parameters: Any, compute_backend: Any) -> Any:
        self.calls.append((input.shape(), {name: tensor.dtype() for name, tensor in parameters.items()}))
        return self.function(input, parameters, compute_backend)


class Plain(Layer):
    """A layer without a forward of its own."""

    forward = CustomLayer.forward


@pytest.fixture
def build(saved: Any, builder: Any, backend: Any, loader: Any, run: Any) -> Any:
    def made(*layers: CustomLayer, **settings: Any) -> Any:
        config = saved(1, **settings).config()
        return run(builder.build_with_custom_layers(config, list(layers), backend, loader))

    return made


def double(x: Any, parameters: Any, backend: Any) -> Any:
    return backend.tensor_ops().add(x, x)


@pytest.mark.clause("MB-CUSTOM-1", "MB-CUSTOM-2", "MB-CUSTOM-5")
def test_a_layer_is_called_where_it_stands(
    saved: Any, build: Any, prompt_logits: Any, builder: Any, run: Any, backend: Any, loader: Any
) -> None:
    model = saved(1)
    plain = prompt_logits(run(builder.build_model(model.config(), backend, loader)), model.ids)
    for after in ("embedding", "layers.0.attention_norm", "layers.1.hidden", "final_norm"):
        same = Layer(after=after)
        executor = build(same)
        same.calls.clear()
        np.testing.assert_array_equal(prompt_logits(executor, model.ids), plain)
        assert same.calls == [((len(model.ids), 32), {})]
        changed = Layer(after=after, function=double)
        executor = build(changed)
        difference = np.abs(prompt_logits(executor, model.ids) - plain).max()
        assert difference > 1e3 * model.bound, after


@pytest.mark.clause("MB-CUSTOM-1")
def test_the_right_value_reaches_the_layer(saved: Any, build: Any, prompt_logits: Any, judge_logits: Any) -> None:
    """transformers' own hidden state stands where the layer is."""
    model = saved(1)
    seen: list[Any] = []
    watching = Layer(after="layers.0.hidden", function=lambda x, p, b: (seen.append(x.to_numpy().copy()), x)[1])
    executor = build(watching)
    seen.clear()
    prompt_logits(executor, model.ids)
    _, states = judge_logits(model.tiny.config, model.tiny.tensors, model.ids, True)
    _, floats = judge_logits(model.tiny.config, model.tiny.tensors, model.ids, False)
    assert np.abs(seen[0] - states[1]).max() <= 2 * np.abs(floats[1] - states[1]).max()


@pytest.mark.clause("MB-CUSTOM-1", "MB-CUSTOM-2")
def test_a_low_rank_adapter_is_the_model_with_merged_weights(
    saved: Any, build: Any, prompt_logits: Any, tiny_llama: Any
) -> None:
    """y = h + B A n behind the last norm equals a head W (1 + B A): checked against transformers with that head."""
    model = saved(1)
    rng = np.random.default_rng(5)
    a, b = (0.1 * rng.standard_normal(shape).astype(np.float32) for shape in ((4, 32), (32, 4)))

    def adapt(x: Any, parameters: Any, backend: Any) -> Any:
        linear = backend.kernel_ops().linear_ops()
        return backend.tensor_ops().add(x, linear.linear(linear.linear(x, parameters["a"]), parameters["b"]))

    layer = Layer("lora", "final_norm", adapt, {"a": a, "b": b})
    executor = build(layer)
    merged = tiny_llama(1)
    merged = type(merged)(merged.config, dict(merged.tensors))
    head = merged.tensors["lm_head.weight"].astype(np.float64)
    merged.tensors["lm_head.weight"] = (head @ (np.eye(32) + b.astype(float) @ a.astype(float))).astype(np.float32)
    exact = merged.logits(model.ids, True)
    bound = 2 * np.abs(merged.logits(model.ids, False) - exact).max()
    assert np.abs(prompt_logits(executor, model.ids) - exact).max() <= 2 * bound  # the merged head is rounded once more
    assert layer.calls[-1][1] == {"a": DataType.FP32, "b": DataType.FP32}
    assert executor.info().num_parameters == sum(v.size for v in model.tiny.tensors.values()) + 2 * 4 * 32


@pytest.mark.clause("MB-CUSTOM-2")
def test_parameters_take_the_models_type(saved: Any, builder: Any, backend: Any, loader: Any, run: Any) -> None:
    import dataclasses

    layer = Layer(parameters={"gain": np.ones(32, np.float32)})
    config = dataclasses.replace(saved(1).config(), dtype=DataType.BF16)
    run(builder.build_with_custom_layers(config, [layer], backend, loader))
    assert layer.calls[-1][1] == {"gain": DataType.BF16}
    ids = Layer(parameters={"ids": np.arange(32, dtype=np.int32)})
    with pytest.raises(ConfigError, match="float type"):
        run(builder.build_with_custom_layers(config, [ids], backend, loader))


@pytest.mark.clause("MB-CUSTOM-1")
def test_layers_behind_one_value_run_in_order(saved: Any, build: Any, prompt_logits: Any) -> None:
    model = saved(1)
    order: list[str] = []

    def noting(name: str) -> Callable[..., Any]:
        return lambda x, parameters, backend: (order.append(name), x)[1]

    layers = [Layer(name, "layers.1.hidden", noting(name)) for name in ("first", "second", "third")]
    executor = build(*layers)
    order.clear()
    prompt_logits(executor, model.ids)
    assert order == ["first", "second", "third"]


@pytest.mark.clause("MB-CUSTOM-3")
def test_a_layer_that_is_a_graph_operation(saved: Any, build: Any, prompt_logits: Any, judge_logits: Any) -> None:
    """scale behind the embedding by 2 is a model whose embedding is twice as large (and whose head is not)."""
    model = saved(1)
    tensors = dict(model.tiny.tensors)
    tensors["model.embed_tokens.weight"] = 2 * tensors["model.embed_tokens.weight"]
    exact = judge_logits(model.tiny.config, tensors, model.ids, True)[0]
    bound = 2 * np.abs(judge_logits(model.tiny.config, tensors, model.ids, False)[0] - exact).max()
    scale = Plain("twice", "embedding", layer_type="scale", config={"factor": 2.0})
    assert np.abs(prompt_logits(build(scale), model.ids) - exact).max() <= bound
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((32, 32)).astype(np.float32)
    head = model.tiny.tensors["lm_head.weight"].astype(float) @ weight.astype(float)
    merged = {**model.tiny.tensors, "lm_head.weight": head.astype(np.float32)}
    exact = judge_logits(model.tiny.config, merged, model.ids, True)[0]
    bound = 2 * np.abs(judge_logits(model.tiny.config, merged, model.ids, False)[0] - exact).max()
    projection = Plain("mix", "final_norm", parameters={"weight": weight}, layer_type="linear")
    found = prompt_logits(build(projection), model.ids)
    assert np.abs(found - exact).max() <= 2 * bound  # one product more than in the merged head
    with pytest.raises(ConfigError, match="'adapter' is no operation"):
        build(Plain())
    with pytest.raises(ConfigError, match="factor"):
        build(Plain("twice", "embedding", layer_type="scale"))
    with pytest.raises(ConfigError, match="'attention' is no operation"):
        build(Plain("more", "embedding", layer_type="attention"))


@pytest.mark.clause("MB-CUSTOM-1", "MB-CUSTOM-4")
@pytest.mark.parametrize(
    ("layers", "kind", "said"),
    [
        ([Layer(after="layers.9.hidden")], NotFoundError, "layers.2.hidden"),
        ([Layer(after=None)], ConfigError, "after"),
        ([Layer(after=7)], ConfigError, "after: got 7"),
        ([Layer(input_shape=[-1, 31])], ConfigError, r"input_shape: got \[-1, 31\], expected \[-1, 32\]"),
        ([Layer(input_shape=[32])], ConfigError, "input_shape"),
        ([Layer(output_shape=[-1, 33])], ConfigError, "output_shape"),
        ([Layer(output_shape=[-1])], ConfigError, "output_shape"),
        ([Layer(), Layer()], AlreadyExistsError, "mine"),
        ([Layer("logits")], AlreadyExistsError, "logits"),
        ([Layer("")], AlreadyExistsError, "empty"),
        ([Layer(parameters={"": np.ones(2, np.float32)})], ConfigError, "initialize_parameters"),
    ],
)
def test_layers_that_do_not_fit(build: Any, layers: list[Layer], kind: Any, said: str) -> None:
    with pytest.raises(kind, match=said):
        build(*layers)


@pytest.mark.clause("MB-CUSTOM-4")
def test_a_layer_that_breaks_its_promise(build: Any) -> None:
    def narrow(x: Any, parameters: Any, backend: Any) -> Any:
        return x.view((0, 0), (x.shape()[0], 16))

    with pytest.raises(ConfigError, match=r"'mine': forward gave shape \(1, 16\), expected \(1, 32\)"):
        build(Layer(function=narrow))
    anything = {"input_shape": [-1, -1], "output_shape": [-1, -1]}
    assert build(Layer(**anything)).info().num_layers == 3
    with pytest.raises(ConfigError, match=r"forward gave shape \(1, 16\), expected \(-1, 32\)"):
        build(Layer(function=narrow, **anything))


@pytest.mark.clause("MB-CUSTOM-5")
def test_passes_go_round_custom_layers(saved: Any, builder: Any, run: Any) -> None:
    definition = run(builder.export_model_definition(saved(1).config()))
    layers = [Layer(f"l{i}", "layers.0.hidden") for i in range(2)] + [Layer("n", "layers.1.ffn_norm")]
    insert_layers(definition, layers)
    apply_passes(definition, default_passes(3))
    graph = IrGraph.read(definition)
    assert [node.id for node in graph.nodes.values() if node.operation == "custom"] == ["l0", "l1", "n"]
    assert graph.nodes["layers.1.ffn_norm"].parameters == ["model.layers.1.post_attention_layernorm.weight"]
    kinds = [node.operation for node in graph.nodes.values()]
    assert kinds.count("rms_norm_residual") == 5  # one sum's norm lies behind the layers


@pytest.mark.clause("MB-IMPORT-3", "MB-CUSTOM-2")
def test_a_definition_names_code_that_the_builder_must_have(
    saved: Any, backend: Any, loader: Any, run: Any, builder: Any, prompt_logits: Any
) -> None:
    model = saved(1)

    def gain(x: Any, parameters: Any, backend: Any) -> Any:
        return backend.tensor_ops().mul(x, parameters["gain"])

    layer = Layer("gained", "layers.0.hidden", gain, {"gain": np.linspace(0.5, 2, 32).astype(np.float32)})
    definition = run(builder.export_model_definition(model.config()))
    insert_layers(definition, [layer])
    with pytest.raises(UnsupportedError, match="'gained' is code"):
        run(builder.import_model_definition(definition, backend, loader))
    with_code = DecoderModelBuilder(custom_layers=[layer])
    found = prompt_logits(run(with_code.import_model_definition(definition, backend, loader)), model.ids)
    whole = prompt_logits(run(builder.build_with_custom_layers(model.config(), [layer], backend, loader)), model.ids)
    assert np.abs(found - whole).max() <= 2 * model.bound
    plain = prompt_logits(run(builder.build_model(model.config(), backend, loader)), model.ids)
    assert np.abs(found - plain).max() > 1e3 * model.bound


@pytest.mark.clause("MB-CUSTOM-2")
def test_the_default_forward_says_so() -> None:
    layer = Plain()
    with pytest.raises(UnsupportedError, match="override forward"):
        layer.forward(FACTORY.from_numpy(np.ones((1, 2), np.float32)), {}, BACKEND)


@pytest.mark.clause("MB-CUSTOM-6")
def test_a_low_rank_adapter_is_the_model_with_a_changed_output_matrix(
    saved: Any, build: Any, prompt_logits: Any, judge_logits: Any
) -> None:
    from ferrum_ref.builder.low_rank import LowRankAdapter

    model, rng = saved(1), np.random.default_rng(4)
    down, up = rng.standard_normal((3, 32)) / 6, rng.standard_normal((32, 3)) / 2
    executor = build(LowRankAdapter("lora", "final_norm", down, up, FACTORY, scale=0.5))
    head = model.tiny.tensors["lm_head.weight"].astype(np.float64)
    merged = {**model.tiny.tensors, "lm_head.weight": (head + 0.5 * head @ up @ down).astype(np.float32)}
    exact, floats = (judge_logits(model.tiny.config, merged, model.ids, wide)[0] for wide in (True, False))
    found = prompt_logits(executor, model.ids)
    assert np.abs(found - exact).max() <= 4 * np.abs(floats - exact).max()
    assert np.abs(found - prompt_logits(build(), model.ids)).max() > 0.1
    for bad in ((down, up.T, 1.0), (down[0], up, 1.0), (down, up, np.inf)):
        with pytest.raises(ConfigError, match=r"expected \(R, E\), \(E, R\) and a finite scale"):
            LowRankAdapter("lora", "final_norm", bad[0], bad[1], FACTORY, scale=bad[2])
