"""Findings: every wrong setting and field with its place, how bad it is, and a way out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_ref.builder import DecoderModelBuilder
from ferrum_ref.errors import ConfigError, UnsupportedError
from ferrum_ref.interfaces.model_builder import BuildOptions, ValidationSeverity
from ferrum_ref.types.devices import DataType
from ferrum_ref.types.models import ModelConfig, ModelSource, ModelType, QuantizationConfig
from ferrum_ref.types.parity_mode import ParityMode

ERROR, CRITICAL, WARNING = ValidationSeverity.Error, ValidationSeverity.Critical, ValidationSeverity.Warning


def with_config(model: Any, /, **changes: Any) -> ModelConfig:
    """The directory's settings with a changed configuration in them; None takes a field out."""
    found = {**json.loads((model.path / "config.json").read_text()), **changes}
    return model.config(extra_config={"config": {key: value for key, value in found.items() if value is not None}})


def found(builder: Any, config: ModelConfig) -> dict[str, tuple[Any, str]]:
    return {issue.config_path: (issue.severity, issue.category) for issue in builder.validate_config(config)}


@pytest.mark.clause("MB-VALIDATE-1")
def test_a_sound_model_has_no_findings(saved: Any, builder: Any) -> None:
    assert builder.validate_config(saved(1).config()) == []
    assert builder.validate_config(with_config(saved(1))) == []


