"""A GPU through CuPy.  Clauses: BK-CUPY-1..3 (specs/backend_cupy.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import cupy
import numpy as np

from ferrum_cupy.compiling import Compiler
from ferrum_cupy.gpu_products import Products
from ferrum_cupy.machine import DeviceArray, DeviceEvent, DeviceStream, Machine
from ferrum_ref.errors import BackendError, DeviceError, ResourceExhaustedError, UnsupportedError
from ferrum_ref.types.devices import DataType, Device

NULL = np.uintp(0)


def open_gpu(name: str) -> Gpu:
    """The GPU of that name. Raises UnsupportedError with the reason where there is none."""
    try:
        device = Device.parse(name)
    except DeviceError as error:
        raise UnsupportedError(error.message) from error
    if device.kind != "cuda":
        raise UnsupportedError(f"make_backend: device: got {name!r}, expected cuda or cuda:N, all that cupy drives")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise UnsupportedError(
            f"make_backend: cupy {cupy.__version__} finds no usable NVIDIA GPU or driver ({error})"
        ) from error
    ordinal = device.ordinal or 0
    if ordinal >= count:
        raise UnsupportedError(f"make_backend: device: got {name!r}, expected cuda:0 to cuda:{count - 1}")
    return Gpu(ordinal)


class _failures:
    """What the driver reports within, as a BackendError; no generator, which would cost each launch a microsecond."""

    __slots__ = ("operation",)

    def __init__(self, operation: str) -> None:
        self.operation = operation

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            return
        if isinstance(error, cupy.cuda.memory.OutOfMemoryError):
            raise ResourceExhaustedError(f"{self.operation}: {error}") from error
        if isinstance(error, (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError)):
            raise BackendError(f"{self.operation}: the GPU failed: {error}") from error


class GpuEvent(DeviceEvent):
    """A CUDA event without timing; whoever waits for it sleeps."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.event = cupy.cuda.Event(block=True, disable_timing=True)

    @property
    def is_done(self) -> bool:
        with self._device, _failures("event"):
            return bool(self.event.done)

    def synchronize(self) -> None:
        with self._device, _failures("event"):
            self.event.synchronize()


class GpuStream(DeviceStream):
    """One of CuPy's streams; a new one neither waits for the default stream nor holds it up."""

    def __init__(self, device: Any, stream: Any = None) -> None:
        self._device = device
        with device:
            self.stream = cupy.cuda.Stream(non_blocking=True) if stream is None else stream

    def record(self) -> GpuEvent:
        with self._device, _failures("record_event"):
            made = GpuEvent(self._device)
            self.stream.record(made.event)
            return made

    def wait(self, event: DeviceEvent) -> None:
        if not isinstance(event, GpuEvent):
            raise BackendError(f"wait_event: got {type(event).__name__}, expected an event of a GPU")
        with self._device, _failures("wait_event"):
            self.stream.wait_event(event.event)

    def poll(self) -> bool:
        with _failures("is_stream_ready"):
            return bool(self.stream.done)

    def synchronize(self) -> None:
        with _failures("synchronize_stream"):
            self.stream.synchronize()


