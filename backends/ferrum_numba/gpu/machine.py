"""Where kernels run: a GPU, or the simulator on the host.  Arrays are flat; a launch is queued and may return before it
has run.   Clauses: BK-NCUDA-3, BK-NCUDA-5, BK-NCUDA-17 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

import importlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ferrum_numba.gpu.decode_graph import StreamGraph, record_on_stream, replays
from ferrum_numba.gpu.kernel import Kernel, cuda
from ferrum_numba.gpu.pool import BlockPool
from ferrum_numba.gpu.wide import VECTOR_BYTES
from ferrum_ref.errors import DeviceError, InternalError, ResourceExhaustedError, UnsupportedError
from ferrum_ref.types.devices import Device

if TYPE_CHECKING:
    from ferrum_numba.simulator import Schedule

DeviceArray = Any  # numba's DeviceNDArray, or a numpy array under the simulator
Grid = int | tuple[int, int, int]
FEW_BLOCKS = 128
LEAST_CAPABILITY = (8, 0)  # copies into shared memory that go on beside, conversion to bf16
SCALARS = {"int64": int, "float32": np.float32, "float64": np.float64}


class Machine(ABC):
    """Memory and launches of one device."""

    device: Device
    description: str

    @abstractmethod
    def empty(self, count: int, element: np.dtype[Any]) -> DeviceArray:
        """A flat array of at least one element, holding anything."""

    @abstractmethod
    def upload(self, host: NDArray[Any]) -> DeviceArray:
        """A copy of a flat, contiguous host array of at least one element."""

    @abstractmethod
    def download(self, array: DeviceArray) -> NDArray[Any]:
        """A copy on the host, once everything queued is done."""

    @abstractmethod
    def launch(self, kernel: Kernel, grid: Grid, block: Grid, *arguments: Any, shared_bytes: int = 0) -> None:
        """Queue `kernel`. Mutates the arrays that it writes."""

    @abstractmethod
    def synchronize(self) -> None:
        """Return when all that is queued is done."""

    @abstractmethod
    def mark(self) -> Callable[[], None]:
        """A function that returns when all that is queued by now is done; any thread may call it."""

    @abstractmethod
    def is_aligned(self, array: DeviceArray) -> bool:
        """Whether it starts at a multiple of 16 bytes. Pure."""

    def used_bytes(self) -> int | None:
        """Memory in use on the device; None if it does not tell."""
        return None

    @cached_property
    def records_graphs(self) -> bool:
        """Whether `record` gives more than it was given."""
        return False

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """What repeats the launches of `run`, which has run before: `run` itself where none are recorded."""
        return run


class SimulatedMachine(Machine):
    """Kernels run by `ferrum_numba.simulator` on host memory; what was never written is NaN, or the largest integer."""

    def __init__(self, schedule: Schedule | None = None) -> None:
        """Blocks and threads forwards where no schedule is given. The simulator needs greenlet; a GPU does not."""
        from ferrum_numba.simulator import Schedule, Simulator
        from ferrum_numba.simulator.memory import place_in_memory, poison

        self.device = Device.CPU
        self.description = "simulator"
        self.simulator = Simulator(schedule or Schedule.FORWARDS)
        self._unwritten, self._place_of = poison, place_in_memory

    def empty(self, count: int, element: np.dtype[Any]) -> DeviceArray:
        return self._unwritten(max(count, 1), element)

    def upload(self, host: NDArray[Any]) -> DeviceArray:
        return host.copy()

    def download(self, array: DeviceArray) -> NDArray[Any]:
        return np.array(array)

    def launch(self, kernel: Kernel, grid: Grid, block: Grid, *arguments: Any, shared_bytes: int = 0) -> None:
        checked = as_declared(kernel, arguments)
        self.simulator.launch(kernel.function, grid, block, *checked, shared_bytes=shared_bytes)

    def synchronize(self) -> None:
        """Nothing is ever queued."""

    def mark(self) -> Callable[[], None]:
        return self.synchronize

    def is_aligned(self, array: DeviceArray) -> bool:
        return self._place_of(array) % VECTOR_BYTES == 0


class NvidiaMachine(Machine):
    """One NVIDIA GPU through numba-cuda, on a stream of its own; each kernel is compiled at its first launch.

    The stream waits for the device's default stream and holds it up, as numba makes streams. Memory comes from a pool:
    other libraries that read it through `__cuda_array_interface__` keep the tensor until they are done.  [BK-NCUDA-40]
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._gpu = cuda.gpus[device.ordinal or 0]
        self._compiled: dict[Kernel, Any] = {}
        with self._gpu:
            self._stream = cuda.stream()
            name = cuda.get_current_device().name
        self.description = name.decode() if isinstance(name, bytes) else str(name)
        from numba.cuda.cudadrv import devicearray, driver

        self._arrays: Any = devicearray.DeviceNDArray
        self._exhausted = driver.CudaAPIError
        self._pool = BlockPool(lambda num_bytes: cuda.current_context().memalloc(num_bytes), self._exhausted)

    def empty(self, count: int, element: np.dtype[Any]) -> DeviceArray:
        """Raises ResourceExhaustedError when the GPU has no more memory."""
        with self._gpu:
            return self._lent(max(count, 1), np.dtype(element))

    def upload(self, host: NDArray[Any]) -> DeviceArray:
        with self._gpu:
            array = self._lent(host.size, host.dtype)
            array.copy_to_device(host, stream=self._stream)  # pageable memory: read before this returns
            return array

    def download(self, array: DeviceArray) -> NDArray[Any]:
        with self._gpu:
            host: NDArray[Any] = array.copy_to_host(stream=self._stream)
            self._stream.synchronize()
        return host

    def launch(self, kernel: Kernel, grid: Grid, block: Grid, *arguments: Any, shared_bytes: int = 0) -> None:
        with self._gpu:
            if kernel not in self._compiled:
                self._compiled[kernel] = cuda.jit(kernel.signature)(kernel.function)
            if (math.prod(grid) if isinstance(grid, tuple) else grid) >= FEW_BLOCKS:
                configured = self._compiled[kernel][grid, block, self._stream, shared_bytes]
            else:
                with warnings.catch_warnings():  # numba warns of grids that do not fill a GPU
                    warnings.simplefilter("ignore")
                    configured = self._compiled[kernel][grid, block, self._stream, shared_bytes]
            configured(*arguments)

    def synchronize(self) -> None:
        with self._gpu:
            self._stream.synchronize()

    def mark(self) -> Callable[[], None]:
        """An event on the stream."""
        with self._gpu:
            event = cuda.event(timing=False)
            event.record(self._stream)
        return partial(self._await, event)

    def is_aligned(self, array: DeviceArray) -> bool:
        return int(array.device_ctypes_pointer.value) % VECTOR_BYTES == 0

    def used_bytes(self) -> int | None:
        with self._gpu:
            free, total = cuda.current_context().get_memory_info()
        return int(total) - int(free)

    @cached_property
    def records_graphs(self) -> bool:
        """Tried once, with one kernel."""
        return replays(self)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph of the launches; `run` itself where the driver refuses.  [BK-NCUDA-23]"""
        driver = importlib.import_module("cuda.bindings.driver")  # numba-cuda needs it too; it has no types
        try:
            with self._gpu, cuda.defer_cleanup():  # freeing memory could not be recorded
                graph = record_on_stream(driver, int(self._stream), run)
        except UnsupportedError:
            return run
        return lambda: self._replay(graph)

    def _await(self, event: Any) -> None:
        with self._gpu:
            event.synchronize()

    def _replay(self, graph: StreamGraph) -> None:
        with self._gpu:
            graph()

    def _lent(self, count: int, element: np.dtype[Any]) -> DeviceArray:
        """A flat array over a block of the pool, which the block returns to with the array's last view."""
        num_bytes = count * element.itemsize
        try:
            block, give_back = self._pool.take(num_bytes)
        except self._exhausted as error:
            raise ResourceExhaustedError(f"numba-cuda: no {num_bytes} bytes left on {self.device}: {error}") from error
        lent = cuda.MemoryPointer(block.context, block.device_pointer, num_bytes, finalizer=give_back)
        return self._arrays((count,), (element.itemsize,), element, stream=self._stream, gpu_data=lent)


