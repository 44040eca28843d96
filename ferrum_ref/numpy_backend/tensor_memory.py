"""How much memory tensors hold, and storage that is used again.   Clauses: TN-MEMORY-1..6."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict, deque

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError, ResourceExhaustedError
from ferrum_ref.interfaces.tensor import Array, Shape, TensorMemoryManager, TensorMemoryStats, TensorRef
from ferrum_ref.numpy_backend.dtypes import FOUR_BITS, element_type
from ferrum_ref.numpy_backend.tensor import NumpyTensor, PackedTensor, check_device, tensor_of
from ferrum_ref.numpy_backend.tensor_nibbles import Nibbles
from ferrum_ref.numpy_backend.tensor_shape import check_shape, storage_bytes
from ferrum_ref.types.devices import DataType, Device

Buffer = NDArray[np.uint8]


class NumpyTensorMemoryManager(TensorMemoryManager):
    """Counts every storage once, from its making until nobody shows it; keeps what `preallocate` made for reuse.

    A storage lives as long as its tensor or any view of it. `capacity_bytes` (extension) limits live and kept storage
    together; None is no limit. Thread-safe.  [TN-MEMORY-1..6]
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        if capacity_bytes is not None and capacity_bytes < 0:
            raise InvalidParameterError(f"memory manager: capacity_bytes is {capacity_bytes}, expected 0 or more")
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._live: dict[int, weakref.ref[Array]] = {}
        self._released: deque[tuple[int, int, Buffer | None]] = deque()  # filled by the collector, emptied by us
        self._kept: defaultdict[int, list[Buffer]] = defaultdict(list)
        self._next_key = self._used_bytes = self._kept_bytes = self._peak_bytes = 0

    def adopt(self, storage: Array, buffer: Buffer | None = None) -> None:
        """Count `storage` until it is collected; then keep `buffer`, the memory behind it, for reuse.  [TN-MEMORY-2]

        Raises ResourceExhaustedError, counting nothing, if the capacity does not allow it.
        """
        with self._lock:
            self._settle()
            self._make_room(storage.nbytes)
            self._count(storage, buffer)

    def preallocate(self, shape: Shape, dtype: DataType, device: Device) -> TensorRef:
        check_device("preallocate", device)
        shape = check_shape("preallocate", shape, dtype)
        num_bytes, element = storage_bytes(shape, dtype), element_type(dtype)
        with self._lock:
            self._settle()
            buffer = self._take(num_bytes)
            storage: Buffer = np.frombuffer(buffer.data, np.uint8) if num_bytes else buffer
            self._count(storage, buffer if num_bytes else None)
        storage.fill(0)
        if element in FOUR_BITS:
            return PackedTensor(Nibbles.over(storage, shape), element)
        return NumpyTensor(storage.view(element).reshape(shape))

    def clear(self, tensor: TensorRef) -> None:
        tensor_of("clear", tensor).clear()

    def memory_stats(self) -> TensorMemoryStats:
        with self._lock:
            self._settle()
            return TensorMemoryStats(
                total_allocated=self._used_bytes + self._kept_bytes,
                used_memory=self._used_bytes,
                active_tensors=len(self._live),
                peak_memory=self._peak_bytes,
            )

    def gc(self) -> None:
        with self._lock:
            self._settle()
            self._drop_kept()

    def _count(self, storage: Array, buffer: Buffer | None) -> None:
        key, num_bytes, released = self._next_key, storage.nbytes, self._released
        self._next_key += 1
        # The collector may call back at any moment, also inside this lock: it only appends.
        self._live[key] = weakref.ref(storage, lambda _: released.append((key, num_bytes, buffer)))
        self._used_bytes += num_bytes
        self._peak_bytes = max(self._peak_bytes, self._used_bytes + self._kept_bytes)

    def _settle(self) -> None:
        while self._released:
            key, num_bytes, buffer = self._released.popleft()
            del self._live[key]
            self._used_bytes -= num_bytes
            if buffer is not None:
                self._kept[num_bytes].append(buffer)
                self._kept_bytes += num_bytes

    def _take(self, num_bytes: int) -> Buffer:
        """Memory of that size: kept, or new."""
        if self._kept[num_bytes]:
            self._kept_bytes -= num_bytes
            return self._kept[num_bytes].pop()
        self._make_room(num_bytes)
        try:
            return np.empty(num_bytes, np.uint8)
        except MemoryError:
            raise ResourceExhaustedError(f"preallocate: {num_bytes} bytes, more than this machine has free") from None

    def _make_room(self, num_bytes: int) -> None:
        if self._capacity_bytes is None or self._used_bytes + self._kept_bytes + num_bytes <= self._capacity_bytes:
            return
        self._drop_kept()
        if self._used_bytes + num_bytes > self._capacity_bytes:
            raise ResourceExhaustedError(
                f"tensor memory: {num_bytes} bytes asked for, {self._used_bytes} of {self._capacity_bytes} in use; "
                "release tensors or raise capacity_bytes"
            )

    def _drop_kept(self) -> None:
        self._kept.clear()
        self._kept_bytes = 0
