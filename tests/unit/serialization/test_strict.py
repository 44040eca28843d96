"""What must not pass does not pass, and the error says where it lies."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import FerrumError, NotFoundError, SerializationError
from ferrum_ref.interfaces.model_builder import InitializationStrategy
from ferrum_ref.serialization import from_json, from_jsonable, to_json, to_jsonable
from ferrum_ref.types.config import BatchConfig, EngineConfig, MonitoringConfig
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import ModelId, RequestId, TokenId
from ferrum_ref.types.metrics import EngineStatus, ErrorEvent, SystemInfo, SystemMetrics
from ferrum_ref.types.models import ModelInfo, ModelSource, ModelType, QuantizationConfig, RopeScaling
from ferrum_ref.types.requests import InferenceRequest
from ferrum_ref.types.sampling import MirostatParams, ResponseFormat, SamplingParams, SpecialTokens

INFO = ModelInfo(ModelId("m"), ModelType.Llama, 1, 64, 1, 1, 1, 9, 9, DataType.FP16, Device.CPU, None, None, {})


def refused(kind: Any, text: str, path: str, reason: str = "", **options: Any) -> None:
    with pytest.raises(SerializationError, match=reason) as caught:
        from_json(kind, text, **options)
    assert caught.value.path == path
    assert path in str(caught.value)


WRONG: list[tuple[Any, str, str, str]] = [
    (BatchConfig, "[]", "$", "got a list, expected an object"),
    (BatchConfig, "null", "$", "got null, expected an object"),
    (TokenId, "true", "$", "got true, expected an integer"),
    (TokenId, "1.0", "$", "got the number 1.0, expected an integer"),
    (TokenId, '"1"', "$", "got a text, expected an integer"),
    (TokenId, "-1", "$", "must be in"),
    (TokenId, "4294967296", "$", "must be in"),
    (MirostatParams, '{"mode":256,"tau":1,"eta":1}', "$.mode", r"expected an integer in \[0, 256\)"),
    (MirostatParams, '{"mode":-0,"tau":1,"eta":1}', "$.mode", "expected an integer"),
    (MirostatParams, '{"mode":1,"tau":"1","eta":1}', "$.tau", "got a text, expected a number"),
    (MirostatParams, '{"mode":1,"tau":true,"eta":1}', "$.tau", "got true, expected a number"),
    (MirostatParams, '{"mode":1,"tau":1e39,"eta":1}', "$.tau", "beyond the range of float32"),
    (MirostatParams, '{"mode":1,"tau":null,"eta":1}', "$.tau", "got null, expected a number"),
    (MirostatParams, '{"mode":1,"tau":1}', "$", "the key 'eta' is missing"),
    (MirostatParams, '{"mode":1,"tau":1,"eta":1,"mood":2}', "$.mood", "did you mean 'mode'"),
    (MirostatParams, '{"mode":1,"mode":1,"tau":1,"eta":1}', "$", "'mode' stands there twice"),
    (ModelId, "5", "$", "expected a text"),
    (RequestId, '"6fa459eaee8a4ca4894edb77e160355e"', "$", "no hyphenated UUID"),
    (RequestId, "5", "$", "expected a UUID"),
    (DataType, '"fp16"', "$", "got 'fp16', expected one of FP32"),
    (DataType, "5", "$", "expected a variant of DataType"),
    (DataType, '{"FP16":null}', "$", "has no payload"),
    (Device, '"CUDA"', "$", "needs a payload"),
    (Device, '{"CUDA":0,"ROCm":0}', "$", "expected a variant of Device"),
    (Device, '{"CUDA":-1}', "$.CUDA", "expected an integer in"),
    (Device, '{"TPU":0}', "$", "got 'TPU', expected one of CPU, Metal, CUDA, ROCm"),
    (ModelSource, '{"S3":{"bucket":"b"}}', "$.S3", "the key 'key' is missing"),
    (ModelSource, '{"Local":{"path":"x"}}', "$.Local", "got an object, expected a text"),
    (QuantizationConfig, '{"GPTQ":{"num_bits":4,"group_size":1,"desc_act":true}}', "$.GPTQ.num_bits", "has no key"),
    (InitializationStrategy, '{"Zeros":{}}', "$", "has no payload"),
    (ResponseFormat, '{"type":"json_object"}', "$.type", "expected Text, JsonObject or JsonSchema"),
    (ResponseFormat, '{"type":"JsonSchema"}', "$", "a schema goes with JsonSchema only"),
    (ResponseFormat, '{"type":"Text","schema":"x"}', "$", "a schema goes with JsonSchema only"),
    (ResponseFormat, '{"type":"Text","more":"x"}', "$.more", "type and schema only"),
    (ResponseFormat, '{"type":"JsonSchema","schema":{}}', "$.schema", "expected a text"),
    (ResponseFormat, '"Text"', "$", "expected an object"),
    (FerrumError, '{"NotFound":"x"}', "$.NotFound", "expected an object with the key message"),
    (FerrumError, '{"NotFound":{"message":1}}', "$.NotFound.message", "expected a text"),
    (FerrumError, '{"Shape":{"message":"x"}}', "$", "got 'Shape'"),
    (NotFoundError, '{"Model":{"message":"x"}}', "$", "expected a NotFoundError"),
    (list[Device], '["CPU",{"CUDA":"x"}]', "$[1].CUDA", "got a text"),
    (list[int], '{"0":1}', "$", "got an object, expected a list"),
    (list[int], '"12"', "$", "got a text, expected a list"),
    (tuple[int, int], "[1]", "$", "got 1 elements, expected 2"),
    (tuple[int, ...], '[1,"x"]', "$[1]", "expected an integer"),
    (dict[str, int], '{"a b":"x"}', "$['a b']", "expected an integer"),
    (dict[str, int], "[]", "$", "expected an object"),
    (dict[Device, int], '{"tpu":1}', "$.tpu", "is no device"),
    (dict[Device, int], '{"CUDA:0":1}', "$['CUDA:0']", "is no device"),
    (dict[Device, int], '{"cuda:00":1}', "$['cuda:00']", "is no device"),
    (dict[Device, int], '{"cpu":1,"CPU":1}', "$.CPU", "written differently"),
    (dict[TokenId, int], '{"05":1}', "$['05']", "expected an integer"),
    (dict[TokenId, int], '{"-1":1}', "$['-1']", "must be in"),
    (dict[RequestId, int], '{"x":1}', "$.x", "no hyphenated UUID"),
    (frozenset[int], "[1,1]", "$", "twice"),
    (bytes, "[0,256]", "$[1]", "expected an integer in"),
    (bytes, '"AA=="', "$", "expected a list of bytes"),
    (MonitoringConfig, '{"enable_metrics":1,"enable_tracing":true,"export_interval":{"secs":1,"nanos":0}}',
     "$.enable_metrics", "expected true or false"),
    (MonitoringConfig, '{"enable_metrics":true,"enable_tracing":true,"export_interval":{"secs":-1,"nanos":0}}',
     "$.export_interval.secs", "expected an integer in"),
    (timedelta, '{"secs":1,"nanos":4294967296}', "$.nanos", "expected an integer in"),
    (timedelta, '{"secs":86400000000000,"nanos":0}', "$.secs", "longer than"),
    (timedelta, '{"secs":1}', "$", "secs"),
    (timedelta, "1.5", "$", "secs"),
    (datetime, '"2026-01-02"', "$", "no RFC 3339 time"),
    (datetime, '"2026-01-02T03:04:05"', "$", "no RFC 3339 time"),
    (datetime, '"2026-02-30T03:04:05Z"', "$", "no calendar day"),
    (datetime, '"2026-01-02T03:04:60Z"', "$", "no calendar day"),
    (datetime, '"2026-01-02T03:04:05+24:00"', "$", "no calendar day"),
    (datetime, '"0001-01-01T00:00:00+01:00"', "$", "no calendar day"),
    (datetime, '"２026-01-02T03:04:05Z"', "$", "no RFC 3339 time"),
    (datetime, "0", "$", "expected an RFC 3339 time"),
    (RopeScaling, '{"type":"linear","rope_type":"linear","factor":1}', "$", "are the same field"),
    (int | str, "1", "$", "a choice of several types"),
]  # fmt: skip


@pytest.mark.clause("TY-JSON-15", "TY-JSON-16")
@pytest.mark.parametrize(
    ("kind", "text", "path", "reason"), WRONG, ids=lambda part: part if isinstance(part, str) else ""
)
def test_wrong_values_are_refused_at_their_place(kind: Any, text: str, path: str, reason: str) -> None:
    refused(kind, text, path, reason)


@pytest.mark.clause("TY-JSON-16")
def test_the_path_leads_through_lists_maps_and_variants() -> None:
    tree = to_jsonable([INFO] * 4, list[ModelInfo])
    tree[3]["device"] = {"CUDA": 1.5}
    with pytest.raises(SerializationError) as caught:
        from_jsonable(dict[str, list[ModelInfo]], {"models": tree}, path="config.json")
    assert caught.value.path == "config.json.models[3].device.CUDA"
    assert "from_json" in str(caught.value)
    assert "config.json.models[3].device.CUDA: got the number 1.5, expected an integer" in caught.value.message


TEXT_LEVEL = [
    ("", "$", "not JSON"),
    ("{", "$", "not JSON: .* line 1, column 2"),
    ('{"a":1,}', "$", "not JSON"),
    ("[1] 2", "$", "not JSON"),
    ("'a'", "$", "not JSON"),
    ('"\n"', "$", "not JSON"),
    ("\ufeff1", "$", "not JSON"),
    ("NaN", "$", "NaN is no JSON number"),
    ('{"a":[0,-Infinity]}', "$.a[1]", "-Infinity is no JSON number"),
    ('{"a":[1e999]}', "$.a[0]", "beyond the range of float64"),
    ("9" * 5000, "$", "beyond the range of float64"),
    ("-" + "9" * 400, "$", "beyond the range of float64"),
    ('{"a":{"b":1,"b":2}}', "$.a", "the key 'b' stands there twice"),
    ('{"a":"\\ud800"}', "$.a", "half of a surrogate pair"),
    ('{"\\udc00":1}', "$", "half of a surrogate pair"),
    ("[" * 128 + "]" * 128, "$", "deeper than 127"),
    ("[" * 100000, "$", "deeper than 127|not JSON"),
    ('{"a":' * 100000, "$", "deeper than 127|not JSON"),
]


@pytest.mark.clause("TY-JSON-17")
@pytest.mark.parametrize(("text", "path", "reason"), TEXT_LEVEL, ids=lambda part: part[:20])
def test_texts_that_python_reads_and_upstream_does_not(text: str, path: str, reason: str) -> None:
    refused(Any, text, path, reason)


@pytest.mark.clause("TY-JSON-17")
def test_the_deepest_text_that_upstream_reads() -> None:
    assert from_json(Any, "[" * 127 + "]" * 127) is not None
    deep: Any = []
    for _ in range(127):
        deep = [deep]
    with pytest.raises(SerializationError, match="deeper than 127"):
        to_json(deep)
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(SerializationError, match="deeper than 127"):
        to_json(cycle)


@pytest.mark.clause("TY-JSON-17")
@pytest.mark.parametrize("text", [None, b"1", 1, {}])
def test_what_is_no_text_is_refused(text: Any) -> None:
    refused(Any, text, "$", "expected JSON text")


@pytest.mark.clause("TY-JSON-18")
def test_unknown_keys_are_skipped_on_request_as_upstream_does() -> None:
    known = '"max_batch_size":1,"max_wait_ms":2,"enable_dynamic":true,"enable_continuous":false'
    text = f'{{{known},"max_num_batched_tokens":9}}'
    refused(BatchConfig, text, "$.max_num_batched_tokens", "BatchConfig has no key")
    assert from_json(BatchConfig, text, ignore_unknown=True) == BatchConfig(1, 2, True, False)
    assert from_json(ResponseFormat, '{"type":"Text","x":1}', ignore_unknown=True) == ResponseFormat.Text
    refused(BatchConfig, text.replace(":9", ':9,"x":NaN'), "$.x", "NaN", ignore_unknown=True)


def changed(**fields: Any) -> InferenceRequest:
    base = InferenceRequest.new("p", "m")
    for name, value in fields.items():
        object.__setattr__(base, name, value)
    return base


UNWRITABLE: list[tuple[Any, str, str]] = [
    (changed(prompt=5), "$.prompt", "expected a text"),
    (changed(prompt="\ud800"), "$.prompt", "surrogate"),
    (changed(created_at=datetime(2026, 1, 1)), "$.created_at", "a time with its zone"),
    (changed(metadata={"a": {1: 2}}), "$.metadata.a", "a text as key"),
    (changed(metadata={"a": [object()]}), "$.metadata.a[0]", "a plain JSON value"),
    (changed(metadata={"a": 2**64}), "$.metadata.a", "expected an integer in"),
    (changed(metadata={"a": {"b": b"x"}}), "$.metadata.a.b", "a plain JSON value"),
    (changed(metadata={"\udc00": 1}), "$.metadata", "surrogate"),
    (changed(stream=1), "$.stream", "true or false"),
    (changed(client_id="c"), "$.client_id", "expected a ClientId"),
    (changed(model_id=RequestId.new()), "$.model_id", "expected a ModelId"),
    (changed(priority=1), "$.priority", "expected a Priority"),
    (changed(sampling_params=None), "$.sampling_params", "expected a SamplingParams"),
    (SamplingParams(temperature="hot"), "$.temperature", "expected a number"),  # type: ignore[arg-type]
    (SamplingParams(temperature=1e39), "$.temperature", "beyond the range of float32"),
    (SamplingParams(stop_sequences="ab"), "$.stop_sequences", "expected a list"),  # type: ignore[arg-type]
    (MonitoringConfig(export_interval=timedelta(-1)), "$.export_interval", "a duration >= 0"),
    (SystemInfo(devices=["cpu"]), "$.devices[0]", "expected a Device"),  # type: ignore[list-item]
]


@pytest.mark.clause("TY-JSON-19")
@pytest.mark.parametrize(
    ("value", "path", "reason"), UNWRITABLE, ids=lambda part: part if isinstance(part, str) else ""
)
def test_values_that_do_not_hold_what_they_say_are_not_written(value: Any, path: str, reason: str) -> None:
    with pytest.raises(SerializationError, match=reason) as caught:
        to_json(value)
    assert caught.value.path == path


@pytest.mark.clause("TY-JSON-19")
def test_numbers_of_numpy_are_numbers() -> None:
    params = SamplingParams(top_k=np.int64(4), temperature=np.float32(0.1))  # type: ignore[arg-type]
    assert '"temperature":0.1,' in to_json(params)
    assert from_json(SamplingParams, to_json(params)).top_k == 4


@pytest.mark.clause("TY-JSON-16")
def test_no_error_quotes_a_text_that_may_be_a_secret() -> None:
    for kind, text in (
        (ModelSource, '{"Url":{"url":"u","headers":{"h":["hunter2"]}}}'),
        (TokenId, '"hunter2"'),
        (RequestId, '"hunter2"'),
        (ErrorEvent, '"hunter2"'),
    ):
        with pytest.raises(SerializationError) as caught:
            from_json(kind, text)
        assert "hunter2" not in str(caught.value)


@dataclass(frozen=True)
class HoldsACallable:
    """Not a type of the contracts."""

    name: str
    call: Callable[[int], int]


@dataclass(frozen=True)
class HoldsItself:
    """A record of its own kind inside."""

    inner: HoldsItself | None


@pytest.mark.clause("TY-JSON-13")
@pytest.mark.parametrize("kind", [HoldsACallable, np.ndarray, Callable, threading.Lock, object(), 5, "int", complex])
def test_types_without_a_form_are_refused_by_name(kind: Any) -> None:
    with pytest.raises(SerializationError):
        from_json(kind, "{}")
    if kind is HoldsACallable:
        with pytest.raises(SerializationError, match=r"HoldsACallable.call cannot be serialised: .*Callable"):
            to_json(HoldsACallable("x", abs))


@pytest.mark.clause("TY-JSON-20")
def test_records_outside_the_contracts_follow_the_same_rules() -> None:
    value = HoldsItself(HoldsItself(None))
    assert to_json(value) == '{"inner":{"inner":null}}'
    assert from_json(HoldsItself, to_json(value)) == value
    deep: Any = None
    for _ in range(100000):
        deep = {"inner": deep}
    with pytest.raises(SerializationError):
        from_jsonable(HoldsItself, deep)


@pytest.mark.clause("TY-JSON-20")
def test_threads_share_one_codec() -> None:
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(to_json(EngineConfig()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(texts)) == 1
    assert from_json(EngineConfig, texts[0]) == EngineConfig()


@pytest.mark.clause("TY-JSON-15")
def test_records_that_refuse_a_value_refuse_it_in_json_too() -> None:
    assert from_json(SpecialTokens, "{}") == SpecialTokens()
    refused(SpecialTokens, '{"eos_token":-1}', "$.eos_token", "TokenId")
    status = '{"is_ready":true,"loaded_models":["a",1]}'
    refused(EngineStatus, status, "$.loaded_models[1]", "expected a text")
    refused(SystemMetrics, '{"cpu_usage_percent":1,"memory_usage":5}', "$.memory_usage", "an object")