class Gpu(Machine):
    """Work goes to the current stream of CuPy, the device's default one unless somebody chose another."""

    xp = cupy

    def __init__(self, ordinal: int) -> None:
        self.device = Device.CUDA(ordinal)
        self._device = cupy.cuda.Device(ordinal)
        self._compiler = Compiler(self._device)
        self._products = Products(self._device)

    def launch(
        self,
        source: str,
        kernel: str,
        defines: Mapping[str, int],
        grid: tuple[int, int, int],
        threads: int,
        arguments: Sequence[Any],
    ) -> None:
        with self._device, _failures(kernel):
            function = self._compiler.function(source, kernel, defines)
            function(grid, (threads, 1, 1), tuple([NULL if argument is None else argument for argument in arguments]))

    def to_device(self, array: Any) -> DeviceArray:
        """Through CuPy's pinned buffers: the host does not wait."""
        with self._device, _failures("to_device"):
            return cupy.asarray(array)

    def stream_key(self) -> int:
        with self._device:
            return int(cupy.cuda.get_current_stream().ptr)

    def to_host(self, array: DeviceArray) -> Any:
        with self._device, _failures("to_host"):
            return cupy.asnumpy(array)

    def multiply(self, a: DeviceArray, b: DeviceArray, dtype: DataType, *, is_rounded: bool = False) -> DeviceArray:
        with self._device, _failures("multiply"):
            return self._products.multiply(a, b, dtype, is_rounded=is_rounded)

    def multiply_many(self, a: DeviceArray, b: DeviceArray, dtype: DataType) -> DeviceArray:
        with self._device, _failures("multiply"):
            return self._products.multiply_many(a, b, dtype)

    def check_graphs(self) -> None:
        """Every GPU that CuPy drives records graphs."""

    def record(self, step: Callable[[], DeviceArray]) -> Callable[[], DeviceArray]:
        """A first run, outside the recording, compiles kernels and fills a memory pool: neither may happen within.

        The pool is the recording's own and lives as long: what `step` frees is written anew by every replay, so nobody
        else may be given it.
        """
        pool = cupy.cuda.MemoryPool()
        with self._device, _failures("record"):
            stream = cupy.cuda.Stream(non_blocking=True)
            stream.wait_event(cupy.cuda.get_current_stream().record())
            with stream, cupy.cuda.using_allocator(pool.malloc):
                step()
                stream.begin_capture()
                try:
                    result = step()
                except BaseException:
                    with suppress(cupy.cuda.runtime.CUDARuntimeError):  # a capture that failed ends so too
                        stream.end_capture()
                    raise
                graph = stream.end_capture()
            stream.synchronize()

        def replay() -> DeviceArray:
            with self._device, _failures("replay"):
                graph.launch(cupy.cuda.get_current_stream())
                return result

        replay.keeps = (pool, stream)  # type: ignore[attr-defined]
        return replay

    def synchronize(self) -> None:
        with _failures("synchronize"):
            self._device.synchronize()

    def used_bytes(self) -> int:
        with self._device:
            return int(cupy.get_default_memory_pool().used_bytes())

    @cached_property
    def _name(self) -> str:
        return str(cupy.cuda.runtime.getDeviceProperties(self._device.id)["name"].decode())

    def describe(self) -> dict[str, Any]:
        return {"cupy": cupy.__version__, "gpu": self._name, "cuda": cupy.cuda.runtime.runtimeGetVersion()}

    def lendable_bytes(self) -> int:
        """What the driver calls free, and what CuPy's pool keeps for reuse."""
        with self._device:
            return int(cupy.cuda.runtime.memGetInfo()[0] + cupy.get_default_memory_pool().free_bytes())

    def allocate_bytes(self, num_bytes: int) -> DeviceArray:
        """From CuPy's pool. Its memory is free in the order of the current stream, so that is waited for."""
        with self._device:
            try:
                memory = cupy.get_default_memory_pool().malloc(num_bytes)
            except cupy.cuda.memory.OutOfMemoryError as error:
                raise ResourceExhaustedError(
                    f"allocate_bytes: no {num_bytes} bytes on {self.device}: {error}"
                ) from error
            cupy.cuda.get_current_stream().synchronize()
            return cupy.ndarray((num_bytes,), np.uint8, memory)

    def address(self, array: DeviceArray) -> int:
        return int(array.data.ptr)

    def copy_bytes(self, target: DeviceArray, source: DeviceArray, stream: DeviceStream | None) -> None:
        chosen = self._copies if stream is None else stream
        if not isinstance(chosen, GpuStream):
            raise BackendError(f"copy: stream: got {type(chosen).__name__}, expected a stream of a GPU")
        with self._device, _failures("copy"):
            target.data.copy_from_device_async(source.data, target.nbytes, chosen.stream)
            if stream is None:
                chosen.stream.synchronize()

    def fill_bytes(self, target: DeviceArray, value: int) -> None:
        with self._device, _failures("fill"):
            target.data.memset_async(value, target.nbytes, self._copies.stream)
            self._copies.stream.synchronize()

    def write_bytes(self, target: DeviceArray, data: Any) -> None:
        with self._device, _failures("write"):
            target.data.copy_from_host_async(data.ctypes.data, target.nbytes, self._copies.stream)
            self._copies.stream.synchronize()

    def new_stream(self) -> GpuStream:
        return GpuStream(self._device)

    def current_stream(self) -> GpuStream:
        with self._device:
            found = cupy.cuda.get_current_stream()
        if found.ptr == cupy.cuda.runtime.streamPerThread:
            raise UnsupportedError(
                "current_stream: each thread's default stream is its own (CUPY_CUDA_PER_THREAD_DEFAULT_STREAM); "
                "choose a stream: with cupy.cuda.Stream(): ..."
            )
        return GpuStream(self._device, found)

    @contextmanager
    def using(self, stream: DeviceStream) -> Iterator[None]:
        if not isinstance(stream, GpuStream):
            raise BackendError(f"using: stream: got {type(stream).__name__}, expected a stream of a GPU")
        with self._device, stream.stream:
            yield

    @cached_property
    def _copies(self) -> GpuStream:
        return self.new_stream()

    @property
    def truncates(self) -> bool:
        return True
