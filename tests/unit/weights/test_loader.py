"""SourceWeightLoader over files and memory: every format, all or nothing, names, placement, capabilities."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.numpy import save

from ferrum_ref.errors import (
    ConfigError,
    FerrumIOError,
    InvalidFormatError,
    ModelError,
    NotFoundError,
    ResourceExhaustedError,
    UnsupportedError,
)
from ferrum_ref.interfaces.weights import (
    TensorSpec,
    TensorTransformation,
    TransformationType,
    WeightFormat,
    WeightLoader,
    WeightSource,
    WeightSourceType,
)
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.weights.loader import OTHER_ELEMENTS

Make = Callable[..., Any]
MATRIX = np.random.default_rng(1).standard_normal((6, 32)).astype(np.float32)
VECTOR = np.arange(5, dtype=np.float16)


def as_npz() -> bytes:
    target = io.BytesIO()
    np.savez(target, w=MATRIX, v=VECTOR)
    return target.getvalue()


def as_npy() -> bytes:
    target = io.BytesIO()
    np.save(target, MATRIX)
    return target.getvalue()


def as_torch(legacy: bool = False) -> bytes:
    target = io.BytesIO()
    state = {"w": torch.from_numpy(MATRIX), "v": torch.from_numpy(VECTOR)}
    torch.save(state, target, _use_new_zipfile_serialization=not legacy)
    return target.getvalue()


def as_onnx() -> bytes:
    initializers = [numpy_helper.from_array(MATRIX, "w"), numpy_helper.from_array(VECTOR, "v")]
    model: onnx.ModelProto = helper.make_model(helper.make_graph([], "g", [], [], initializer=initializers))
    return model.SerializeToString()


def as_gguf(path: Path) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", MATRIX)
    writer.add_tensor("v", VECTOR)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path.read_bytes()


FORMATS: dict[str, tuple[Callable[[Path], bytes], WeightFormat]] = {
    "w.safetensors": (lambda _: save({"w": MATRIX, "v": VECTOR}, {"by": "me"}), WeightFormat.SafeTensors),
    "w.npz": (lambda _: as_npz(), WeightFormat.Numpy),
    "w.npy": (lambda _: as_npy(), WeightFormat.Numpy),
    "w.pt": (lambda _: as_torch(), WeightFormat.PyTorch),
    "w.bin": (lambda _: as_torch(legacy=True), WeightFormat.PyTorch),
    "w.onnx": (lambda _: as_onnx(), WeightFormat.Onnx),
    "w.gguf": (lambda folder: as_gguf(folder / "source.gguf"), WeightFormat.Gguf),
    "w.raw": (lambda _: MATRIX.tobytes(), WeightFormat.Raw),
}


@pytest.fixture(params=FORMATS)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, bytes, WeightFormat]:
    """A file of every format, its bytes, and the format."""
    make, kind = FORMATS[request.param]
    path = tmp_path / request.param
    path.write_bytes(make(tmp_path))
    return path, path.read_bytes(), kind


@pytest.mark.clause("WL-LOAD-1", "WL-FORMAT-1", "WL-CONTAINER-2")
def test_every_format_from_file_and_memory(stored: Any, loader: Any, spec: Make, load: Make) -> None:
    path, content, kind = stored
    for source in (WeightSource.File(str(path), None), WeightSource.Memory(content, kind)):
        np.testing.assert_array_equal(load(loader, spec(source, (6, 32))), MATRIX)
        if path.suffix not in (".npy", ".raw"):
            np.testing.assert_array_equal(load(loader, spec(source, (5,), name="v", dtype=DataType.FP16)), VECTOR)
            with pytest.raises(NotFoundError, match="tensor absent: got no such name among 2 tensors"):
                load(loader, spec(source, (5,), name="absent"))


@pytest.mark.clause("WL-META-1", "WL-META-3")
def test_metadata_of_every_format(stored: Any, loader: Any) -> None:
    path, content, kind = stored
    for source in (WeightSource.File(str(path), None), WeightSource.Memory(content, kind)):
        found = asyncio.run(loader.get_metadata(source))
        assert found.format == kind
        if path.suffix == ".raw":
            assert found.tensors == {"tensor": [MATRIX.nbytes]}
        elif path.suffix == ".npy":
            assert found.tensors == {"tensor": [6, 32]}
            assert found.dtypes == [DataType.FP32]
        else:
            assert found.tensors == {"w": [6, 32], "v": [5]}
            assert set(found.dtypes) == {DataType.FP32, DataType.FP16}
            assert found.total_size_bytes == MATRIX.nbytes + VECTOR.nbytes
        expected_extra = {"w.safetensors": {"by": "me"}, "w.gguf": {"general.architecture": "llama"}}
        assert found.extra == expected_extra.get(path.name, {})


@pytest.mark.clause("WL-FORMAT-1")
def test_content_goes_before_the_name(loader: Any, spec: Make, load: Make, tmp_path: Path) -> None:
    contents = {
        "a.bin": as_npy(),
        "b.onnx": as_torch(),
        "c.pt": as_npz(),
        "d": save({"w": MATRIX}),
        "e.npy": as_torch(True),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(
            load(loader, spec(WeightSource.File(str(tmp_path / name), None), (6, 32))), MATRIX
        )
    (tmp_path / "x.raw").write_bytes(as_npy())
    source = WeightSource.File(str(tmp_path / "x.raw"), None)
    assert load(loader, spec(source, (len(as_npy()),), dtype=DataType.UINT8)).tobytes() == as_npy()
    (tmp_path / "odd").write_bytes(b"?" * 100)
    with pytest.raises(UnsupportedError, match="neither known content nor a known ending"):
        load(loader, spec(WeightSource.File(str(tmp_path / "odd"), None), (1,)))
    with pytest.raises(UnsupportedError, match=r"got Custom\(7\)"):
        load(loader, spec(WeightSource.Memory(b"x", WeightFormat.Custom(7)), (1,)))
    with pytest.raises(UnsupportedError, match="got str, expected File"):
        load(loader, spec("a path", (1,)))


@pytest.mark.clause("WL-LOAD-2")
def test_the_sources_own_name_wins(loader: Any, spec: Make, load: Make, tmp_path: Path) -> None:
    (tmp_path / "w.npz").write_bytes(as_npz())
    source = WeightSource.File(str(tmp_path / "w.npz"), "v")
    np.testing.assert_array_equal(load(loader, spec(source, (5,), name="model.bias")), VECTOR)


@pytest.mark.clause("WL-LOAD-3", "WL-STEP-8")
def test_the_shape_must_be_the_wanted_one(stored: Any, loader: Any, spec: Make, load: Make) -> None:
    path, _, _ = stored
    source = WeightSource.File(str(path), None)
    for shape in ((6, 31), *([(32, 6, 1)] if path.suffix != ".raw" else []), (192, 2), (), (6, -32)):
        with pytest.raises(ModelError):
            load(loader, spec(source, shape))
    with pytest.raises(ModelError, match=r"shape: got \[6, 32\] after the transformations, expected \[32, 6\]"):
        load(loader, spec(WeightSource.Memory(save({"w": MATRIX}), WeightFormat.SafeTensors), (32, 6)))


@pytest.mark.clause("WL-LOAD-4", "WL-PLACE-1")
def test_type_and_device(loader: Any, spec: Make, load: Make) -> None:
    source = WeightSource.Memory(save({"w": MATRIX}), WeightFormat.SafeTensors)
    for dtype in DataType:
        if dtype is not DataType.BOOL:
            tensor = asyncio.run(loader.load_tensor(spec(source, (6, 32), dtype=dtype)))
            assert (tensor.dtype(), tensor.shape(), tensor.device()) == (dtype, (6, 32), Device.CPU)
    elsewhere = TensorSpec("w", [6, 32], DataType.FP32, Device.CUDA(3), source, [])
    with pytest.raises(ModelError, match="cuda:3"):
        load(loader, elsewhere)
    scalar = WeightSource.Memory(save({"w": np.array(2.5, np.float32)}), WeightFormat.SafeTensors)
    assert load(loader, spec(scalar, ())).shape == ()
    nan = WeightSource.Memory(save({"w": np.array([np.nan], np.float32)}), WeightFormat.SafeTensors)
    with pytest.raises(ModelError, match="NaN"):
        load(loader, spec(nan, (1,), dtype=DataType.INT8))


@pytest.mark.clause("WL-LOAD-5")
def test_all_or_nothing_in_order(loader: Any, spec: Make) -> None:
    source = WeightSource.Memory(save({"w": MATRIX, "v": VECTOR}), WeightFormat.SafeTensors)
    good = [spec(source, (5,), name="v"), spec(source, (6, 32)), spec(source, (5,), name="v", dtype=DataType.FP16)]
    found = asyncio.run(loader.load_tensors(good))
    assert [tensor.shape() for tensor in found] == [(5,), (6, 32), (5,)]
    assert asyncio.run(loader.load_tensors([])) == []
    with pytest.raises(NotFoundError, match="absent"):
        asyncio.run(loader.load_tensors([*good, spec(source, (1,), name="absent"), spec(source, (1,), name="w")]))
    with pytest.raises(ModelError):
        asyncio.run(loader.load_tensors([*good, spec(source, (1,), name="w"), spec(source, (1,), name="absent")]))


@pytest.mark.clause("WL-RAW-1", "WL-RAW-2")
def test_raw_bytes_take_shape_and_type_from_the_request(loader: Any, spec: Make, load: Make) -> None:
    step = TensorTransformation

    def raw(values: Any, shape: tuple[int, ...], *steps: Any, dtype: DataType = DataType.FP32) -> Any:
        return load(loader, spec(WeightSource.Memory(values, WeightFormat.Raw), shape, dtype=dtype, steps=steps))

    np.testing.assert_array_equal(raw(MATRIX.tobytes(), (32, 6), step.Transpose(0, 1)), MATRIX.T)
    np.testing.assert_array_equal(
        raw(MATRIX.tobytes(), (16, 12), step.Reshape([12, 16]), step.Transpose(1, 0)), MATRIX.reshape(12, 16).T
    )
    sliced = raw(MATRIX.tobytes(), (2, 32), step.Reshape([6, 32]), step.Slice(0, 4, None))
    np.testing.assert_array_equal(sliced, MATRIX[4:])
    assert raw(bytes([0x21, 0x0F]), (3,), dtype=DataType.UINT4).astype(int).tolist() == [1, 2, 15]
    assert raw(bytes([0x81, 0x0F]), (3,), dtype=DataType.INT4).astype(int).tolist() == [1, -8, -1]
    assert raw(bytes([0, 1, 2]), (3,), dtype=DataType.BOOL).tolist() == [False, True, True]
    for steps in ([step.Slice(0, 0, 1)], [step.Transpose(0, 1), step.Reshape([6, 32])]):
        with pytest.raises(ModelError, match="expected a Reshape to come first"):
            raw(MATRIX.tobytes(), (6, 32), *steps)
    with pytest.raises(ModelError, match="raw bytes: got 768, expected the 1536 of F32"):
        raw(MATRIX.tobytes(), (12, 32))


@pytest.mark.clause("WL-LOAD-6")
def test_availability_never_raises(loader: Any, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")

    def available(source: Any) -> bool:
        return bool(asyncio.run(loader.is_available(source)))

    assert available(WeightSource.File(str(tmp_path / "x"), None))
    assert available(WeightSource.File(str(tmp_path), None))
    assert available(WeightSource.Memory(b"", WeightFormat.Raw))
    for odd in (
        WeightSource.File(str(tmp_path / "y"), None),
        WeightSource.File("a\x00b", None),
        None,
        5,
        WeightSource(),
    ):
        assert not available(odd)
    assert not available(WeightSource.File("x" * 5000, None))


@pytest.mark.clause("WL-LOAD-7")
def test_preload_of_local_sources_checks_them(loader: Any, tmp_path: Path) -> None:
    asyncio.run(loader.preload(WeightSource.Memory(as_npy(), WeightFormat.Numpy)))
    with pytest.raises(NotFoundError):
        asyncio.run(loader.preload(WeightSource.File(str(tmp_path / "absent.npy"), None)))
    with pytest.raises(InvalidFormatError):
        asyncio.run(loader.preload(WeightSource.Memory(b"x", WeightFormat.Numpy)))


@pytest.mark.clause("WL-LOAD-8")
def test_capabilities(loader: Any, make_loader: Make, limits: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(loader, WeightLoader)
    found = make_loader(limits=limits(max_tensor_bytes=77)).capabilities()
    assert found.max_tensor_size == 77
    assert found.supported_sources == list(WeightSourceType)
    assert found.supported_transformations == list(TransformationType)
    assert {kind for _, kind in FORMATS.values()} == set(found.supported_formats)
    assert found.supports_streaming
    assert found.supports_concurrent
    absent = {"boto3", "onnx"}
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in absent else real(name))
    less = loader.capabilities()
    assert WeightSourceType.S3 not in less.supported_sources
    assert WeightFormat.Onnx not in less.supported_formats


@pytest.mark.clause("WL-LIMIT-1")
def test_the_largest_tensor(stored: Any, make_loader: Make, limits: Make, spec: Make, load: Make) -> None:
    path, _, _ = stored
    source = WeightSource.File(str(path), None)
    with pytest.raises(ResourceExhaustedError, match="expected at most 767"):
        load(make_loader(limits=limits(max_tensor_bytes=767)), spec(source, (6, 32)))
    assert load(make_loader(limits=limits(max_tensor_bytes=768)), spec(source, (6, 32))).shape == (6, 32)


@pytest.mark.clause("WL-LIMIT-1")
def test_packed_blocks_count_as_what_they_decode_to(
    make_loader: Make, limits: Make, spec: Make, load: Make, tmp_path: Path
) -> None:
    packed = gguf.quantize(MATRIX, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("w", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    source = WeightSource.File(str(tmp_path / "q.gguf"), None)
    expected = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(load(make_loader(), spec(source, (6, 32))), expected)
    assert asyncio.run(make_loader().get_metadata(source)).extra[OTHER_ELEMENTS] == ["Q8_0"]
    with pytest.raises(ResourceExhaustedError):
        load(make_loader(limits=limits(max_tensor_bytes=700)), spec(source, (6, 32)))


@pytest.mark.clause("WL-META-3", "WL-CONTAINER-3")
def test_types_without_a_data_type(loader: Any, spec: Make, load: Make) -> None:
    content = save({"a": np.arange(3, dtype=np.int64), "b": np.ones(2, np.float64), "c": np.ones(2, np.float32)})
    source = WeightSource.Memory(content, WeightFormat.SafeTensors)
    found = asyncio.run(loader.get_metadata(source))
    assert found.dtypes == [DataType.FP32]
    assert found.extra == {OTHER_ELEMENTS: ["F64", "I64"]}
    assert load(loader, spec(source, (3,), name="a", dtype=DataType.INT32)).tolist() == [0, 1, 2]
    header = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    odd = WeightSource.Memory(len(header).to_bytes(8, "little") + header + b"12", WeightFormat.SafeTensors)
    with pytest.raises(UnsupportedError, match="got F4"):
        load(loader, spec(odd, (4,), name="x"))


@pytest.mark.clause("WL-OPEN-1", "WL-OPEN-2")
def test_paths(loader: Any, spec: Make, load: Make, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="got a directory without any of"):
        load(loader, spec(WeightSource.File(str(tmp_path), None), (1,)))
    for name, content in (("pytorch_model.bin", as_torch()), ("model.safetensors", save({"w": MATRIX + 1}))):
        (tmp_path / name).write_bytes(content)
        found = load(loader, spec(WeightSource.File(str(tmp_path), None), (6, 32)))
        np.testing.assert_array_equal(found, MATRIX + (name == "model.safetensors"))
    for path in ("a\x00b", "x" * 5000):
        with pytest.raises(FerrumIOError):
            load(loader, spec(WeightSource.File(path, None), (1,)))


@pytest.mark.clause("WL-OPEN-4")
def test_a_file_that_changes_is_read_anew(loader: Any, spec: Make, load: Make, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for factor in (1, 2, 3):
        path.write_bytes(save({"w": MATRIX * factor}))
        found = load(loader, spec(WeightSource.File(str(path), None), (6, 32)))
        np.testing.assert_array_equal(found, MATRIX * factor)
    assert len(loader._opener._open) == 3
    for number in range(12):
        (tmp_path / f"{number}.npy").write_bytes(as_npy())
        load(loader, spec(WeightSource.File(str(tmp_path / f"{number}.npy"), None), (6, 32)))
    assert len(loader._opener._open) == 8


@pytest.mark.clause("WL-HASH-1", "WL-HASH-2")
def test_a_local_files_checksum(make_loader: Make, spec: Make, load: Make, tmp_path: Path) -> None:
    path = tmp_path / "w.npy"
    path.write_bytes(as_npy())
    with pytest.raises(InvalidFormatError, match="sha256"):
        load(make_loader(sha256={str(path): "0" * 64}), spec(WeightSource.File(str(path), None), (6, 32)))


@pytest.mark.clause("WL-DATA-4")
@pytest.mark.parametrize("name", ["max_concurrent_downloads", "download_timeout_seconds", "cache_dir"])
def test_settings_that_cannot_work(name: str, make_loader: Make) -> None:
    with pytest.raises(ConfigError, match=name):
        make_loader(**{name: "" if name == "cache_dir" else 0})


@pytest.mark.clause("WL-LIMIT-1")
def test_no_memory_is_a_named_error(loader: Any, spec: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferrum_ref.weights.loader.transformed", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(ResourceExhaustedError, match="got no memory"):
        asyncio.run(loader.load_tensor(spec(WeightSource.Memory(as_npy(), WeightFormat.Numpy), (6, 32))))


@pytest.mark.clause("WL-OPEN-5")
def test_importing_the_loader_loads_no_optional_package() -> None:
    import subprocess

    code = (
        "import sys, ferrum_ref.weights.loader\n"
        "assert not {'boto3', 'huggingface_hub', 'onnx', 'torch', 'safetensors.numpy'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
