"""A matrix as the kernels read it: as it is stored, or quantised when it is loaded.

    stored   as it lies in its tensor: float32, float16, bfloat16, or rows of ggml's blocks
    float32  the same, but packed matrices are unpacked, which is exact
    int8     one float32 scale d a row, value d q;           d = max |row| / 127, q = rint(w / d)
    q8_0     ggml blocks of 32: float16 d and 32 int8;       d = max |block| / 127, q = round(w / d)
    q4_0     ggml blocks of 32: float16 d and 16 bytes;      d = w_max / -8, q = floor(w / d + 8.5), at most 15

Source of the two block formats: ggml, quantize_row_q8_0_ref and quantize_row_q4_0_ref.
Clauses: BK-NCPU-19, BK-NCPU-22..24 (specs/backend_numba.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrum_numba.cpu.addresses import address_of
from ferrum_numba.cpu.blocks import BLOCK, Q4_0, Q8_0
from ferrum_numba.cpu.conversion import FLOAT16, FLOAT32, KINDS, run_of, widen
from ferrum_numba.cpu.matrices import MULTIPLY_ROWS, UNPACK_RUN, unpack_rows
from ferrum_numba.cpu.vector import BF16, F16, F32, I8, STORED_KINDS, unit_of
from ferrum_ref.errors import InvalidParameterError, ShapeError, UnsupportedError
from ferrum_ref.interfaces.kernel_ops import QuantScheme
from ferrum_ref.interfaces.weight_parts import WeightPart

Array = NDArray[Any]
FORMATS: Final = ("stored", "float32", "int8", "q8_0", "q4_0")
BLOCK_KINDS: Final = {"q8_0": Q8_0, "q4_0": Q4_0}
NAMES: Final = {**{kind: name for name, kind in STORED_KINDS.items()}, F32: "float32", F16: "float16", BF16: "bfloat16"}


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """`[rows, columns]` numbers of one kind; `scales` has a float32 for each row where the kind asks for them."""

    kind: int
    data: Array
    columns: int
    scales: NDArray[np.float32] | None = None

    @property
    def rows(self) -> int:
        return int(self.data.shape[0])

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def stride(self) -> int:
        """Bytes from row to row."""
        return self.data.strides[0] if self.data.size else 0

    @property
    def format_name(self) -> str:
        return NAMES.get(self.kind, "int8")

    def fields(self) -> tuple[int, int, int, int]:
        """(address, that of the routine that multiplies its rows, bytes from row to row, address of the scales)."""
        scales = 0 if self.scales is None else address_of(self.scales)
        return address_of(self.data), MULTIPLY_ROWS[self.kind].address, self.stride, scales

    def unpack(self, start: int, stop: int, out: NDArray[np.float32]) -> None:
        """out (stop - start, columns) = rows start .. stop - 1.  [BK-NCPU-22]"""
        scales = 0 if self.scales is None else address_of(self.scales) + 4 * start
        source = address_of(self.data) + start * self.stride
        run = UNPACK_RUN[self.kind].address
        unpack_rows(run, source, self.stride, scales, address_of(out), stop - start, self.columns)


def as_stored(operation: str, packed: Array, scheme: QuantScheme) -> StoredMatrix:
    """The matrix that `quantized_linear` is given, where it lies. Pure.  [BK-NCPU-22]

    Raises UnsupportedError for other schemes than rows of STORED_KINDS; ShapeError for other than uint8 rows of whole
    blocks.
    """
    kind = STORED_KINDS.get(scheme.kind)
    if kind is None or getattr(scheme, "group_size", BLOCK) != BLOCK:
        raise UnsupportedError(
            f"{operation}: scheme: got {scheme}, expected rows of {', '.join(STORED_KINDS)}, Q4_0 and Q8_0 with "
            f"group_size={BLOCK}; dequantise and call linear"
        )
    num_elements, num_bytes = unit_of(kind)
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] % num_bytes:
        raise ShapeError(
            f"{operation}: packed_weight: got {packed.dtype}{list(packed.shape)}, expected uint8 (out, in/"
            f"{num_elements}*{num_bytes}) for {scheme.kind}"
        )
    return StoredMatrix(kind, run_of(packed), packed.shape[1] // num_bytes * num_elements)


def stored_parts(parts: Sequence[WeightPart], weights_format: str) -> tuple[StoredMatrix, ...]:
    """The parts of one matrix in one of FORMATS. Pure.  [BK-NCPU-23]

    Raises what `stored` and `as_stored` raise.
    """
    found = []
    for part in parts:
        data = part.tensor.to_numpy()
        if part.scheme is None:
            found.append(stored(data, weights_format))
            continue
        matrix = as_stored("decode backend", data, part.scheme)
        if weights_format != "stored":
            values = np.empty((matrix.rows, matrix.columns), FLOAT32)
            matrix.unpack(0, matrix.rows, values)
            matrix = stored(values, weights_format)
        found.append(matrix)
    return tuple(found)


def stored(weight: Array, weights_format: str) -> StoredMatrix:
    """The dense matrix (out, in) in one of FORMATS; "stored" and "float32" keep it as it is. Pure.

    Raises InvalidParameterError for another format; ShapeError where blocks of 32 do not fit the rows.
    """
    if weights_format not in FORMATS:
        raise InvalidParameterError(
            f"decode backend: weights: got {weights_format!r}, expected one of {', '.join(FORMATS)}"
        )
    if weights_format in ("stored", "float32"):
        data = run_of(weight) if weight.dtype in KINDS else run_of(widen(weight, "decode backend"))
        return StoredMatrix(KINDS[data.dtype], data, data.shape[1])
    values = run_of(widen(weight, "decode backend"))
    if weights_format == "int8":
        return _row_scaled(values)
    if values.shape[1] % BLOCK:
        raise ShapeError(
            f"decode backend: weights: {weights_format} of a matrix {values.shape}, expected rows of whole blocks of "
            f"{BLOCK}; use int8"
        )
    pack = pack_q8_0 if weights_format == "q8_0" else pack_q4_0
    packed = pack(values.reshape(-1, BLOCK)).reshape(values.shape[0], -1)
    return StoredMatrix(BLOCK_KINDS[weights_format], packed, values.shape[1])


def _row_scaled(values: NDArray[np.float32]) -> StoredMatrix:
    scales = (np.abs(values).max(axis=1, initial=0.0) / np.float32(127)).astype(FLOAT32)
    quanta = np.rint(values * _reciprocal(scales)[:, None]).clip(-127, 127).astype(np.int8)
    return StoredMatrix(I8, quanta, values.shape[1], scales)


def pack_q8_0(blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
    """float32 (n, 32) -> uint8 (n, 34). Halves are rounded away from zero, as ggml does. Pure."""
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _reciprocal(scale)
    size = np.abs(scaled)
    quanta = np.copysign(np.floor(size) + (size - np.floor(size) >= np.float32(0.5)), scaled).astype(np.int8)
    return np.concatenate([_half_bytes(scale), quanta.view(np.uint8)], axis=1)


def pack_q4_0(blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
    """float32 (n, 32) -> uint8 (n, 18). Pure."""
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    scale = extreme / np.float32(-8)
    quanta = np.floor(blocks * _reciprocal(scale) + np.float32(8.5)).clip(0, 15).astype(np.uint8)
    half = BLOCK // 2
    return np.concatenate([_half_bytes(scale), quanta[:, :half] | (quanta[:, half:] << np.uint8(4))], axis=1)


def _reciprocal(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / scale, and 0 where that is no float32: such a block is zeros."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _half_bytes(scale: NDArray[np.float32]) -> NDArray[np.uint8]:
    with np.errstate(over="ignore", under="ignore"):
        half = scale.astype(FLOAT16)
    if not np.isfinite(half).all():
        raise InvalidParameterError(
            f"decode backend: weights: got a scale of {np.abs(scale).max():g}, expected finite numbers of at most "
            "65504; use int8"
        )
    return half.view(np.uint8)
