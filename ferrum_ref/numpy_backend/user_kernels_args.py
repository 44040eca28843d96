"""Launch arguments become what a kernel sees: arrays, numpy scalars, shared memory.   Clauses: BK-ARG-1..6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ferrum_ref.errors import InvalidParameterError, ResourceExhaustedError
from ferrum_ref.interfaces.backend_kernels import BufferArg, KernelArg, LocalMemoryArg, ScalarArg, TensorArg
from ferrum_ref.interfaces.tensor import Array
from ferrum_ref.numpy_backend.tensor import array_of


class Arguments:
    """The arguments of one launch; each block gets shared memory of its own.  [BK-ARG-3..6]"""

    def __init__(self, args: Sequence[KernelArg], mapped: Mapping[int, memoryview]) -> None:
        """`mapped` holds the bytes behind the memory handles among the buffers, by position.

        Raises InvalidParameterError for anything but a KernelArg, a buffer without memory, or one too small.
        """
        self.num_shared_bytes = sum(arg.size for arg in args if isinstance(arg, LocalMemoryArg))
        self._values = [_value(position, arg, mapped) for position, arg in enumerate(args)]

    def __len__(self) -> int:
        return len(self._values)

    def of_block(self) -> tuple[Any, ...]:
        """What a block's threads are called with; shared memory is fresh zeros. Pure."""
        return tuple(
            np.zeros(value.size, np.uint8) if isinstance(value, LocalMemoryArg) else value for value in self._values
        )

    def release(self) -> None:
        """Let go of all memory: mapped bytes cannot be unmapped while an array shows them."""
        self._values = []

    def check_shared(self, name: str, static_bytes: int, limit_bytes: int) -> None:
        """Raises ResourceExhaustedError if a block's shared memory exceeds the limit.  [BK-ARG-6]"""
        total = static_bytes + self.num_shared_bytes
        if total > limit_bytes:
            raise ResourceExhaustedError(
                f"execute_kernel: {name}: a block needs {total} bytes of shared memory "
                f"({static_bytes} declared, {self.num_shared_bytes} in arguments), expected at most {limit_bytes}"
            )


def _value(position: int, arg: KernelArg, mapped: Mapping[int, memoryview]) -> Any:
    if isinstance(arg, TensorArg):
        return array_of(f"execute_kernel: argument {position}", arg.tensor)
    if isinstance(arg, ScalarArg):
        return arg.value.to_numpy()
    if isinstance(arg, LocalMemoryArg):
        return arg
    if isinstance(arg, BufferArg):
        return _buffer(position, mapped.get(position, arg.ptr), arg.size)
    raise InvalidParameterError(
        f"execute_kernel: argument {position}: got {type(arg).__name__}, expected a KernelArg; "
        "wrap it in KernelArg.Tensor, .Buffer, .Scalar or .LocalMemory"
    )


def _buffer(position: int, ptr: Any, size_bytes: int) -> Array:
    """The first `size_bytes` of that memory, flat, in its own element type; bytes are uint8.  [BK-ARG-4]"""
    where = f"execute_kernel: argument {position}: buffer"
    try:
        view = memoryview(ptr)
        array = ptr if isinstance(ptr, np.ndarray) else np.frombuffer(view.cast("B"), np.uint8)
    except (TypeError, ValueError, BufferError):
        raise InvalidParameterError(
            f"{where}: got {type(ptr).__name__}, expected contiguous memory: an ndarray, a memoryview, a bytearray "
            "or a live MemoryHandle of this backend; Python has no raw addresses"
        ) from None
    if not array.flags.c_contiguous:
        raise InvalidParameterError(f"{where}: got strides {array.strides}, expected a C-contiguous array")
    if size_bytes > array.nbytes or size_bytes % array.itemsize:
        raise InvalidParameterError(
            f"{where}: size is {size_bytes} bytes, expected at most the {array.nbytes} that are there, "
            f"in elements of {array.itemsize}"
        )
    return array.reshape(-1)[: size_bytes // array.itemsize]
