"""An opened model: its configuration and its tensors by canonical name, whatever the file format.

    with open_checkpoint(path) as checkpoint:
        weight = checkpoint.read("model.layers.0.self_attn.q_proj.weight")     # float32 [out, in]

Everything that can be wrong with the files is found on opening: afterwards `read` only decodes.
Clauses: MD-CKPT-1..7 (specs/model_files.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from ferrum_ref.errors import InvalidFormatError, InvalidParameterError, NotFoundError, ShapeError, UnsupportedError
from ferrum_ref.formats.gguf import is_gguf
from ferrum_ref.kernels.quant import FORMATS, decode
from ferrum_ref.models.config import DecoderConfig, quoted
from ferrum_ref.models.finite import require_finite
from ferrum_ref.models.tensor_names import LM_HEAD, embedding_name, expected_tensors

_FLOATS: Final = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A stored tensor: canonical name, shape in Hugging Face's orientation, element format, bytes on disk."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Ids that the model's author gives for generation; `eos_token_ids` all end it.  [MD-CKPT-6; D-28]"""

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None


class TensorStore(Protocol):
    """What a file format provides: the tensors it holds, by canonical name, and their packed bytes."""

    @property
    def format(self) -> str: ...

    @property
    def entries(self) -> Mapping[str, TensorEntry]: ...

    @property
    def num_bytes(self) -> int: ...

    def packed(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes, rows in canonical order: uint8 with the entry's leading dimensions."""

    def close(self) -> None: ...


class Checkpoint:
    """Configuration, tensors and generation ids of one model.  Safe for concurrent reads.  [MD-CKPT-1]"""

    def __init__(self, path: Path, config: DecoderConfig, store: TensorStore, generation: GenerationDefaults) -> None:
        """Raises InvalidFormatError unless the store holds exactly the tensors that `config` calls for."""
        self.path = path
        self.config = config
        self.generation = generation
        self._store = store
        self.tensors: Mapping[str, TensorEntry] = MappingProxyType(_matched(path, config, store))

    @property
    def format(self) -> str:
        """ "gguf" or "safetensors"."""
        return self._store.format

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight files on disk."""
        return self._store.num_bytes

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors; a tied output matrix counts once."""
        return sum(entry.num_elements for entry in self.tensors.values())

    def read(self, name: str, dtype: DTypeLike = np.float32, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """The tensor as a fresh array of `dtype`, or written into `out`.  [MD-CKPT-4, MD-CKPT-5]

        The stored number is taken exactly (packed formats: ggml's float32 value) and rounded once to `dtype`:
        float32, float64, float16 or bfloat16.  `out` must be C-contiguous, of the entry's shape and of `dtype`.
        Releases the interpreter lock while it works on large tensors.
        Raises NotFoundError (name), InvalidParameterError (dtype), ShapeError (out).
        """
        if name not in self.tensors:
            raise NotFoundError(f"read tensor {name!r}: no such tensor in {self.path}")
        kind = _float_dtype(name, dtype)
        entry = self.tensors[name]
        if out is not None and (out.shape != entry.shape or out.dtype != kind or not out.flags.c_contiguous):
            raise ShapeError(
                f"read tensor {name}: out: got {out.dtype}{list(out.shape)}, "
                f"expected C-contiguous {kind.name}{list(entry.shape)}"
            )
        packed = self._store.packed(name)
        if kind == np.float32:
            return decode(entry.dtype, packed, out)
        values = decode(entry.dtype, packed)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            if out is None:
                return values.astype(kind)
            np.copyto(out, values, casting="unsafe")
        return out

    def check_finite(self) -> None:
        """Read every tensor once, as float32.  [MD-CKPT-7]

        Raises InvalidFormatError, naming the first tensor with a NaN or an infinity, its shape and the element.
        """
        for name in self.tensors:
            require_finite(name, self.read(name))

    def close(self) -> None:
        """Release the files; arrays already read stay valid."""
        self._store.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a GGUF file, a Hugging Face directory, or a directory that holds one GGUF file.  [MD-CKPT-1, MD-CKPT-2]

    Raises NotFoundError (nothing there), InvalidFormatError (a file is not what it claims), UnsupportedError (a model
    or an element format that is not offered), FerrumIOError (operating system).
    """
    from ferrum_ref.models.gguf import open_gguf_checkpoint
    from ferrum_ref.models.hf_directory import open_hf_checkpoint

    path = Path(path)
    if path.is_dir():
        if (path / "config.json").exists():
            return open_hf_checkpoint(path)
        return open_gguf_checkpoint(only_gguf_in(path))
    if not path.exists():
        raise NotFoundError(f"open model {path}: no such file or directory")
    if path.suffix in (".safetensors", ".json") and not is_gguf(path):
        raise UnsupportedError(
            f"open model {path}: got a single file of a Hugging Face model, expected its directory {path.parent}"
        )
    return open_gguf_checkpoint(path)


def only_gguf_in(directory: Path) -> Path:
    """The one GGUF file of a directory.  Raises NotFoundError, or InvalidParameterError when there are several."""
    found = sorted(directory.glob("*.gguf"))
    if not found:
        raise NotFoundError(f"open model {directory}: got neither config.json nor a .gguf file")
    if len(found) > 1:
        names = ", ".join(each.name for each in found)
        raise InvalidParameterError(f"open model {directory}: got several GGUF files ({names}), expected one; name it")
    return found[0]


def _float_dtype(name: str, dtype: DTypeLike) -> np.dtype[Any]:
    try:
        kind = np.dtype(dtype)
    except TypeError:
        kind = np.dtype(object)
    if kind not in _FLOATS:
        expected = ", ".join(each.name for each in _FLOATS)
        raise InvalidParameterError(f"read tensor {name}: dtype: got {dtype!r}, expected one of {expected}")
    return kind


def _matched(path: Path, config: DecoderConfig, store: TensorStore) -> dict[str, TensorEntry]:
    """The store's entries in forward order; exactly those of the configuration.  [MD-CKPT-3]"""
    matched: dict[str, TensorEntry] = {}
    for name, shape in expected_tensors(config):
        entry = store.entries.get(name)
        if entry is None:
            raise InvalidFormatError(f"open model {path}: tensor {name}: got nothing, expected shape {list(shape)}")
        if entry.shape != shape:
            raise InvalidFormatError(
                f"open model {path}: tensor {name}: got shape {list(entry.shape)}, expected {list(shape)}"
            )
        if entry.dtype not in FORMATS:
            raise UnsupportedError(
                f"open model {path}: tensor {name}: got element format {entry.dtype}, "
                f"expected one of {', '.join(FORMATS)}"
            )
        matched[name] = entry
    extra = [name for name in store.entries if name not in matched]
    if extra == [LM_HEAD] and config.tie_word_embeddings:
        _require_tied(path, store, embedding_name(config))
    elif extra:
        shown = ", ".join(quoted(name) for name in extra[:3]) + (", ..." if len(extra) > 3 else "")
        raise InvalidFormatError(
            f"open model {path}: got {len(extra)} tensors that the configuration has no place for ({shown})"
        )
    return matched


def _require_tied(path: Path, store: TensorStore, embedding: str) -> None:
    """A tied model may store its output matrix once more, if it is the same one."""
    same = store.entries[LM_HEAD].dtype == store.entries[embedding].dtype and np.array_equal(
        store.packed(LM_HEAD), store.packed(embedding)
    )
    if not same:
        raise InvalidFormatError(
            f"open model {path}: tensor {LM_HEAD}: got values that differ from {embedding}, "
            "expected the same ones since tie_word_embeddings is true"
        )
