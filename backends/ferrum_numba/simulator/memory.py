"""Arrays inside a kernel: bounds are checked, and who touched which element since the last barrier is remembered.

Two accesses to one element by different threads, at least one of them a write that is not atomic with the other, are a
race unless a barrier lies between: `syncthreads` for threads of a block, `syncwarp` for lanes of a warp, the end of the
launch for different blocks. In global memory a write after another thread's read is not looked for; another schedule
shows it as a read after the write.   Clauses: BK-CUDASIM-5..8 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferrum_numba.simulator.moment import Clock, Moment
from ferrum_ref.errors import BackendError


class CheckedArray:
    """An array as kernels see it.  `starts_written`: its elements hold values from the start (global memory)."""

    __slots__ = (
        *("_atomics", "_clock", "_data", "_name", "_other_readers", "_readers", "_starts_written", "_writers"),
        *("address", "shape", "size"),
    )

    def __init__(
        self, data: NDArray[Any], name: str, clock: Clock, starts_written: bool, address: int | None = None
    ) -> None:
        """`address`: where the array starts in bytes, as far as its alignment goes; by default its place in the memory
        that it is a view of, which starts aligned."""
        self._data = data.reshape(-1)
        self.address = place_in_memory(data) if address is None else address
        self._name, self._clock, self._starts_written = name, clock, starts_written
        self._writers: dict[int, Moment] = {}  # the last write of each element, and the last atomic one
        self._atomics: dict[int, Moment] = {}
        self._readers: dict[int, Moment] = {}  # the last read, and the last by another thread before that
        self._other_readers: dict[int, Moment] = {}
        self.shape, self.size = data.shape, data.size

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._data.dtype

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, index: Any) -> Any:
        place, now = self._place(index), self._clock.moment
        writer = self._writers.get(place)
        if writer is not None and writer is not now:
            self._check(writer, now, place, "wrote")
        if self._atomics and place in self._atomics:
            self._check(self._atomics[place], now, place, "wrote")
        if self._starts_written:
            return self._data[place]
        if writer is None:
            self._check_written(place, now)
        reader = self._readers.get(place)
        if reader is not now:
            if reader is not None and reader.thread != now.thread:
                self._other_readers[place] = reader
            self._readers[place] = now
        return self._data[place]

    def __setitem__(self, index: Any, value: Any) -> None:
        place, now = self._place(index), self._clock.moment
        self._check(self._writers.get(place, now), now, place, "wrote")
        self._check(self._atomics.pop(place, now), now, place, "wrote")
        self._check_readers(place, now)
        self._writers[place] = now
        self._data[place] = value

    def pack(self, index: Any, count: int, alignment: int) -> tuple[Any, ...]:
        """`count` neighbours from `index` on in one access; the first lies on a multiple of `alignment` bytes.

        [BK-CUDASIM-11]
        """
        first = self._aligned(index, alignment)
        return tuple(self[first + offset] for offset in range(count))

    def store_pack(self, index: Any, values: Sequence[Any], alignment: int) -> None:
        """The same, written."""
        first = self._aligned(index, alignment)
        for offset, value in enumerate(values):
            self[first + offset] = value

    def _aligned(self, index: Any, alignment: int) -> int:
        first = operator.index(index)
        address = self.address + first * self._data.dtype.itemsize
        if address % alignment:
            raise BackendError(
                f"{self._clock.moment.place}: {self._name}[{first}] lies {address % alignment} bytes beyond a multiple "
                f"of {alignment}, expected an aligned address; ask before with is_aligned"
            )
        return first

    def update(self, index: Any, function: Callable[[Any], Any]) -> Any:
        """The element before it is atomically replaced by `function` of it."""
        place, now = self._place(index), self._clock.moment
        self._check(self._writers.get(place, now), now, place, "wrote")
        self._check_written(place, now)
        self._check_readers(place, now)
        self._atomics[place] = now
        old = self._data[place]
        self._data[place] = function(old)
        return old

    def _check(self, earlier: Moment, now: Moment, place: int, did: str) -> None:
        if not earlier.precedes(now):
            what = f"is touched while {earlier.actor} {did} it with no barrier between: a race"
            raise self._fault(now, place, what, "put a barrier between, or use an atomic operation")

    def _check_readers(self, place: int, now: Moment) -> None:
        for readers in (self._readers, self._other_readers):
            if place in readers:
                self._check(readers.pop(place), now, place, "read")

    def _check_written(self, place: int, now: Moment) -> None:
        if not (self._starts_written or place in self._writers or place in self._atomics):
            raise self._fault(now, place, "is read before anything was written to it", "write it, then a barrier")

    def _place(self, index: Any) -> int:
        shape = self.shape
        if len(shape) == 1 and type(index) is not tuple and 0 <= index < shape[0]:
            return operator.index(index)
        if (
            len(shape) == 2
            and type(index) is tuple
            and len(index) == 2
            and 0 <= index[0] < shape[0]
            and 0 <= index[1] < shape[1]
        ):
            return operator.index(index[0] * shape[1] + index[1])
        return self._any_place(index)

    def _any_place(self, index: Any) -> int:
        """The same for any number of axes, and for what lies outside."""
        indices = index if isinstance(index, tuple) else (index,)
        inside = len(indices) == len(self.shape)
        place = 0
        for one, dim in zip(indices, self.shape, strict=False):
            inside = inside and 0 <= one < dim
            place = place * dim + operator.index(one)
        if not inside:
            shown = ", ".join(str(one) for one in indices)
            raise BackendError(
                f"{self._clock.moment.place}: {self._name}[{shown}] is out of bounds, expected indices within "
                f"{tuple(self.shape)}, none negative; guard the access"
            )
        return place

    def _fault(self, now: Moment, place: int, what: str, remedy: str) -> BackendError:
        where = ", ".join(str(int(one)) for one in np.unravel_index(place, self.shape))
        return BackendError(f"{now.place}: {self._name}[{where}] {what}; {remedy}")


class LocalArray(CheckedArray):
    """An array of one thread: nobody races for it, so that only bounds and what was written are looked after."""

    __slots__ = ("_is_written",)

    def __init__(self, data: NDArray[Any], name: str, clock: Clock) -> None:
        super().__init__(data, name, clock, starts_written=False, address=0)
        self._is_written = np.zeros(data.size, np.bool_)

    def __getitem__(self, index: Any) -> Any:
        place = self._place(index)
        if not self._is_written[place]:
            self._check_written(place, self._clock.moment)
        return self._data[place]

    def __setitem__(self, index: Any, value: Any) -> None:
        place = self._place(index)
        self._is_written[place] = True
        self._data[place] = value

    def pack(self, index: Any, count: int, alignment: int) -> tuple[Any, ...]:
        if index + count > self.size or not self._is_written[index : index + count].all():
            return super().pack(index, count, alignment)
        self._aligned(index, alignment)
        return tuple(self._data[index : index + count])

    def store_pack(self, index: Any, values: Sequence[Any], alignment: int) -> None:
        if index + len(values) > self.size:
            super().store_pack(index, values, alignment)
        self._aligned(index, alignment)
        self._is_written[index : index + len(values)] = True
        self._data[index : index + len(values)] = values


def place_in_memory(data: NDArray[Any]) -> int:
    """Bytes between the start of the array that owns the memory and the start of this view of it. Pure."""
    owner = data
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return int(data.__array_interface__["data"][0]) - int(owner.__array_interface__["data"][0])


def poison(shape: Any, dtype: Any) -> NDArray[Any]:
    """An array of NaN, or of the largest integer: what memory holds that nobody has written. Pure."""
    kind = np.dtype(dtype)
    return np.full(shape, np.nan if kind.kind == "f" else True if kind.kind == "b" else np.iinfo(kind).max, kind)
