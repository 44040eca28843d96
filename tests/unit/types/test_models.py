"""Facts about models."""

from __future__ import annotations

import dataclasses
import math

import pytest

from ferrum_ref.errors import ConfigError, InvalidFormatError, InvalidParameterError, UnsupportedError
from ferrum_ref.types.config import SecurityConfig
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import ModelId
from ferrum_ref.types.models import (
    ModelConfig,
    ModelInfo,
    ModelSource,
    ModelType,
    QuantizationConfig,
    RopeScaling,
    TokenUsage,
)


def an_info(num_heads: int = 4) -> ModelInfo:
    return ModelInfo(
        ModelId("m"), ModelType.Llama, 1000, 64, 3, num_heads, 2, 100, 128, DataType.FP16, Device.CPU, None, None, {}
    )


@pytest.mark.clause("TY-MODEL-1")
def test_families_as_text() -> None:
    named = {t: str(getattr(ModelType, t)) for t in ("Llama", "Mistral", "Qwen", "Phi", "Gemma", "Embedding", "Clip")}
    assert named == {t: t.lower() for t in named}
    assert (str(ModelType.Code("py")), str(ModelType.Custom("x"))) == ("code-py", "custom-x")
    with pytest.raises(InvalidParameterError):
        ModelType("llama", "name")


@pytest.mark.clause("TY-MODEL-2", "TY-MODEL-3")
def test_memory_of_a_model_by_hand() -> None:
    info = an_info()
    assert info.estimated_size_bytes() == 2400
    need = info.memory_requirements(2, 10)
    assert need.kv_cache_memory == 3 * 2 * 16 * 2 * 2 * 10 * 2
    assert need.activation_memory == 64 * 10 * 2 * 2 * 4
    assert need.total_estimated == 2400 + 7680 + 10240
    assert info.supports_sequence_length(128)
    assert not info.supports_sequence_length(129)


@pytest.mark.clause("TY-MODEL-3")
def test_a_model_without_heads_is_an_error_and_no_division_by_zero() -> None:
    with pytest.raises(InvalidParameterError, match="num_heads"):
        an_info(num_heads=0).memory_requirements(1, 1)


@pytest.mark.clause("TY-MODEL-4")
def test_model_config() -> None:
    config = ModelConfig.new("m", "/models/m")
    assert (config.max_batch_size, config.max_sequence_length, config.dtype) == (1, 2048, DataType.FP16)
    assert str(config.model_type) == "custom-unknown"
    config.validate()
    for change in ({"model_path": ""}, {"max_batch_size": 0}, {"max_sequence_length": 0}, {"tensor_parallel_size": 0}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            dataclasses.replace(config, **change).validate()  # type: ignore[arg-type]


@pytest.mark.clause("TY-MODEL-5")
def test_quantisation_widths() -> None:
    schemes = {
        QuantizationConfig.GPTQ(4, 128, False): (4, False),
        QuantizationConfig.AWQ(3, True, "gemm"): (3, False),
        QuantizationConfig.FP8(True, False): (8, True),
        QuantizationConfig.INT8(True, True): (8, True),
        QuantizationConfig.INT4(True, 32): (4, False),
        QuantizationConfig.SmoothQuant(0.5, 128): (8, True),
    }
    for scheme, (bits, accurate) in schemes.items():
        assert isinstance(scheme, QuantizationConfig)
        assert (scheme.bits(), scheme.is_high_accuracy()) == (bits, accurate)


@pytest.mark.clause("TY-MODEL-5")
def test_usage_adds_up() -> None:
    usage = TokenUsage.new(3, 4)
    usage.add_completion_tokens(5)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 9, 12)


def test_sources_are_kinds_of_one_type() -> None:
    for source in (ModelSource.Local("p"), ModelSource.HuggingFace("r", None, None), ModelSource.Url("u", {})):
        assert isinstance(source, ModelSource)
    assert isinstance(ModelSource.S3("b", "k", None, None), ModelSource.S3)


