"""Which format a file is in: by what it begins with, then by its name's ending.  Clause: WL-FORMAT-1."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.formats import gguf, npy, zip_entries
from ferrum_ref.formats.byte_source import ByteSource
from ferrum_ref.formats.complaint import quoted
from ferrum_ref.formats.zip_entries import ZipEntries
from ferrum_ref.interfaces.weights import WeightFormat
from ferrum_ref.weights import container_kinds as kinds
from ferrum_ref.weights.containers import Container

_ENDINGS: Final[Mapping[str, WeightFormat]] = MappingProxyType(
    {
        ".safetensors": WeightFormat.SafeTensors,
        ".gguf": WeightFormat.Gguf,
        ".npy": WeightFormat.Numpy,
        ".npz": WeightFormat.Numpy,
        ".pt": WeightFormat.PyTorch,
        ".pth": WeightFormat.PyTorch,
        ".bin": WeightFormat.PyTorch,
        ".ckpt": WeightFormat.PyTorch,
        ".onnx": WeightFormat.Onnx,
        ".raw": WeightFormat.Raw,
        ".dat": WeightFormat.Raw,
    }
)
_LEGACY_PICKLE: Final = re.compile(rb"\x80[\x02-\x05]\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19\.")  # torch's magic number


def format_of(source: ByteSource, file_name: str) -> WeightFormat:
    """The format; `.raw` and `.dat` are taken at their word, all else by content first.

    Raises UnsupportedError when neither content nor name says anything.
    """
    by_name = _ENDINGS.get(Path(file_name).suffix.lower())
    if by_name == WeightFormat.Raw:
        return by_name
    head = source.read(0, min(16, source.size))
    if head.startswith(gguf.MAGIC):
        return WeightFormat.Gguf
    if head.startswith(npy.MAGIC):
        return WeightFormat.Numpy
    if head.startswith(zip_entries.MAGIC):
        names = ZipEntries(source, "zip").names
        return WeightFormat.PyTorch if any(name.endswith("/data.pkl") for name in names) else WeightFormat.Numpy
    if _LEGACY_PICKLE.match(head):
        return WeightFormat.PyTorch
    if by_name is None and len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= source.size:
        return WeightFormat.SafeTensors
    if by_name is None:
        raise UnsupportedError(
            f"load {source.name}: format: got neither known content nor a known ending in {quoted(file_name)}, "
            f"expected one of {', '.join(_ENDINGS)}"
        )
    return by_name


def open_container(source: ByteSource, kind: WeightFormat, directory: Path | None) -> Container:
    """The tensors of bytes in a known format; `directory` is where an ONNX model's external data may lie.

    Raises UnsupportedError for a Custom format that this project does not know, and what the format's reader raises.
    """
    if kind == WeightFormat.SafeTensors:
        return kinds.SafetensorsContainer(source)
    if kind == WeightFormat.Gguf:
        return kinds.GgufContainer(source)
    if kind == WeightFormat.PyTorch:
        return kinds.PyTorchContainer(source)
    if kind == WeightFormat.Onnx:
        return kinds.OnnxContainer(source, directory)
    if kind == WeightFormat.Raw:
        return kinds.RawContainer(source)
    if kind == WeightFormat.Numpy:
        is_zip = source.size >= 4 and source.read(0, 4) == zip_entries.MAGIC
        return kinds.NpzContainer(source) if is_zip else kinds.NpyContainer(source)
    raise UnsupportedError(
        f"load {source.name}: format: got Custom({kind.code}), expected Custom({WeightFormat.Gguf.code}), which is GGUF"
    )
