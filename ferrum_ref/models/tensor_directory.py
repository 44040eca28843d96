"""The tensors of a Hugging Face directory under canonical names, checked against what a model expects.

    with TensorDirectory(directory, expected, rename) as tensors:
        weight = tensors.read("embeddings.word_embeddings.weight")

Clauses: FM-FILES-1..3 (specs/families.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ferrum_ref.errors import InvalidFormatError, NotFoundError, ShapeError, UnsupportedError
from ferrum_ref.kernels.quant import FORMATS, decode
from ferrum_ref.models.checkpoint import TensorEntry
from ferrum_ref.models.config import quoted
from ferrum_ref.models.hf_directory import SafetensorsStore, open_safetensors

Expected = Iterable[tuple[str, tuple[int, ...]]]
Rename = Callable[[str], str | None]


class TensorDirectory:
    """Exactly the expected tensors; everything that can be wrong is found on opening.  [FM-FILES-1..3]

    Safe for concurrent reads.
    """

    def __init__(self, directory: Path, expected: Expected, rename: Rename) -> None:
        """`rename`: a stored name's canonical one, or None for a tensor that the model does not use.

        Raises NotFoundError (no weight file), InvalidFormatError (a tensor missing, foreign, twice, or of another
        shape), UnsupportedError (element format), FerrumIOError.
        """
        self._path = directory
        self._store: SafetensorsStore = open_safetensors(directory)
        try:
            self._entries = _matched(directory, expected, self._named(rename))
        except BaseException:
            self._store.close()
            raise

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors that the model uses."""
        return sum(entry.num_elements for entry in self._entries.values())

    def read(self, name: str, dtype: DTypeLike = np.float32, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """The tensor as a fresh array of a float `dtype`, or written into `out`; rounded once.  [FM-FILES-3]

        Raises NotFoundError (name), ShapeError (out).
        """
        if name not in self._entries:
            raise NotFoundError(f"read tensor {name!r}: the model in {self._path} has no such tensor")
        entry = self._entries[name]
        values = decode(entry.dtype, self._store.packed(entry.name))
        if out is not None and out.shape != entry.shape:
            raise ShapeError(f"read tensor {name}: out: got shape {list(out.shape)}, expected {list(entry.shape)}")
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            if out is None:
                return values.astype(dtype, copy=False)
            np.copyto(out, values, casting="unsafe")
        return out

    def close(self) -> None:
        """Release the files; arrays already read stay valid."""
        self._store.close()

    def __enter__(self) -> TensorDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _named(self, rename: Rename) -> dict[str, TensorEntry]:
        """Canonical name -> entry, whose own name stays the stored one."""
        named: dict[str, TensorEntry] = {}
        for stored, entry in self._store.entries.items():
            name = rename(stored)
            if name is None:
                continue
            if name in named:
                raise InvalidFormatError(
                    f"open model {self._path}: tensor {quoted(stored)}: got it again, "
                    f"expected it only as {quoted(named[name].name)}"
                )
            named[name] = entry
        return named


def _matched(path: Path, expected: Expected, found: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    matched: dict[str, TensorEntry] = {}
    for name, shape in expected:
        entry = found.get(name)
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
    foreign = [entry.name for name, entry in found.items() if name not in matched]
    if foreign:
        shown = ", ".join(quoted(name) for name in foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise InvalidFormatError(
            f"open model {path}: got {len(foreign)} tensors that the configuration has no place for ({shown})"
        )
    return matched
