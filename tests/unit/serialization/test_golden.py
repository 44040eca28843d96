"""JSON texts written by hand, one or more for each rule of the encoding."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import FerrumError, NotFoundError, SerializationError, ShapeError
from ferrum_ref.interfaces.backend import BackendStatus
from ferrum_ref.interfaces.executor_status import ExecutorMemoryUsage, ExecutorState, ExecutorStatus
from ferrum_ref.interfaces.kv_cache import BlockTable
from ferrum_ref.interfaces.memory import MemoryHandle
from ferrum_ref.interfaces.model_builder import InitializationStrategy
from ferrum_ref.interfaces.weights import TensorTransformation, WeightFormat, WeightSource
from ferrum_ref.serialization import JsonCodec, from_json, from_jsonable, to_json, to_jsonable
from ferrum_ref.types.config import MonitoringConfig, PaddingConfig, PaddingStrategy, SchedulingPolicy
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import BatchId, ClientId, ModelId, RequestId, SessionId, TaskId, TokenId
from ferrum_ref.types.metrics import ComponentHealth, ErrorEvent, HealthStatusType, ResourceMetrics, SystemInfo
from ferrum_ref.types.models import ModelSource, ModelType, QuantizationConfig, RopeScaling, TokenUsage
from ferrum_ref.types.requests import RequestState
from ferrum_ref.types.sampling import (
    FinishReason,
    MirostatParams,
    Priority,
    ResponseFormat,
    SamplingParams,
    SpecialTokens,
)

UUID = "6fa459ea-ee8a-4ca4-894e-db77e160355e"


def both_ways(value: Any, text: str, kind: Any = None) -> None:
    wanted = type(value) if kind is None else kind
    assert to_json(value, kind) == text
    assert from_json(wanted, text) == value


@pytest.mark.clause("TY-JSON-1")
@pytest.mark.parametrize("kind", [RequestId, BatchId, SessionId, TaskId])
def test_uuid_ids_are_bare_lower_case_texts(kind: Any) -> None:
    both_ways(kind.parse(UUID), f'"{UUID}"')
    assert from_json(kind, f'"{UUID.upper()}"') == kind.parse(UUID)


@pytest.mark.clause("TY-JSON-1")
def test_other_ids_are_bare_texts_and_numbers() -> None:
    both_ways(TokenId(7), "7")
    both_ways(ModelId("a/b"), '"a/b"')
    both_ways(ClientId(""), '""')
    both_ways(MemoryHandle(12), "12")
    both_ways([TokenId(0), TokenId(2**32 - 1)], "[0,4294967295]", list[TokenId])
    assert type(from_json(TokenId, "7")) is TokenId


@pytest.mark.clause("TY-JSON-12")
def test_unit_variants_are_upstreams_names() -> None:
    for value, name in [
        (DataType.FP16, "FP16"), (FinishReason.EOS, "EOS"), (Priority.Normal, "Normal"), (Device.CPU, "CPU"),
        (Device.Metal, "Metal"), (ModelType.Llama, "Llama"), (PaddingStrategy.None_, "None"),
        (SchedulingPolicy.ContinuousBatch, "ContinuousBatch"), (RequestState.Waiting, "Waiting"),
        (WeightFormat.SafeTensors, "SafeTensors"), (InitializationStrategy.Zeros, "Zeros"),
        (HealthStatusType.Unhealthy, "Unhealthy"),
    ]:  # fmt: skip
        kind = InitializationStrategy if isinstance(value, InitializationStrategy) else type(value)
        both_ways(value, f'"{name}"', kind)


@pytest.mark.clause("TY-JSON-12")
def test_variants_with_a_payload_are_tagged_by_their_name() -> None:
    both_ways(Device.CUDA(0), '{"CUDA":0}')
    both_ways(Device.ROCm(3), '{"ROCm":3}')
    both_ways(ModelType.Custom("x"), '{"Custom":"x"}')
    both_ways(ModelType.Code("py"), '{"Code":"py"}')
    gptq = '{"GPTQ":{"bits":4,"group_size":128,"desc_act":false}}'
    both_ways(QuantizationConfig.GPTQ(4, 128, False), gptq, QuantizationConfig)
    awq = '{"AWQ":{"bits":3,"zero_point":true,"version":"gemm"}}'
    both_ways(QuantizationConfig.AWQ(3, True, "gemm"), awq, QuantizationConfig)
    both_ways(ModelSource.Local("/m"), '{"Local":"/m"}', ModelSource)
    hub = '{"HuggingFace":{"repo_id":"a/b","revision":null,"cache_dir":"c"}}'
    both_ways(ModelSource.HuggingFace("a/b", None, "c"), hub, ModelSource)
    both_ways(ModelSource.Url("u", {"h": "v"}), '{"Url":{"url":"u","headers":{"h":"v"}}}', ModelSource)
    both_ways(WeightFormat.Custom(9), '{"Custom":9}')
    memory = WeightSource.Memory(b"\x00\xff", WeightFormat.Raw)
    both_ways(memory, '{"Memory":{"data":[0,255],"format":"Raw"}}', WeightSource)
    both_ways(TensorTransformation.Reshape([2, -1]), '{"Reshape":{"shape":[2,-1]}}', TensorTransformation)
    both_ways(InitializationStrategy.Custom("x"), '{"Custom":"x"}', InitializationStrategy)
    uniform = InitializationStrategy.Uniform(-0.5, 0.1)
    both_ways(uniform, '{"Uniform":{"min":-0.5,"max":0.1}}', InitializationStrategy)


@pytest.mark.clause("TY-JSON-14")
def test_response_format_is_adjacently_tagged() -> None:
    both_ways(ResponseFormat.Text, '{"type":"Text"}')
    both_ways(ResponseFormat.JsonObject, '{"type":"JsonObject"}')
    both_ways(ResponseFormat.JsonSchema('{"a": 1}'), '{"type":"JsonSchema","schema":"{\\"a\\": 1}"}')


@pytest.mark.clause("TY-JSON-14")
def test_errors_are_tagged_with_a_message() -> None:
    assert to_json(NotFoundError("no m")) == '{"NotFound":{"message":"no m"}}'
    assert to_json(FerrumError.rate_limit("slow")) == '{"RateLimit":{"message":"slow"}}'
    assert to_json(ShapeError("s")) == '{"Backend":{"message":"s"}}'
    back = from_json(FerrumError, '{"IO":{"message":"disk"}}')
    assert (back.kind, str(back)) == ("IO", "I/O error: disk")


@pytest.mark.clause("TY-JSON-2")
def test_numbers_of_every_width() -> None:
    both_ways(MirostatParams(255, 5.0, 0.1), '{"mode":255,"tau":5.0,"eta":0.1}')
    counts = '{"prompt_tokens":1,"completion_tokens":18446744073709551615,"total_tokens":9007199254740993}'
    both_ways(TokenUsage(1, 2**64 - 1, 9007199254740993), counts)


@pytest.mark.clause("TY-JSON-3")
@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.1, "0.1"), (float(np.float32(0.1)), "0.1"), (1 / 3, "0.33333334"), (16777216.0, "16777216.0"),
        (1.0, "1.0"), (-0.0, "-0.0"), (float(np.float32(3.4028235e38)), "3.4028235e+38"), (1e-45, "1e-45"),
        (math.nan, "null"), (math.inf, "null"), (-math.inf, "null"),
    ],
)  # fmt: skip
def test_float32_is_its_shortest_text(number: float, text: str) -> None:
    written = to_json(RopeScaling("linear", number))
    assert written == f'{{"scaling_type":"linear","factor":{text}}}'
    if text != "null":
        assert np.float32(from_json(RopeScaling, written).factor) == np.float32(number)
    else:
        with pytest.raises(SerializationError) as caught:
            from_json(RopeScaling, written)
        assert caught.value.path == "$.factor"


@pytest.mark.clause("TY-JSON-3")
def test_float64_keeps_all_its_digits_and_takes_integers() -> None:
    health = ComponentHealth(HealthStatusType.Healthy, "m", {"x": 0.1 + 0.2}, datetime(2026, 1, 2, tzinfo=UTC))
    text = '{"status":"Healthy","message":"m","metrics":{"x":0.30000000000000004},"last_check":"2026-01-02T00:00:00Z"}'
    both_ways(health, text)
    assert from_json(ComponentHealth, text.replace("0.30000000000000004", "3")).metrics == {"x": 3.0}


@pytest.mark.clause("TY-JSON-3")
def test_an_optional_float_that_is_not_finite_is_lost() -> None:
    text = to_json(ResourceMetrics(gpu_utilization=math.nan))
    assert '"gpu_utilization":null' in text
    assert from_json(ResourceMetrics, text).gpu_utilization is None


@pytest.mark.clause("TY-JSON-4")
def test_texts_are_utf8_with_the_shortest_escapes() -> None:
    both_ways(ModelId('q"\\/\n\t\r\b\f\x01\x7fé漢😀'), '"q\\"\\\\/\\n\\t\\r\\b\\f\\u0001\x7fé漢😀"')
    assert from_json(ModelId, '"\\u00e9\\ud83d\\ude00"') == ModelId("é😀")


@pytest.mark.clause("TY-JSON-5")
@pytest.mark.parametrize(
    ("micros", "fraction"), [(0, ""), (5000, ".005"), (120000, ".120"), (1, ".000001"), (999999, ".999999")]
)
def test_times_are_rfc_3339_in_utc(micros: int, fraction: str) -> None:
    when = datetime(2026, 1, 2, 3, 4, 5, micros, tzinfo=UTC)
    event = ErrorEvent(when, "t", "m", None, {})
    rest = '"error_type":"t","message":"m","request_id":null,"context":{}'
    text = f'{{"timestamp":"2026-01-02T03:04:05{fraction}Z",{rest}}}'
    both_ways(event, text)
    elsewhere = ErrorEvent(when.astimezone(timezone(timedelta(hours=5, minutes=30))), "t", "m", None, {})
    assert to_json(elsewhere) == text


@pytest.mark.clause("TY-JSON-5")
@pytest.mark.parametrize(
    "text",
    [
        "2026-01-02T03:04:05Z", "2026-01-02t03:04:05z", "2026-01-02 03:04:05+00:00", "2026-01-02T08:34:05+05:30",
        "2026-01-01T21:04:05-06:00", "2026-01-02T03:04:05.000000999Z", "2026-01-02T03:04:05.0-00:00",
    ],
)  # fmt: skip
def test_times_are_read_in_any_offset_and_to_the_microsecond(text: str) -> None:
    assert from_json(datetime, f'"{text}"') == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert from_json(datetime, f'"{text}"').tzinfo is UTC


@pytest.mark.clause("TY-JSON-6")
def test_durations_are_seconds_and_nanoseconds() -> None:
    assert '"export_interval":{"secs":5,"nanos":0}' in to_json(MonitoringConfig())
    both_ways(timedelta(days=1, microseconds=3), '{"secs":86400,"nanos":3000}')
    both_ways(timedelta.max, '{"secs":86399999999999,"nanos":999999000}')
    assert from_json(timedelta, '{"secs":1,"nanos":1999}') == timedelta(seconds=1, microseconds=1)
    assert from_json(timedelta, '{"nanos":1500000000,"secs":1}') == timedelta(seconds=2.5)


@pytest.mark.clause("TY-JSON-7")
def test_plain_values_are_copied_as_they_are() -> None:
    inner = {"a": [1, 2.5, None, True, "x", {"b": []}]}
    event = ErrorEvent(datetime(2026, 1, 2, tzinfo=UTC), "t", "m", None, inner)
    written = to_jsonable(event)
    assert written["context"] == inner
    assert written["context"]["a"] is not inner["a"]
    assert from_json(Any, "[18446744073709551615, -9223372036854775808, 1e2]") == [2**64 - 1, -(2**63), 100.0]
    assert from_json(Any, "18446744073709551616") == 2.0**64
    assert math.copysign(1, from_json(Any, "-0")) == -1
    assert to_json([math.nan, (1, 2)]) == "[null,[1,2]]"


@pytest.mark.clause("TY-JSON-8")
def test_options_are_null_and_may_be_missing() -> None:
    unset = ",".join(f'"{name}_token":null' for name in ("eos", "unk", "pad", "sep", "cls", "mask"))
    both_ways(SpecialTokens(bos_token=TokenId(1)), f'{{"bos_token":1,{unset}}}')
    assert from_json(SpecialTokens, '{"bos_token": 1}') == SpecialTokens(bos_token=TokenId(1))
    assert from_json(PaddingConfig, '{"strategy":"MaxLength","token_id":0}').target_length is None
    assert from_json(dict[str, list[int] | None], '{"a": null, "b": [1]}') == {"a": None, "b": [1]}


@pytest.mark.clause("TY-JSON-9")
def test_maps_keyed_by_devices_tokens_and_ids() -> None:
    usage: dict[Device, Any] = {Device.CPU: 1, Device.CUDA(1): 2**63, Device.Metal: 0}
    status = BackendStatus(True, True, [Device.CUDA(1)], usage, 3, None, {})
    text = to_json(status)
    assert '"memory_usage":{"cpu":1,"cuda:1":9223372036854775808,"metal":0}' in text
    assert '"active_devices":[{"CUDA":1}]' in text
    assert from_json(BackendStatus, text) == status
    assert from_json(dict[Device, int], '{"CPU": 1}') == {Device.CPU: 1}
    both_ways({TokenId(5): 0.5}, '{"5":0.5}', dict[TokenId, float])
    both_ways({RequestId.parse(UUID): 1}, f'{{"{UUID}":1}}', dict[RequestId, int])
    both_ways({Priority.High: 1}, '{"High":1}', dict[Priority, int])


@pytest.mark.clause("TY-JSON-10")
def test_structs_are_objects_in_upstreams_order_and_names() -> None:
    keys = list(json.loads(to_json(SamplingParams())))
    assert keys == [
        "max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "stop_sequences", "seed", "min_p", "tfs", "typical_p", "mirostat", "response_format",
    ]  # fmt: skip
    info = '{"os":"","cpu_info":"","total_memory":0,"devices":[],"runtime_info":{"rust_version":"","engine_version":"",'
    assert to_json(SystemInfo()).startswith(info)


@pytest.mark.clause("TY-JSON-11")
def test_only_response_format_has_a_default_in_json() -> None:
    full = to_jsonable(SamplingParams())
    for key in full:
        less = {name: item for name, item in full.items() if name != key}
        if full[key] is None or key == "response_format":
            assert from_jsonable(SamplingParams, less) == SamplingParams()
        else:
            with pytest.raises(SerializationError, match=f"the key '{key}' is missing"):
                from_jsonable(SamplingParams, less)


@pytest.mark.clause("TY-JSON-11")
@pytest.mark.parametrize("key", ["scaling_type", "rope_type", "type"])
def test_rope_scaling_reads_hugging_faces_keys(key: str) -> None:
    assert from_json(RopeScaling, f'{{"{key}":"yarn","factor":4.0}}') == RopeScaling("yarn", 4.0)


@pytest.mark.clause("TY-JSON-13")
def test_monotonic_times_are_left_out() -> None:
    usage = ExecutorMemoryUsage(4, 2, 3, 50.0)
    status = ExecutorStatus(ExecutorState.Ready, True, 0, 1, 2, 0.5, 0.25, usage, 123.5)
    text = to_json(status)
    assert "last_operation" not in text
    assert from_json(ExecutorStatus, text).last_operation is None
    assert from_json(ExecutorStatus, text).memory_usage == usage


@pytest.mark.clause("TY-JSON-13")
def test_a_block_table_is_written_with_the_field_that_it_derives() -> None:
    table = BlockTable([4, 2], 20, 16)
    assert json.loads(to_json(table)) == {
        "physical_blocks": [4, 2], "logical_to_physical": [4, 2], "sequence_length": 20, "block_size": 16,
    }  # fmt: skip
    upstreams = '{"physical_blocks":[4,2],"logical_to_physical":[0,1],"sequence_length":20,"block_size":16}'
    assert from_json(BlockTable, upstreams) == table
    with pytest.raises(SerializationError, match="logical_to_physical"):
        from_json(BlockTable, '{"physical_blocks":[4,2],"sequence_length":20,"block_size":16}')


@pytest.mark.clause("TY-JSON-1")
def test_text_is_compact_or_indented_by_two() -> None:
    assert to_json(MirostatParams(1, 5.0, 0.1), pretty=True) == '{\n  "mode": 1,\n  "tau": 5.0,\n  "eta": 0.1\n}'
    codec = JsonCodec(ignore_unknown=True)
    assert codec.from_json(MirostatParams, codec.to_json(MirostatParams(1, 5.0, 0.1))) == MirostatParams(1, 5.0, 0.1)
