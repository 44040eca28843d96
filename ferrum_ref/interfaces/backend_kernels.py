"""Custom kernels: what a caller launches, and who compiles and launches it; see `backend`.

Clauses: BK-KERNEL-*, BK-ARG-* in specs/backend.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from ferrum_ref.interfaces.backend_scalar import ScalarValue
from ferrum_ref.types.devices import Device
from ferrum_ref.types.record import U32, U64, Record, Usize

if TYPE_CHECKING:
    from ferrum_ref.interfaces.tensor import TensorRef

Dim3: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class KernelHandle(Record):
    """Names a loaded kernel; hashable."""

    value: U64

    @property
    def _0(self) -> int:
        """The number: upstream's unnamed field `0`.  [BK-DATA-1]"""
        return self.value


@dataclass(frozen=True, slots=True)
class KernelInfo(Record):
    """Facts about a loaded kernel; shared memory in bytes, block size in threads (x, y, z).  [BK-KERNEL-7]"""

    name: str
    max_threads_per_block: U32
    shared_memory_size: Usize
    registers_per_thread: U32
    preferred_block_size: Dim3


class KernelArg(Record):
    """A launch argument: `.Tensor`, `.Buffer`, `.Scalar` or `.LocalMemory`.  [BK-ARG-3..6]"""

    __slots__ = ()
    Tensor: ClassVar[type[TensorArg]]
    Buffer: ClassVar[type[BufferArg]]
    Scalar: ClassVar[type[ScalarArg]]
    LocalMemory: ClassVar[type[LocalMemoryArg]]


@dataclass(frozen=True, slots=True)
class TensorArg(KernelArg):
    """A tensor of the executor's backend; the kernel may write to it."""

    tensor: TensorRef


@dataclass(frozen=True, slots=True)
class BufferArg(KernelArg):
    """Raw memory, `size` bytes of it: an ndarray, a memoryview, a bytearray, or a MemoryHandle of the backend.

    Upstream has an address here; Python has none to give, so an int is refused at launch.
    """

    ptr: Any
    size: Usize


@dataclass(frozen=True, slots=True)
class ScalarArg(KernelArg):
    """A scalar of stated width."""

    value: ScalarValue


@dataclass(frozen=True, slots=True)
class LocalMemoryArg(KernelArg):
    """Shared memory to reserve for each block, in bytes."""

    size: Usize


KernelArg.Tensor = TensorArg
KernelArg.Buffer = BufferArg
KernelArg.Scalar = ScalarArg
KernelArg.LocalMemory = LocalMemoryArg


class KernelExecutor(ABC):
    """Compiles kernels that a caller brings as source text, and launches them over a grid.  [BK-KERNEL-1..12]

    Whoever may load a kernel may run code: no implementation is a sandbox.
    """

    @abstractmethod
    async def load_kernel(self, source: str, name: str, device: Device) -> KernelHandle:
        """Compile `source` for `device`; `name` is its entry point.

        Raises InvalidParameterError (the source does not compile: with the line), NotFoundError (no such entry point),
        DeviceError (device), BackendError (the source fails while it is loaded).
        """

    @abstractmethod
    async def execute_kernel(
        self, handle: KernelHandle, grid_size: Dim3, block_size: Dim3, args: Sequence[KernelArg]
    ) -> None:
        """Launch: grid_size blocks (x, y, z) of block_size threads (x, y, z). Mutates tensors and buffers.

        Raises NotFoundError (handle), InvalidParameterError (sizes, arguments), ResourceExhaustedError (threads or
        shared memory of a block), BackendError (the kernel fails: with block, thread and line).
        """

    @abstractmethod
    def get_kernel_info(self, handle: KernelHandle) -> KernelInfo | None:
        """Facts about a loaded kernel, or None. Pure."""

    @abstractmethod
    async def unload_kernel(self, handle: KernelHandle) -> None:
        """Forget the kernel. Raises NotFoundError for an unknown handle."""
