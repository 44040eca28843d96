"""The switch between the reference's results and upstream's, and names that upstream defines twice."""

from __future__ import annotations

import inspect

import pytest

import ferrum_ref.types
from ferrum_ref.types import config, ids, models, requests, sampling
from ferrum_ref.types.parity_mode import ParityMode


@pytest.mark.clause("TY-PARITY-1")
def test_the_reference_is_the_default_wherever_the_switch_is() -> None:
    assert [mode.name for mode in ParityMode] == ["REFERENCE", "UPSTREAM"]
    for function in (ids.TokenId.from_value, sampling.SamplingParams.validate):
        parameter = inspect.signature(function).parameters["parity_mode"]
        assert parameter.default is ParityMode.REFERENCE
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.clause("TY-NAME-1")
def test_a_name_that_upstream_defines_twice_is_the_data_crates_here() -> None:
    assert ferrum_ref.types.BackendConfig is config.BackendConfig
    assert "dtype" in config.BackendConfig.__dataclass_fields__
    assert ferrum_ref.types.TokenizerConfig is config.TokenizerConfig
    assert "tokenizer_path" in config.TokenizerConfig.__dataclass_fields__
    assert ferrum_ref.types.QuantizationConfig is models.QuantizationConfig
    assert hasattr(models.QuantizationConfig, "SmoothQuant")
    assert ferrum_ref.types.SamplingParams is sampling.SamplingParams
    assert len(sampling.SamplingParams.__dataclass_fields__) == 14
    assert ferrum_ref.types.ScheduledRequest is requests.ScheduledRequest
    assert len(requests.ScheduledRequest.__dataclass_fields__) == 5
    from ferrum_ref.interfaces import scheduler, weights

    assert scheduler.ScheduledRequest is not requests.ScheduledRequest
    assert weights.QuantizationConfig is not models.QuantizationConfig