def open_machine(device: str) -> Machine:
    """The machine that "simulator", "cuda" or "cuda:N" names. Raises DeviceError with the reason if there is none."""
    if device == "simulator":
        return SimulatedMachine()
    target = Device.parse(device)
    reason = why_unusable(target)
    if reason:
        raise DeviceError(f"make_backend: device: got {target}, {reason}")
    return NvidiaMachine(target)


def why_unusable(device: Device) -> str:
    """Why numba-cuda cannot use `device` here, and the remedy; "" if it can. Pure."""
    if device.kind != "cuda":
        return "expected cuda, cuda:N or simulator; another backend computes on the CPU: numba-cpu"
    if not cuda.is_available():
        if cuda.cuda_error() is None and _has_gpu():
            return (
                "but numba-cuda finds the GPU and not NVVM, its compiler; install it: pip install nvidia-nvvm, or set "
                "CUDA_HOME to a CUDA toolkit"
            )
        told = " ".join(str(cuda.cuda_error() or "no device found").split())
        return f"but numba-cuda finds no usable NVIDIA GPU ({told}); install a driver, or use device 'simulator'"
    count = len(cuda.gpus)
    if device.ordinal is None or device.ordinal >= count:
        return f"expected cuda:0 to cuda:{count - 1}; correct the index"
    major, minor = cuda.gpus[device.ordinal].compute_capability
    if (major, minor) < LEAST_CAPABILITY:
        return f"of compute capability {major}.{minor}, expected at least 8.0; take a newer GPU, or 'simulator'"
    return ""


def _has_gpu() -> bool:
    try:
        return len(cuda.gpus) > 0
    except cuda.CudaSupportError:
        return False


def usable_devices() -> list[Device]:
    """Every GPU that numba-cuda can use here. Pure."""
    if not cuda.is_available():
        return []
    return [gpu for gpu in map(Device.CUDA, range(len(cuda.gpus))) if not why_unusable(gpu)]


def as_declared(kernel: Kernel, arguments: Sequence[Any]) -> list[Any]:
    """The arguments with the types that the kernel's signature gives them.  [BK-NCUDA-17]

    Raises InternalError for an array of another type or layout, or a number that does not fit.
    """
    if len(arguments) != len(kernel.parameters):
        raise InternalError(f"{kernel.name}: {len(arguments)} arguments, expected {len(kernel.parameters)}")
    return [_as_declared(kernel, *pair) for pair in zip(kernel.parameters, arguments, strict=True)]


def _as_declared(kernel: Kernel, parameter: str, value: Any) -> Any:
    if parameter in SCALARS:
        if parameter == "int64" and not isinstance(value, int | np.integer):
            raise InternalError(f"{kernel.name}: got {value!r}, expected an integer, as declared")
        return SCALARS[parameter](value)
    if not isinstance(value, np.ndarray) or f"{value.dtype.name}[::1]" != parameter or not value.flags.c_contiguous:
        raise InternalError(f"{kernel.name}: got {getattr(value, 'dtype', type(value))}, expected {parameter}")
    return value
