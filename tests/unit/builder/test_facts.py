"""What builder, factory and registry say of themselves, and the plain data."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ferrum_ref.builder import DecoderModelBuilderFactory, ExecutorModelRegistry
from ferrum_ref.builder.families import supported_architectures
from ferrum_ref.errors import AlreadyExistsError, ConfigError, FerrumError, InvalidParameterError, UnsupportedError
from ferrum_ref.interfaces import model_builder
from ferrum_ref.interfaces.model_builder import (
    AdvancedModelBuilder,
    BuilderCapabilities,
    BuildOptions,
    BuildPhase,
    BuildProgress,
    BuildTimeBreakdown,
    BuildTimeEstimate,
    BuildTimeFactor,
    ModelArchitectureFamily,
    OptimizationTechnique,
    ValidationIssue,
    ValidationSeverity,
)
from ferrum_ref.interfaces.weights import WeightFormat
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.serialization import from_json, to_json
from ferrum_ref.types.ids import ModelId
from ferrum_ref.types.models import ModelType, QuantizationConfig


@pytest.mark.clause("MB-DATA-1")
def test_default_options() -> None:
    assert dataclasses.astuple(BuildOptions()) == (True, True, 2, False, None, False, 3600, {})
    for wrong in ({"optimization_level": 256}, {"optimization_level": -1}, {"build_timeout_seconds": -1}):
        with pytest.raises(InvalidParameterError, match=next(iter(wrong))):
            BuildOptions(**wrong)
    assert BuildOptions(build_timeout_seconds=None).build_timeout_seconds is None
    records = [each for each in vars(model_builder).values() if dataclasses.is_dataclass(each)]
    assert len(records) == 21
    for record in records:
        has_default = any(
            field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
            for field in dataclasses.fields(record)
        )
        assert has_default == (record is BuildOptions)


@pytest.mark.clause("MB-DATA-2")
def test_orders() -> None:
    assert ValidationSeverity.Warning < ValidationSeverity.Error < ValidationSeverity.Critical
    assert [phase.value for phase in BuildPhase] == [
        "Validation", "WeightLoading", "ModelInitialization", "LayerConstruction", "ParameterBinding", "Optimization",
        "FinalValidation", "Finalization",
    ]  # fmt: skip


@pytest.mark.clause("MB-DATA-4")
@pytest.mark.parametrize(
    "value",
    [
        BuildOptions(quantization_config=QuantizationConfig.INT4(True, 32), additional_options={"a": [1, None]}),
        ValidationIssue(ValidationSeverity.Critical, "files", "gone", None, "$.x"),
        BuildTimeEstimate(1, 9, 3, BuildTimeBreakdown(1, 1, 0, 0, 1), [BuildTimeFactor("x", 0.5, "half")]),
        BuildProgress(BuildPhase.Optimization, 0.5, "x", 7, None, {"n": 1}),
    ],
)
def test_records_as_json(value: Any) -> None:
    assert from_json(type(value), to_json(value)) == value
    assert '"Critical"' in to_json(ValidationIssue(ValidationSeverity.Critical, "a", "b", None, "c"))


@pytest.mark.clause("MB-INFO-1", "MB-VALIDATE-6")
def test_supported_families_are_those_that_are_read(builder: Any) -> None:
    """An answer that the models room confirms: for each family a configuration that it reads, or refuses."""
    assert ModelType.Llama in builder.supported_model_types()
    assert "llama" in supported_architectures()
    sizes = {
        "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    }  # fmt: skip
    names = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    for name, architecture in names.items():
        try:
            DecoderConfig.from_hf({**sizes, "model_type": name, "architectures": [architecture]})
            accepted = True
        except FerrumError:
            accepted = False
        assert (name in supported_architectures()) == accepted


@pytest.mark.clause("MB-INFO-2")
def test_builder_info_claims_what_is_there(builder: Any) -> None:
    info = builder.builder_info()
    assert info.name == "DecoderModelBuilder"
    assert info.version
    assert [each.variants for each in info.supported_architectures] == [[name] for name in supported_architectures()]
    assert {each.family for each in info.supported_architectures} == {ModelArchitectureFamily.Transformer}
    formats = [WeightFormat.SafeTensors, WeightFormat.PyTorch, WeightFormat.Custom(0x46554747)]
    assert info.supported_weight_formats == formats
    assert set(info.supported_optimizations) == {
        OptimizationTechnique.OperatorFusion,
        OptimizationTechnique.ConstantFolding,
        OptimizationTechnique.DeadCodeElimination,
        OptimizationTechnique.Quantization,
    }
    assert info.capabilities == BuilderCapabilities(None, True, True, False, False, True, True)
    from ferrum_ref.builder.passes import default_passes

    assert {each.technique for each in default_passes(3)} <= set(info.supported_optimizations)


@pytest.mark.clause("MB-FACTORY-1")
def test_the_factory(run: Any) -> None:
    factory = DecoderModelBuilderFactory()
    first, second = run(factory.create_builder()), run(factory.create_advanced_builder())
    assert first is not second
    assert isinstance(first, AdvancedModelBuilder)
    assert factory.supported_types() == first.supported_model_types()
    for kind in factory.supported_types():
        assert run(factory.create_builder_for_type(kind)).supported_model_types()
    with pytest.raises(UnsupportedError, match="llama"):
        run(factory.create_builder_for_type(ModelType.Clip))
    from ferrum_ref.builder import DecoderModelBuilder

    with pytest.raises(ConfigError, match="num_threads"):
        DecoderModelBuilder(num_threads=0)


class Stub:
    """Stands for an executor: a registry keeps it and asks for its facts only."""

    def __init__(self, number: int) -> None:
        self.number = number

    def info(self) -> Any:
        return ("info", self.number)


@pytest.mark.clause("MB-REGISTRY-1", "MB-REGISTRY-2")
class RegistryMachine(RuleBasedStateMachine):
    """Against a list of pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = ExecutorModelRegistry()
        self.pairs: list[tuple[str, Stub]] = []
        self.count = 0

    def known(self, name: str) -> Stub | None:
        return next((stub for each, stub in self.pairs if each == name), None)

    @rule(name=st.sampled_from("abcd"))
    def register(self, name: str) -> None:
        self.count += 1
        stub: Any = Stub(self.count)
        if self.known(name) is None:
            self.registry.register_model(ModelId(name), stub)
            self.pairs.append((name, stub))
        else:
            with pytest.raises(AlreadyExistsError, match=name):
                self.registry.register_model(ModelId(name), stub)

    @rule(name=st.sampled_from("abcd"))
    def remove(self, name: str) -> None:
        assert self.registry.remove_model(ModelId(name)) is self.known(name)
        self.pairs = [pair for pair in self.pairs if pair[0] != name]

    @invariant()
    def agree(self) -> None:
        assert self.registry.list_models() == [ModelId(name) for name, _ in self.pairs]
        for name in "abcd":
            stub = self.known(name)
            assert self.registry.get_model(ModelId(name)) is stub
            assert self.registry.contains_model(ModelId(name)) == (stub is not None)
            assert self.registry.get_model_info(ModelId(name)) == (None if stub is None else ("info", stub.number))


@pytest.mark.clause("MB-REGISTRY-1", "MB-REGISTRY-2")
class TestRegistry(RegistryMachine.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
