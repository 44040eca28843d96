"""What the parts of one CuPy backend share.  Clauses: BK-CUPY-2, BK-CUPY-12 (specs/backend_cupy.md)."""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ferrum_cupy.machine import STORAGE, DeviceArray, Machine
from ferrum_cupy.storage import ARRAY_TYPES, narrow, widen
from ferrum_cupy.tensor import CupyTensor
from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.kernel_ops import Ints
from ferrum_ref.types.devices import DataType

PACK_BYTES = 16
_THREADS: Final = 256
_LARGEST_COUNT: Final = 2**31 - 1 - _THREADS
_MOST_SENT: Final = 8  # of one step: ids, positions, slots, a block table, lengths, and some more
_NARROW: Final = {kind: ARRAY_TYPES[kind] for kind in (DataType.FP16, DataType.BF16)}

Sent: TypeAlias = tuple[
    tuple[int, tuple[int, ...], bytes], DeviceArray
]  # the stream's key, the numbers; where they are


class Runtime:
    """The machine, whether the backend is open, how many operations it has done, integers lately sent to the device."""

    __slots__ = ("_sent", "is_open", "machine", "num_operations")

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.is_open = True
        self.num_operations = 0
        self._sent: tuple[Sent, ...] = ()

    def take(self, operation: str, argument: str, tensor: object) -> CupyTensor:
        """The operand; counts the operation. Raises BackendError after shutdown and for another backend's tensor."""
        if not self.is_open:
            raise BackendError(f"{operation}: the cupy backend was shut down; make a new one with make_backend")
        self.num_operations += 1
        return self.beside(operation, argument, tensor)

    def beside(self, operation: str, argument: str, tensor: object) -> CupyTensor:
        """A further operand. Raises BackendError for another backend's or another device's tensor."""
        if not isinstance(tensor, CupyTensor) or tensor.machine is not self.machine:
            raise BackendError(
                f"{operation}: {argument}: got {type(tensor).__name__}, expected a tensor of this cupy backend; "
                "convert it with tensor_factory().from_numpy(tensor.to_numpy())"
            )
        return tensor

    def float_of(self, operation: str, argument: str, tensor: object) -> CupyTensor:
        """A further operand that holds floats. Raises BackendError otherwise."""
        found = self.beside(operation, argument, tensor)
        if found.kind not in STORAGE:
            raise BackendError(
                f"{operation}: {argument}: element type {found.kind.name}, expected fp32, fp16 or bf16; "
                "convert with to_dtype"
            )
        return found

    def same_float(self, operation: str, argument: str, tensor: object, like: CupyTensor) -> DeviceArray:
        """Contiguous elements in `like`'s float type: itself where it has it, else widened and rounded."""
        found = self.float_of(operation, argument, tensor)
        array = found.array
        if found.kind is not like.kind:
            array = narrow(self.machine.xp, widen(self.machine.xp, array, found.kind, operation), like.kind)
        return self.machine.xp.ascontiguousarray(array)

    def wide(self, operation: str, tensor: CupyTensor) -> DeviceArray:
        """The values as float32."""
        return widen(self.machine.xp, tensor.array, tensor.kind, operation)

    def rounded(self, values: DeviceArray, kind: DataType) -> CupyTensor:
        """float32 or float64 values as a tensor of a float type."""
        xp = self.machine.xp
        if kind in _NARROW and values.dtype == np.float32 and 0 < values.size <= _LARGEST_COUNT:
            sums, y = xp.ascontiguousarray(values), xp.empty(values.shape, _NARROW[kind])
            grid, count = (-(-values.size // _THREADS), 1, 1), np.int32(values.size)
            self.machine.launch(
                "decode", "round_sums", {"STORAGE": STORAGE[kind]}, grid, _THREADS, (sums, None, y, count)
            )
            return CupyTensor(self.machine, y, kind)
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            return CupyTensor(self.machine, narrow(xp, values, kind), kind)

    def indices(self, values: NDArray[np.int64]) -> DeviceArray:
        """Host integers on the device, to be read only.  [BK-CUPY-53]

        All layers of a model ask for the same positions, block tables and lengths: equal numbers are sent once, unless
        in another stream, which may come to read them before they are there.
        """
        key = self.machine.stream_key(), values.shape, values.tobytes()
        for known, array in self._sent:
            if known == key:
                return array
        array = self.machine.to_device(np.array(values, dtype=np.int64))
        self._sent = ((key, array), *self._sent[: _MOST_SENT - 1])
        return array


def packable(length: int, *arrays: DeviceArray) -> np.int32:
    """1 if rows of `length` elements can be moved sixteen bytes at a time, else 0. Pure."""
    size = arrays[0].itemsize
    starts = (int(a.data.ptr) if hasattr(a.data, "ptr") else int(a.ctypes.data) for a in arrays)
    return np.int32(length * size % PACK_BYTES == 0 and all(start % PACK_BYTES == 0 for start in starts))


def as_integers(operation: str, argument: str, values: Ints, ndim: int = 1) -> NDArray[np.int64]:
    """The values as an int64 array of `ndim` axes on the host, where they are checked. Pure.

    Raises InvalidParameterError unless they are integers; ShapeError for another number of axes.
    """
    array = np.asarray(values) if len(values) else np.zeros(np.shape(values), np.int64)
    if array.dtype.kind not in "iu":
        raise InvalidParameterError(f"{operation}: {argument}: got {array.dtype}, expected integers")
    if array.ndim != ndim:
        raise ShapeError(f"{operation}: {argument}: got shape {array.shape}, expected {ndim} axes")
    return array.astype(np.int64, copy=False)