@pytest.mark.clause("MB-VALIDATE-2", "MB-VALIDATE-3")
@pytest.mark.parametrize(
    ("changes", "path", "severity", "category"),
    [
        ({"model_path": ""}, "model_path", CRITICAL, "settings"),
        ({"model_path": "/no/such/place"}, "model_path", CRITICAL, "files"),
        ({"model_path": "a\x00b"}, "model_path", CRITICAL, "files"),
        ({"max_batch_size": 0}, "max_batch_size", ERROR, "settings"),
        ({"max_sequence_length": 0}, "max_sequence_length", ERROR, "settings"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size", ERROR, "settings"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size", ERROR, "unsupported"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size", ERROR, "unsupported"),
        ({"dtype": DataType.FP8}, "dtype", ERROR, "settings"),
        ({"quantization": QuantizationConfig.INT8(True, True)}, "quantization", ERROR, "unsupported"),
        ({"extra_config": {"num_blocks": "many"}}, "extra_config.num_blocks", ERROR, "settings"),
        ({"extra_config": {"config": 3}}, "extra_config.config", CRITICAL, "settings"),
        ({"model_type": ModelType.Qwen}, "model_type", ERROR, "settings"),
    ],
)
def test_settings(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, changes: Any, path: str, severity: Any, category: str
) -> None:
    config = dataclasses.replace(saved(1).config(), **changes)
    assert found(builder, config) == {f"ModelConfig.{path}": (severity, category)}
    (issue,) = builder.validate_config(config)
    assert issue.suggested_fix
    assert issue.description
    kind = UnsupportedError if category == "unsupported" else ConfigError
    with pytest.raises(kind, match=path.split(".")[-1]):
        run(builder.build_model(config, backend, loader))


@pytest.mark.clause("MB-VALIDATE-2", "MB-VALIDATE-5")
def test_warnings_stop_nothing(saved: Any, builder: Any, backend: Any, loader: Any, run: Any) -> None:
    config = dataclasses.replace(saved(1).config(), max_sequence_length=4096, extra_config={"colour": "blue"})
    assert found(builder, config) == {
        "ModelConfig.extra_config.colour": (WARNING, "settings"),
        "ModelConfig.max_sequence_length": (WARNING, "settings"),
    }
    assert run(builder.build_model(config, backend, loader)).info().max_sequence_length == 96


@pytest.mark.clause("MB-VALIDATE-5")
def test_model_types_that_fit(saved: Any, builder: Any) -> None:
    for kind in (ModelType.Llama, ModelType.Custom("llama"), ModelType.Custom("unknown")):
        assert found(builder, saved(1).config(model_type=kind)) == {}


@pytest.mark.clause("MB-VALIDATE-2")
def test_files_that_are_missing(saved: Any, builder: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(saved(1).config(), model_path=str(tmp_path))
    assert found(builder, config) == {"ModelConfig.model_path": (CRITICAL, "files")}
    (tmp_path / "config.json").write_text((saved(1).path / "config.json").read_text())
    (issue,) = builder.validate_config(config)
    assert (issue.severity, issue.category) == (ERROR, "files")
    assert "model.safetensors" in issue.description
    (tmp_path / "config.json").write_text("{")
    assert found(builder, config) == {"ModelConfig.model_path": (CRITICAL, "files")}


@pytest.mark.clause("MB-VALIDATE-4")
@pytest.mark.parametrize(
    ("changes", "path", "category", "fix"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads", "architecture", "set it to one of 1, 2, 4"),
        ({"hidden_size": None}, "hidden_size", "architecture", "hidden_size"),
        ({"vocab_size": -5}, "vocab_size", "architecture", "vocab_size"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers", "architecture", "num_hidden_layers"),
        ({"head_dim": 7}, "head_dim", "architecture", "even"),
        ({"head_dim": None, "hidden_size": 34}, "hidden_size", "architecture", "head_dim"),
        ({"rms_norm_eps": 0}, "rms_norm_eps", "architecture", "positive"),
        ({"hidden_act": "quick_gelu"}, "hidden_act", "unsupported", "silu"),
        ({"model_type": "llava"}, "model_type", "unsupported", "supported"),
        ({"num_attention_heads": True}, "num_attention_heads", "architecture", "num_attention_heads"),
    ],
)
def test_one_field(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, changes: Any, path: str, category: str, fix: str
) -> None:
    config = with_config(saved(1), **changes)
    (issue,) = builder.validate_config(config)
    assert (issue.config_path, issue.category) == (f"$.{path}", category)
    assert issue.severity == (CRITICAL if category == "unsupported" else ERROR)
    assert issue.suggested_fix is not None
    assert fix in issue.suggested_fix
    kind = UnsupportedError if category == "unsupported" else ConfigError
    with pytest.raises(kind, match=rf"\$\.{path}"):
        run(builder.build_model(config, backend, loader))
    options = BuildOptions(additional_options={"config": config.extra_config["config"]}, enable_validation=False)
    with pytest.raises(kind):
        run(builder.build_from_source(ModelSource.Local(str(saved(1).path)), backend, loader, options))


@pytest.mark.clause("MB-VALIDATE-3", "MB-VALIDATE-4")
def test_all_wrong_fields_at_once(saved: Any, builder: Any, backend: Any, loader: Any, run: Any) -> None:
    config = with_config(
        saved(1), num_key_value_heads=3, hidden_act="quick_gelu", intermediate_size=None, rms_norm_eps="small",
        tie_word_embeddings="yes", rope_parameters=7, max_position_embeddings=0,
    )  # fmt: skip
    assert set(found(builder, config)) == {
        "$.num_key_value_heads", "$.hidden_act", "$.intermediate_size", "$.rms_norm_eps", "$.tie_word_embeddings",
        "$.rope_parameters", "$.max_position_embeddings",
    }  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"\$\.hidden_act.*\(6 more\)"):  # the one that is Critical
        run(builder.build_model(config, backend, loader))


@pytest.mark.clause("MB-VALIDATE-6")
@pytest.mark.parametrize(
    "changes",
    [
        {
            "model_type": "llava",
            "architectures": ["LlavaForConditionalGeneration"],
            "vision_config": {"hidden_size": 8},
        },
        {"model_type": "moonshine-nova", "architectures": ["NovaForCausalLM"]},
        {"model_type": None, "architectures": ["NovaForCausalLM"]},
        {"architectures": ["MllamaForConditionalGeneration"]},
    ],
)
def test_another_kind_of_model_is_never_built_as_this_one(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, changes: dict[str, Any]
) -> None:
    """D-77, D-81: upstream takes an unknown architecture for Llama; these weights would even load."""
    config = with_config(saved(1), **changes)
    (issue,) = builder.validate_config(config)
    assert (issue.severity, issue.category) == (CRITICAL, "unsupported")
    with pytest.raises(UnsupportedError):
        run(builder.build_model(config, backend, loader))
    with pytest.raises(UnsupportedError):
        run(builder.export_model_definition(config))


@pytest.mark.clause("MB-UPSTREAM-1")
def test_a_missing_rope_base(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any, judge_logits: Any
) -> None:
    """D-80: 10000 here, 500000 upstream; transformers says what either gives."""
    model = saved(1)
    config = with_config(model, rope_parameters=None, rope_theta=None, rope_scaling=None)
    upstream = DecoderModelBuilder(parity_mode=ParityMode.UPSTREAM)
    for made_by, theta in ((builder, 10000.0), (upstream, 500000.0)):
        judged = dataclasses.replace(model.tiny.config, rope_theta=theta)
        exact = judge_logits(judged, model.tiny.tensors, model.ids, True)[0]
        bound = 2 * np.abs(judge_logits(judged, model.tiny.tensors, model.ids, False)[0] - exact).max()
        executor = run(made_by.build_model(config, backend, loader))
        assert np.abs(prompt_logits(executor, model.ids) - exact).max() <= bound
        definition = run(made_by.export_model_definition(config))
        tables = [layer.config["theta"] for layer in definition.layers if layer.layer_type == "rope_tables"]
        assert tables == [theta] * 3
    stated = with_config(model, rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    definition = run(upstream.export_model_definition(stated))
    assert definition.architecture.config["rope_theta"] == 777.0


@pytest.mark.clause("MB-UPSTREAM-2")
def test_an_unknown_activation(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any
) -> None:
    """D-81: quick_gelu is refused; upstream computes SiLU and only warns."""
    model = saved(1)
    config = with_config(model, hidden_act="quick_gelu")
    with pytest.raises(UnsupportedError, match="hidden_act"):
        run(builder.build_model(config, backend, loader))
    upstream = DecoderModelBuilder(parity_mode=ParityMode.UPSTREAM)
    assert upstream.validate_config(config) == []
    executor = run(upstream.build_model(config, backend, loader))
    assert model.error(prompt_logits(executor, model.ids)) <= model.bound  # the SiLU model's logits


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
FIELDS = st.sampled_from(
    ["vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
     "rope_theta",
     "rope_parameters", "rope_scaling", "hidden_act", "architectures", "model_type", "tie_word_embeddings",
     "layer_types",
     "eos_token_id", "num_hidden_layers", "max_position_embeddings", "intermediate_size", "sliding_window", "dtype"]
)  # fmt: skip


@pytest.mark.clause("MB-VALIDATE-1", "MB-VALIDATE-3")
@settings(max_examples=150)
@given(changes=st.dictionaries(FIELDS, JSON, max_size=4), extra=st.dictionaries(st.text(max_size=4), JSON, max_size=2))
def test_it_never_raises(saved: Any, run: Any, changes: dict[str, Any], extra: dict[str, Any]) -> None:
    """Whatever config.json says; and what it lets pass has a definition."""
    builder = DecoderModelBuilder()
    config = with_config(saved(1), **changes)
    config = dataclasses.replace(config, extra_config={**extra, **config.extra_config})
    issues = builder.validate_config(config)
    assert all(issue.description and issue.config_path for issue in issues)
    if all(issue.severity is WARNING for issue in issues):
        with contextlib.suppress(UnsupportedError):  # what the builder builds and the IR does not express
            run(builder.export_model_definition(config))
    else:
        with pytest.raises((ConfigError, UnsupportedError)):
            run(builder.build_model(config, None, None))  # refused before either is touched
