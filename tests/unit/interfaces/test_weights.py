"""The data of weight loading: names, checks, and JSON as upstream writes it."""

from __future__ import annotations

from typing import Any

import pytest

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces import weights
from ferrum_ref.interfaces.weights import (
    QuantizationConfig,
    TensorSpec,
    TensorTransformation,
    TransformationType,
    WeightFormat,
    WeightLoaderConfig,
    WeightMetadata,
    WeightSource,
    WeightSourceType,
)
from ferrum_ref.serialization import from_json, to_json
from ferrum_ref.types.devices import DataType, Device

SPEC = TensorSpec(
    "w",
    [2, 3],
    DataType.FP16,
    Device.CUDA(1),
    WeightSource.S3("b", "k", None, "http://e"),
    [TensorTransformation.Transpose(0, 1), TensorTransformation.Slice(0, None, 2), TensorTransformation.Scale(0.5)],
)
JSON: dict[str, tuple[Any, str]] = {
    "spec": (
        SPEC,
        '{"name":"w","shape":[2,3],"dtype":"FP16","device":{"CUDA":1},'
        '"source":{"S3":{"bucket":"b","key":"k","region":null,"endpoint":"http://e"}},'
        '"transformations":[{"Transpose":{"dim0":0,"dim1":1}},{"Slice":{"dim":0,"start":null,"end":2}},'
        '{"Scale":{"factor":0.5}}]}',
    ),
    "file": (WeightSource.File("p", None), '{"File":{"path":"p","tensor_name":null}}'),
    "url": (WeightSource.Url("http://h", {"a": "b"}), '{"Url":{"url":"http://h","headers":{"a":"b"}}}'),
    "hub": (
        WeightSource.HuggingFace("o/n", "f", "main", None),
        '{"HuggingFace":{"repo_id":"o/n","filename":"f","revision":"main","cache_dir":null}}',
    ),
    "memory": (
        WeightSource.Memory(b"\x00\xff", WeightFormat.Custom(7)),
        '{"Memory":{"data":[0,255],"format":{"Custom":7}}}',
    ),
    "format": (WeightFormat.SafeTensors, '"SafeTensors"'),
    "reshape": (TensorTransformation.Reshape([1, 2]), '{"Reshape":{"shape":[1,2]}}'),
    "cast": (TensorTransformation.Cast(DataType.BF16), '{"Cast":{"dtype":"BF16"}}'),
    "quantize": (
        TensorTransformation.Quantize(QuantizationConfig.GPTQ(4, 128, False)),
        '{"Quantize":{"config":{"GPTQ":{"bits":4,"group_size":128,"desc_act":false}}}}',
    ),
    "metadata": (
        WeightMetadata({"w": [2]}, WeightFormat.Raw, 8, [DataType.FP32], {"k": [1]}),
        '{"tensors":{"w":[2]},"format":"Raw","total_size_bytes":8,"dtypes":["FP32"],"extra":{"k":[1]}}',
    ),
    "source type": (WeightSourceType.HuggingFace, '"HuggingFace"'),
    "transformation type": (TransformationType.Slice, '"Slice"'),
    "config": (
        WeightLoaderConfig(True, None, 5, 2, 30, False, {"a": "b"}),
        '{"enable_caching":true,"cache_dir":null,"max_cache_size":5,"max_concurrent_downloads":2,'
        '"download_timeout_seconds":30,"enable_integrity_checks":false,"default_headers":{"a":"b"}}',
    ),
}


@pytest.mark.clause("WL-DATA-1", "WL-DATA-2", "WL-DATA-3")
@pytest.mark.parametrize("name", JSON)
def test_json(name: str) -> None:
    value, text = JSON[name]
    assert to_json(value) == text
    assert from_json(type(value), text) == value


@pytest.mark.clause("WL-DATA-2")
def test_formats() -> None:
    assert WeightFormat.Gguf == WeightFormat.Custom(int.from_bytes(b"GGUF", "little"))
    assert WeightFormat.Custom(0) != WeightFormat.Custom(1)
    for arguments in (("Custom",), ("Raw", 1), ("Zip",), ("Custom", -1), ("Custom", 2**32)):
        with pytest.raises(InvalidParameterError):
            WeightFormat(*arguments)


@pytest.mark.clause("WL-DATA-3", "WL-DATA-4")
def test_widths() -> None:
    with pytest.raises(InvalidParameterError, match="dim0"):
        TensorTransformation.Transpose(-1, 0)
    with pytest.raises(InvalidParameterError, match="bits"):
        QuantizationConfig.AWQ(256, True)
    with pytest.raises(InvalidParameterError, match="max_cache_size"):
        WeightLoaderConfig(True, None, -1, 1, 1, True, {})
    assert set(weights.__all__) <= set(vars(weights))
