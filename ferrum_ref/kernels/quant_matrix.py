"""Matrices [out, in] that stay in the form their file has, decoded a few rows at a time.

    RowMatrix     rows of whole blocks in a format of `quant`: ggml's, or plain numbers
    GptqMatrix    GPTQ's four tensors          AwqMatrix    AWQ's three
    GroupMatrix   INT8 or INT4 by groups       Fp8Matrix    FP8 numbers with scales

Rows start … stop of every kind are bit for bit those of decoding the whole matrix. Nothing is copied until rows are
asked for, so arrays may lie in a mapped file.  Clauses: QT-MATRIX-1..3 (specs/quant.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.kernels.quant import decode, is_finite, quant_format
from ferrum_ref.kernels.quant_awq import AwqWeights, decode_awq
from ferrum_ref.kernels.quant_gptq import GptqWeights, decode_gptq
from ferrum_ref.kernels.quant_groups import Fp8Format, GroupWeights, decode_fp8, decode_groups, fp8_block

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class QuantMatrix(ABC):
    """A packed matrix; `shape` is (out, in), `kind` what `quantized_linear` capability lists call it."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]: ...

    @property
    @abstractmethod
    def kind(self) -> str: ...

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of all its arrays."""

    @property
    def row_step(self) -> int:
        """Rows are decoded in runs that begin at a multiple of this."""
        return 1

    @abstractmethod
    def is_finite(self) -> bool:
        """True when no element is NaN or infinite; found without decoding.  Pure.  [QT-MATRIX-4]"""

    @abstractmethod
    def _rows(self, start: int, stop: int) -> Float32: ...

    def rows(self, start: int, stop: int, out: Float32 | None = None) -> Float32:
        """Rows start … stop - 1 as float32 (stop - start, in), written into `out` when it is given.  [QT-MATRIX-1]

        Raises InvalidParameterError unless 0 <= start <= stop <= out; ShapeError for an `out` that does not fit.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise InvalidParameterError(f"packed rows {start} to {stop}: expected a range within 0 to {self.shape[0]}")
        first = start // self.row_step * self.row_step
        last = min(-(-stop // self.row_step) * self.row_step, self.shape[0])
        if start == stop:
            values = np.empty((0, self.shape[1]), np.float32)
        else:
            values = self._rows(first, last)[start - first : stop - first]
        if out is None:
            return values
        if out.shape != values.shape:
            raise ShapeError(f"packed rows: out: got {list(out.shape)}, expected {list(values.shape)}")
        np.copyto(out, values)
        return out

    def at(self, ids: NDArray[Any]) -> Float32:
        """The rows of these ids, (len(ids), in) float32; only they are decoded.  [QT-MATRIX-2]

        Raises InvalidParameterError for an id outside [0, out).
        """
        found = np.empty((len(ids), self.shape[1]), np.float32)
        for place, index in enumerate(int(each) for each in ids):
            if not 0 <= index < self.shape[0]:
                raise InvalidParameterError(f"packed rows: id {index}, expected 0 <= id < {self.shape[0]}")
            self.rows(index, index + 1, found[place : place + 1])
        return found


@dataclass(frozen=True, slots=True)
class RowMatrix(QuantMatrix):
    """`packed` (out, row bytes) uint8 of `format`."""

    packed: Bytes
    format: str

    def __post_init__(self) -> None:
        """Raises ShapeError unless the rows are whole blocks."""
        if self.packed.ndim != 2 or self.packed.dtype != np.uint8 or self.packed.shape[1] % self._block_bytes:
            raise ShapeError(
                f"packed {self.format}: got {self.packed.dtype}{list(self.packed.shape)}, expected uint8 (out, a "
                f"multiple of {self._block_bytes})"
            )

    @property
    def _block_bytes(self) -> int:
        return quant_format(self.format).block_bytes

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.packed), self.packed.shape[1] // self._block_bytes * quant_format(self.format).block_elements

    @property
    def kind(self) -> str:
        return self.format.lower()

    @property
    def num_bytes(self) -> int:
        return self.packed.nbytes

    def is_finite(self) -> bool:
        return is_finite(self.format, self.packed)

    def _rows(self, start: int, stop: int) -> Float32:
        return decode(self.format, self.packed[start:stop])

    def rows(self, start: int, stop: int, out: Float32 | None = None) -> Float32:
        if out is None or not 0 <= start <= stop <= len(self.packed):
            return QuantMatrix.rows(self, start, stop, out)
        return decode(self.format, self.packed[start:stop], out)  # straight into place

    def at(self, ids: NDArray[Any]) -> Float32:
        index = np.asarray(ids, np.int64)
        if index.size and (index.min() < 0 or index.max() >= len(self.packed)):
            return QuantMatrix.at(self, ids)  # tells which
        return decode(self.format, self.packed[index])


@dataclass(frozen=True, slots=True)
class GptqMatrix(QuantMatrix):
    """GPTQ's tensors; 32 outputs at a time, so that every width begins at a whole word of zero points."""

    weights: GptqWeights

    @property
    def shape(self) -> tuple[int, int]:
        return self.weights.out_features, self.weights.in_features

    @property
    def kind(self) -> str:
        return "gptq"

    @property
    def num_bytes(self) -> int:
        stored = self.weights
        indices = 0 if stored.g_idx is None else stored.g_idx.nbytes
        return stored.qweight.nbytes + stored.qzeros.nbytes + stored.scales.nbytes + indices

    @property
    def row_step(self) -> int:
        return 32

    def is_finite(self) -> bool:
        return bool(np.isfinite(self.weights.scales).all())

    def _rows(self, start: int, stop: int) -> Float32:
        stored = self.weights
        words = slice(start * stored.bits // 32, -(-stop * stored.bits // 32))
        part = replace(
            stored,
            qweight=stored.qweight[:, start:stop],
            qzeros=stored.qzeros[:, words],
            scales=stored.scales[:, start:stop],
        )
        return decode_gptq(part)


@dataclass(frozen=True, slots=True)
class AwqMatrix(QuantMatrix):
    """AWQ's tensors; 8 outputs share a word."""

    weights: AwqWeights

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.weights.qweight.shape[1]) * 8, int(self.weights.qweight.shape[0])

    @property
    def kind(self) -> str:
        return "awq"

    @property
    def num_bytes(self) -> int:
        return self.weights.qweight.nbytes + self.weights.qzeros.nbytes + self.weights.scales.nbytes

    @property
    def row_step(self) -> int:
        return 8

    def is_finite(self) -> bool:
        return bool(np.isfinite(self.weights.scales).all())

    def _rows(self, start: int, stop: int) -> Float32:
        stored, words = self.weights, slice(start // 8, -(-stop // 8))
        part = replace(
            stored,
            qweight=stored.qweight[:, words],
            qzeros=stored.qzeros[:, words],
            scales=stored.scales[:, start:stop],
        )
        return decode_awq(part)


@dataclass(frozen=True, slots=True)
class GroupMatrix(QuantMatrix):
    """INT8 or INT4 with a scale for each row and group of inputs."""

    weights: GroupWeights

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weights.quanta.shape
        return rows, columns * (8 // self.weights.bits)

    @property
    def kind(self) -> str:
        return f"int{self.weights.bits}"

    @property
    def num_bytes(self) -> int:
        stored = self.weights
        return stored.quanta.nbytes + stored.scales.nbytes + (0 if stored.zeros is None else stored.zeros.nbytes)

    def is_finite(self) -> bool:
        return bool(np.isfinite(self.weights.scales).all())

    def _rows(self, start: int, stop: int) -> Float32:
        stored = self.weights
        zeros = None if stored.zeros is None else stored.zeros[start:stop]
        part = replace(stored, quanta=stored.quanta[start:stop], scales=stored.scales[start:stop], zeros=zeros)
        return decode_groups(part)


@dataclass(frozen=True, slots=True)
class Fp8Matrix(QuantMatrix):
    """FP8 numbers `bits` (out, in) uint8 with a scale for the tensor, for each row, or for each block."""

    bits: Bytes
    scale: NDArray[Any]
    format: Fp8Format = "e4m3"

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.bits.shape
        return rows, columns

    @property
    def kind(self) -> str:
        return "fp8"

    @property
    def num_bytes(self) -> int:
        return self.bits.nbytes + self.scale.nbytes

    @property
    def row_step(self) -> int:
        return 1 if self.scale.size == 1 else fp8_block(self.scale.shape, self.shape)[0]

    def is_finite(self) -> bool:
        name = "F8_E4M3" if self.format == "e4m3" else "F8_E5M2"
        return bool(np.isfinite(self.scale).all()) and is_finite(name, self.bits)

    def _rows(self, start: int, stop: int) -> Float32:
        if self.scale.size == 1:
            return decode_fp8(self.bits[start:stop], self.scale, self.format)
        scale, side = self.scale.reshape(len(self.scale), -1), self.row_step
        return decode_fp8(self.bits[start:stop], scale[start // side : -(-stop // side)], self.format)
