"""What the rest of this backend asks of the machine below: an array module, kernels, matrix products, copies, streams.

A GPU through CuPy (`gpu.py`) is one; numpy with the same CUDA C compiled for the CPU (`host/`) is the other, so that
all of this backend's code runs where there is no GPU.  Clauses: BK-CUPY-2..3 (specs/backend_cupy.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, TypeAlias

from ferrum_ref.types.devices import DataType, Device

DeviceArray: TypeAlias = Any  # a cupy or numpy ndarray
SOURCES: Final = Path(__file__).with_name("cuda")
STORAGE: Final[Mapping[DataType, int]] = {DataType.FP32: 0, DataType.FP16: 1, DataType.BF16: 2}


def source_of(name: str) -> str:
    """The CUDA C of one file of `cuda/`, with what all of them share before it. Pure."""
    return (SOURCES / "common.cuh").read_text("utf-8") + (SOURCES / f"{name}.cu").read_text("utf-8")


class DeviceEvent(ABC):
    """A point in a stream's work."""

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether all work before it has run. Pure."""

    @abstractmethod
    def synchronize(self) -> None:
        """Return when all work before it has run. Raises BackendError when the device failed."""


class DeviceStream(ABC):
    """Work that the device runs in the order in which it was queued."""

    @abstractmethod
    def record(self) -> DeviceEvent:
        """A point after all that is queued now."""

    @abstractmethod
    def wait(self, event: DeviceEvent) -> None:
        """What is queued from now on starts after the event."""

    @abstractmethod
    def poll(self) -> bool:
        """Whether nothing is left to run; asking again and again ends with True."""

    @abstractmethod
    def synchronize(self) -> None:
        """Return when all of it has run. Raises BackendError when the device failed."""


class Machine(ABC):
    """Arrays and kernels of one device."""

    device: Device
    xp: Any  # cupy or numpy

    @abstractmethod
    def launch(
        self,
        source: str,
        kernel: str,
        defines: Mapping[str, int],
        grid: tuple[int, int, int],
        threads: int,
        arguments: Sequence[Any],
    ) -> None:
        """Run `kernel` of `cuda/<source>.cu`, compiled with `defines`, over `grid` blocks of `threads`.

        Arguments are device arrays, None (a null pointer), and numpy scalars of the very types that the kernel takes.
        """

    @abstractmethod
    def to_device(self, array: Any) -> DeviceArray:
        """A numpy array on the device, in the order of the current stream; the array may be changed afterwards."""

    @abstractmethod
    def stream_key(self) -> int:
        """What tells the streams of this thread's launches apart. Pure."""

    @abstractmethod
    def to_host(self, array: DeviceArray) -> Any:
        """The array as a numpy array; waits for it."""

    @abstractmethod
    def multiply(self, a: DeviceArray, b: DeviceArray, dtype: DataType, *, is_rounded: bool = False) -> DeviceArray:
        """a (M, K) @ b (N, K).T, both stored as `dtype`, accumulated in float32: (M, N).

        float32, not rounded, or with `is_rounded` stored as `dtype`, rounded once.
        """

    @abstractmethod
    def multiply_many(self, a: DeviceArray, b: DeviceArray, dtype: DataType) -> DeviceArray:
        """a (C, M, K) @ b (C, K, N) as (C, M, N) stored as `dtype`, rounded once; one of them may have C = 1."""

    @abstractmethod
    def synchronize(self) -> None:
        """Return when everything launched is done."""

    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes that arrays of this machine hold."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Versions and the device's name, for status reports."""

    @abstractmethod
    def check_graphs(self) -> None:
        """Raises UnsupportedError where launches cannot be recorded."""

    @abstractmethod
    def record(self, step: Callable[[], DeviceArray]) -> Callable[[], DeviceArray]:
        """Run `step` once and record its launches; the result replays them and gives the same array each time.

        `step` must launch the same work whatever its arrays hold. Raises UnsupportedError where there are no graphs.
        """

    @abstractmethod
    def lendable_bytes(self) -> int:
        """What `allocate_bytes` could give now, other users of the device left alone."""

    @abstractmethod
    def allocate_bytes(self, num_bytes: int) -> DeviceArray:
        """A uint8 array, its contents anything, its address a multiple of 512; free for work on any stream.

        Raises ResourceExhaustedError when the device has no more.
        """

    @abstractmethod
    def address(self, array: DeviceArray) -> int:
        """Where the array begins. Pure."""

    @abstractmethod
    def copy_bytes(self, target: DeviceArray, source: DeviceArray, stream: DeviceStream | None) -> None:
        """target = source, equally long uint8 arrays that must not overlap; without a stream done on return."""

    @abstractmethod
    def fill_bytes(self, target: DeviceArray, value: int) -> None:
        """Every byte = value; done on return."""

    @abstractmethod
    def write_bytes(self, target: DeviceArray, data: Any) -> None:
        """target = the bytes of an equally long numpy uint8 array; done on return."""

    @abstractmethod
    def new_stream(self) -> DeviceStream:
        """A stream that waits for no other one."""

    @abstractmethod
    def current_stream(self) -> DeviceStream:
        """The stream into which this thread launches, for `using` in another.

        Raises UnsupportedError where every thread has a default stream of its own.
        """

    @abstractmethod
    def using(self, stream: DeviceStream) -> AbstractContextManager[None]:
        """Within, this thread launches into `stream`."""

    @property
    @abstractmethod
    def truncates(self) -> bool:
        """Whether matrix units may cut a sum where it should be rounded."""
