"""What every format offers once it is open: tensors by name.  Clauses: WL-CONTAINER-2..3."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from ferrum_ref.errors import NotFoundError, ResourceExhaustedError
from ferrum_ref.formats.complaint import quoted
from ferrum_ref.formats.elements import Array, StoredTensor
from ferrum_ref.interfaces.weights import WeightFormat


class Container(ABC):
    """An open set of tensors; `name` may be shown.  Safe for concurrent reads."""

    name: str
    format: WeightFormat

    @abstractmethod
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All of them, in the file's order."""

    @abstractmethod
    def read(self, name: str, limit_bytes: int) -> Array:
        """The tensor's values in the type it is stored in; packed blocks come decoded, as float32.

        Raises NotFoundError, InvalidFormatError, UnsupportedError; ResourceExhaustedError beyond `limit_bytes`.
        """

    def names(self) -> Iterable[str]:
        """The names alone, where they are cheaper to have."""
        return self.tensors()

    def extra(self) -> Mapping[str, Any]:
        """Free-form facts of the file."""
        return {}


def found(container: Container, tensors: Mapping[str, StoredTensor], name: str, limit_bytes: int) -> StoredTensor:
    """The tensor's row, small enough to be read.  [WL-LOAD-2, WL-LIMIT-1]

    Raises NotFoundError, ResourceExhaustedError.
    """
    stored = tensors.get(name)
    if stored is None:
        raise NotFoundError(f"load {container.name}: tensor {quoted(name)}: got no such name among {_sample(tensors)}")
    if stored.num_bytes > limit_bytes:
        raise ResourceExhaustedError(
            f"load {container.name}: tensor {quoted(name)}: got {stored.num_bytes} bytes, "
            f"expected at most {limit_bytes}; raise the loader's max_tensor_bytes"
        )
    return stored


def _sample(names: Iterable[str]) -> str:
    known = list(names)
    shown = ", ".join(quoted(name) for name in known[:3])
    return f"{len(known)} tensors" + (f" ({shown}{', ...' if len(known) > 3 else ''})" if known else "")
