"""Reading an encoder's projections and norms onto a backend.  Clauses: FM-FILES-1..3 (specs/families.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.encoder_ops import Affine, Norm

Shapes: TypeAlias = Iterator[tuple[str, tuple[int, ...]]]


class TensorSource(Protocol):
    """Tensors by canonical name, rounded once to a float `dtype`, wherever they lie."""

    def read(self, name: str, dtype: Any = ..., /) -> NDArray[Any]: ...


def affine_shapes(parts: Mapping[str, tuple[int, ...]]) -> Shapes:
    """`<part>.weight` of each given shape, and a `<part>.bias` as long as its first dimension."""
    for name, shape in parts.items():
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]


class AffineReader:
    """Projections and norms out of named tensors, on a backend."""

    def __init__(self, tensors: TensorSource, backend: ComputeBackend, element: Any, eps: float) -> None:
        self._tensors = tensors
        self._factory = backend.tensor_factory()
        self._element = element
        self._eps = eps

    def tensor(self, name: str) -> TensorRef:
        """One tensor by its canonical name."""
        return self._factory.from_numpy(self._tensors.read(name, self._element))

    def affine(self, name: str, *, bias: bool = True) -> Affine:
        """`<name>.weight` and, where there is one, `<name>.bias`."""
        return Affine(self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias") if bias else None)

    def stacked(self, names: tuple[str, ...]) -> Affine:
        """Several projections of one input as one, row below row."""
        weight, bias = (
            self._factory.from_numpy(
                np.concatenate([self._tensors.read(f"{name}.{kind}", self._element) for name in names])
            )
            for kind in ("weight", "bias")
        )
        return Affine(weight, bias)

    def norm(self, name: str) -> Norm:
        """A layer norm with weight and bias."""
        return Norm(self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias"), self._eps)
