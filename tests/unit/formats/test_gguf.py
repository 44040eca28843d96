"""The GGUF reader against files of ggml's own writer, its own reader, and headers that lie."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from ferrum_ref.errors import FerrumIOError, InvalidFormatError, NotFoundError, UnsupportedError
from ferrum_ref.formats.gguf import GgufFile, is_gguf


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def row(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def image(
    pairs: list[bytes] = [],  # noqa: B006  never changed
    rows: list[bytes] = [],  # noqa: B006
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
    magic: bytes = b"GGUF",
    counts: tuple[int, int] | None = None,
) -> bytes:
    """The bytes of a GGUF file, written independently of reader and writer."""
    num_tensors, num_pairs = counts or (len(rows), len(pairs))
    head = magic + struct.pack("<IQQ", version, num_tensors, num_pairs) + b"".join(pairs) + b"".join(rows)
    return head + b"\x00" * (-len(head) % alignment) + data


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file of every value type and several tensors, by ggml's writer."""
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -100)
    writer.add_uint16("a.u16", 60000)
    writer.add_int16("a.i16", -30000)
    writer.add_uint32("a.u32", 2**32 - 1)
    writer.add_int32("a.i32", -(2**31))
    writer.add_uint64("a.u64", 2**64 - 1)
    writer.add_int64("a.i64", -(2**63))
    writer.add_float32("a.f32", 0.1)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "Grüße 🙂")
    writer.add_array("a.texts", ["", "a", "ẞ"])
    writer.add_array("a.ints", [-1, 2, 3])
    writer.add_array("a.floats", [0.5, 1.5])
    writer.add_array("a.bools", [True, False])
    writer.add_array("a.nested", [[1, 2], [3, 4]])
    rng = np.random.default_rng(0)
    writer.add_tensor("plain", rng.standard_normal((3, 5)).astype(np.float32))
    writer.add_tensor("half", rng.standard_normal((2, 3, 4)).astype(np.float16))
    packed = gguf.quantize(rng.standard_normal((4, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.clause("MD-GGUF-1", "MD-GGUF-3")
def test_metadata_of_every_type(written: Path) -> None:
    with GgufFile(written) as file:
        found = file.metadata
        assert file.version == 3
        assert found["general.architecture"] == "llama"
        expected: dict[str, Any] = {
            "a.u8": 200,
            "a.i8": -100,
            "a.u16": 60000,
            "a.i16": -30000,
            "a.u32": 2**32 - 1,
            "a.i32": -(2**31),
            "a.u64": 2**64 - 1,
            "a.i64": -(2**63),
            "a.f32": float(np.float32(0.1)),
            "a.f64": 0.1,
            "a.bool": True,
            "a.string": "Grüße 🙂",
            "a.texts": ("", "a", "ẞ"),
        }
        assert {key: found[key] for key in expected} == expected
        assert [type(found[key]) for key in expected] == [type(value) for value in expected.values()]
        assert np.asarray(found["a.ints"]).tolist() == [-1, 2, 3]
        assert np.asarray(found["a.floats"]).tolist() == [0.5, 1.5]
        assert np.asarray(found["a.bools"]).tolist() == [True, False]
        assert [np.asarray(each).tolist() for each in found["a.nested"]] == [[1, 2], [3, 4]]  # type: ignore[union-attr]


@pytest.mark.clause("MD-GGUF-4", "MD-GGUF-5", "MD-GGUF-7")
def test_tensors_as_ggmls_reader_sees_them(written: Path) -> None:
    reference = {tensor.name: tensor for tensor in gguf.GGUFReader(written).tensors}
    with GgufFile(written) as file:
        assert list(file.tensors) == list(reference)
        for name, tensor in file.tensors.items():
            theirs = reference[name]
            assert tensor.shape == tuple(int(size) for size in theirs.shape)[::-1]
            assert tensor.type_label == theirs.tensor_type.name
            assert (tensor.offset_bytes, tensor.num_bytes) == (theirs.data_offset, theirs.n_bytes)
            packed = file.packed(name)
            assert not packed.flags.writeable
            assert packed.tobytes() == theirs.data.tobytes()


@pytest.mark.clause("MD-GGUF-1")
def test_version_2_and_closing(tmp_path: Path) -> None:
    path = tmp_path / "v2.gguf"
    path.write_bytes(image(rows=[row("w", (4,), 0, 0)], data=b"\x01" * 16, version=2))
    file = GgufFile(path)
    view = file.packed("w")
    file.close()
    file.close()
    assert view.tobytes() == b"\x01" * 16
    with pytest.raises(FerrumIOError, match="the file was closed"):
        file.packed("w")


@pytest.mark.clause("MD-GGUF-1", "MD-GGUF-7")
def test_what_is_not_there(tmp_path: Path, written: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        GgufFile(tmp_path / "absent.gguf")
    with pytest.raises(FerrumIOError):
        GgufFile(tmp_path)
    with GgufFile(written) as file, pytest.raises(NotFoundError, match="tensor 'absent'"):
        file.packed("absent")
    assert is_gguf(written)
    assert not is_gguf(tmp_path / "absent.gguf")


U32, U64 = 4, 10
LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "file: got 0 bytes"),
    "magic": (image(magic=b"GGML"), "magic: got b'GGML', expected b'GGUF'"),
    "version 1": (image(version=1), "version: got 1, expected 2 or 3"),
    "version 4": (image(version=4), "version: got 4"),
    "header cut": (image()[:20], "got 1 x 8 bytes, expected at most the 4 left"),
    "tensor count": (image(counts=(2**60, 0)), "number of tensors: got 1152921504606846976 x 32 bytes"),
    "pair count": (image(counts=(0, 2**64 - 1)), "number of metadata pairs"),
    "key length": (image([struct.pack("<Q", 2**63) + bytes(9)]), "metadata key 0"),
    "key twice": (image([pair("k", 0, b"\x01")] * 2), "metadata key 1: got 'k', expected a new name"),
    "key empty": (image([pair("", 0, b"\x01")]), "metadata key 0: got ''"),
    "value type": (image([pair("k", 13, b"\x01")]), "k: value type: got 13"),
    "bool": (image([pair("k", 7, b"\x02")]), "k: got a boolean byte"),
    "string": (image([pair("k", 8, text(b"\xff\xfe"))]), "bytes that are not UTF-8"),
    "array length": (image([pair("k", 9, struct.pack("<IQ", 6, 2**61))]), "k: got 2305843009213693952 x 4 bytes"),
    "texts length": (image([pair("k", 9, struct.pack("<IQ", 8, 2**40))]), "k: got 1099511627776 x 8 bytes"),
    "array type": (image([pair("k", 9, struct.pack("<IQ", 77, 1))]), "k: value type: got 77"),
    "nesting": (
        image([pair("k", 9, struct.pack("<IQ", 9, 1) * 6 + struct.pack("<IQB", 0, 1, 1))]),
        "arrays nested deeper than 4",
    ),
    "alignment 0": (image([pair("general.alignment", U32, struct.pack("<I", 0))]), "general.alignment: got 0"),
    "alignment 48": (image([pair("general.alignment", U32, struct.pack("<I", 48))]), "got 48, expected a power of two"),
    "alignment text": (image([pair("general.alignment", 8, text("32"))]), "general.alignment: got 32"),
    "no dimension": (image(rows=[row("w", (), 0, 0)]), "w: number of dimensions: got 0, expected 1 to 4"),
    "5 dimensions": (image(rows=[row("w", (1, 1, 1, 1, 1), 0, 0)], data=b"\x00" * 4), "number of dimensions: got 5"),
    "zero dimension": (image(rows=[row("w", (4, 0), 0, 0)]), r"w: shape: got \[0, 4\]"),
    "absurd shape": (image(rows=[row("w", (2**62, 2**62), 0, 0)]), "w: data: got bytes"),
    "type": (image(rows=[row("w", (4,), 5, 0)], data=b"\x00" * 16), "tensor w: type: got 5, expected a ggml type"),
    "part of a block": (
        image(rows=[row("w", (33,), 2, 0)], data=b"\x00" * 64),
        "33 elements, expected a multiple of 32",
    ),
    "beyond the file": (image(rows=[row("w", (5,), 0, 0)], data=b"\x00" * 19), "end within the file's 83 bytes"),
    "offset beyond": (image(rows=[row("w", (4,), 0, 2**63)], data=b"\x00" * 16), "w: data: got bytes"),
    "offset odd": (
        image(rows=[row("w", (4,), 0, 4)], data=b"\x00" * 32),
        "w: offset: got 4, expected a multiple of 32",
    ),
    "name twice": (image(rows=[row("w", (4,), 0, 0), row("w", (4,), 0, 32)], data=b"\x00" * 64), "got 'w'"),
    "overlap": (
        image(rows=[row("v", (16,), 0, 0), row("w", (4,), 0, 32)], data=b"\x00" * 64),
        "tensor w: offset: got 128, expected 160 or more, behind v",
    ),
    "one line": (image([pair("a\nb", 7, b"\x07")]), "a.nb"),
}


@pytest.mark.clause("MD-GGUF-2", "MD-GGUF-3", "MD-GGUF-4", "MD-GGUF-5", "MD-GGUF-6")
@pytest.mark.parametrize("name", LIES)
def test_lies_are_named(name: str, tmp_path: Path) -> None:
    content, message = LIES[name]
    path = tmp_path / "lie.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidFormatError, match=message) as caught:
            GgufFile(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert peak_bytes < 2**20


@pytest.mark.clause("MD-GGUF-2")
def test_big_endian_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    with pytest.raises(UnsupportedError, match="big-endian"):
        GgufFile(path)


@pytest.mark.clause("MD-GGUF-6")
def test_gaps_and_any_order_are_allowed(tmp_path: Path) -> None:
    path = tmp_path / "gap.gguf"
    data = np.arange(64, dtype=np.float32)
    path.write_bytes(image(rows=[row("late", (4,), 0, 128), row("early", (4,), 0, 0)], data=data.tobytes()))
    with GgufFile(path) as file:
        assert file.packed("late").view("<f4").tolist() == [32, 33, 34, 35]
        assert file.packed("early").view("<f4").tolist() == [0, 1, 2, 3]


@pytest.mark.clause("MD-GGUF-5")
def test_alignment_of_the_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "aligned.gguf"
    pairs = [pair("general.alignment", U32, struct.pack("<I", 256))]
    path.write_bytes(image(pairs, [row("w", (2,), 0, 0)], struct.pack("<2f", 1, 2), alignment=256))
    with GgufFile(path) as file:
        assert file.tensors["w"].offset_bytes == 256
        assert file.packed("w").view("<f4").tolist() == [1, 2]


@pytest.mark.clause("MD-GGUF-1", "MD-GGUF-7")
@pytest.mark.model
def test_the_real_file_as_ggmls_reader_sees_it(smollm2_path: Path) -> None:
    reference = gguf.GGUFReader(smollm2_path)
    with GgufFile(smollm2_path) as file:
        for tensor in reference.tensors:
            ours = file.tensors[tensor.name]
            assert (ours.offset_bytes, ours.num_bytes) == (tensor.data_offset, tensor.n_bytes)
            assert ours.shape == tuple(int(size) for size in tensor.shape)[::-1]
        assert file.metadata["tokenizer.ggml.tokens"] == tuple(reference.fields["tokenizer.ggml.tokens"].contents())