@pytest.mark.clause("TY-MODEL-1")
def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="unknown family 'bert'"):
        ModelType("bert")  # type: ignore[arg-type]


@pytest.mark.clause("TY-MODEL-6")
def test_a_source_does_not_print_what_may_be_a_secret() -> None:
    source = ModelSource.Url("https://user:hunter2@host/m?token=hunter2", {"Authorization": "hunter2"})
    assert "hunter2" not in repr(source)
    assert "hunter2" not in repr(ModelSource.S3("b", "k", None, "https://user:hunter2@host"))
    assert source != ModelSource.Url("https://host", {})
    assert "hunter2" not in repr(SecurityConfig(api_keys=["hunter2"]))


@pytest.mark.clause("TY-MODEL-7")
@pytest.mark.parametrize("key", ["rope_type", "type", "scaling_type"])
def test_rope_scaling_of_a_config_file(key: str) -> None:
    settings = {key: "llama3", "factor": 8, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
    assert RopeScaling.from_config(settings) == RopeScaling("llama3", 8.0)


@pytest.mark.clause("TY-MODEL-7")
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"factor": 2.0}, "rope_type"),
        ({"rope_type": 5, "factor": 2.0}, "rope_type"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor"),
        ({"rope_type": "linear", "factor": True}, "factor"),
        ({"rope_type": "linear", "factor": math.nan}, "factor"),
    ],
)
def test_rope_scaling_that_says_nothing_is_refused(settings: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidFormatError, match=named):
        RopeScaling.from_config(settings)


GPTQ = {"bits": 4, "group_size": 128, "desc_act": True, "sym": True, "damp_percent": 0.01}


@pytest.mark.clause("TY-MODEL-8")
@pytest.mark.parametrize(
    "method", [{}, {"method": "gptq"}, {"quant_method": "gptq"}, {"quant_method": "gptq_v2", "method": "x"}]
)
def test_quantize_config_as_autogptq_writes_it(method: dict[str, str]) -> None:
    expected = QuantizationConfig.GPTQ(4, 128, True)
    assert QuantizationConfig.from_checkpoint({**GPTQ, **method}) == expected
    whole = {"architectures": ["LlamaForCausalLM"], "quantization_config": {**GPTQ, **method}}
    assert QuantizationConfig.from_checkpoint(whole) == expected


@pytest.mark.clause("TY-MODEL-8")
def test_other_quantize_configs() -> None:
    assert QuantizationConfig.from_checkpoint({"bits": 8, "group_size": -1}) == QuantizationConfig.GPTQ(8, 0, False)
    awq = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": False, "version": "gemv"}
    assert QuantizationConfig.from_checkpoint(awq) == QuantizationConfig.AWQ(4, False, "gemv")
    assert QuantizationConfig.from_checkpoint({"method": "awq", "bits": 4}) == QuantizationConfig.AWQ(4, True, "gemm")
    with pytest.raises(UnsupportedError, match="bitsandbytes"):
        QuantizationConfig.from_checkpoint({"quant_method": "bitsandbytes"})
    for wrong in (
        {}, {"bits": 4}, {"bits": "4", "group_size": 1}, {"bits": 400, "group_size": 1},
        {"bits": True, "group_size": 1}, {"bits": 4, "group_size": -2}, {"bits": 4, "group_size": 1, "desc_act": 1},
        {"method": "awq", "bits": 4, "version": 2},
    ):  # fmt: skip
        with pytest.raises(InvalidFormatError, match="quantize_config"):
            QuantizationConfig.from_checkpoint(wrong)


@pytest.mark.clause("TY-MODEL-5")
def test_usage_refuses_a_negative_count() -> None:
    usage = TokenUsage.new(3, 4)
    with pytest.raises(InvalidParameterError, match="tokens"):
        usage.add_completion_tokens(-1)
    assert usage.total_tokens == 7
