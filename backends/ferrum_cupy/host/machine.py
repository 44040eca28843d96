"""CUDA C on a CPU: built by g++ against `host_cuda.h`, called through ctypes.  Clauses: BK-CUPY-3..4."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ferrum_cupy.host.streams import HostQueue, HostStream
from ferrum_cupy.machine import DeviceArray, DeviceStream, Machine, source_of
from ferrum_cupy.storage import narrow
from ferrum_ref.errors import BackendError, ResourceExhaustedError, UnsupportedError
from ferrum_ref.types.devices import DataType, Device

ALIGNMENT_BYTES = 512  # of CuPy's pool
LENDABLE_BYTES = 4 << 30
GARBAGE, GARBAGE_BYTES = 0xA5, 1 << 20
HEADER = Path(__file__).with_name("host_cuda.h")
_KERNELS = re.compile(
    r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\('
    r"|^(?:POINTWISE|PAIRWISE|QUANTIZED_LINEAR|STREAM)\((\w+),",
    re.MULTILINE,
)


def open_host(name: str) -> Host:
    """Raises UnsupportedError without g++, or for a device that is not the CPU."""
    if name != "cpu":
        raise UnsupportedError(f"make_backend: device: got {name!r}, expected 'cpu': these kernels run on the host")
    compiler = shutil.which("g++")
    if compiler is None:
        raise UnsupportedError("make_backend: g++ is not installed; the host machine compiles the kernels with it")
    return Host(compiler)


def kernels_in(source: str) -> list[str]:
    """Names of the kernels that a source defines. Pure."""
    return [first or second for first, second in _KERNELS.findall(source) if first not in ("NAME", "__launch_bounds__")]


class Host(Machine):
    """One shared library for each file and set of definitions, kept in the system's folder for temporary files."""

    xp = np
    device = Device.CPU

    def __init__(self, compiler: str, folder: Path | None = None) -> None:
        self._compiler = compiler
        self._folder = folder or Path(tempfile.gettempdir()) / "ferrum-cupy-host"
        self._libraries: dict[tuple[str, tuple[tuple[str, int], ...]], ctypes.CDLL] = {}
        self.queue = HostQueue()
        self._launches = HostStream(self.queue)

    def launch(
        self,
        source: str,
        kernel: str,
        defines: Mapping[str, int],
        grid: tuple[int, int, int],
        threads: int,
        arguments: Sequence[Any],
    ) -> None:
        """Raises BackendError where threads of a block miss each other at a barrier or a shuffle."""
        key = (source, tuple(sorted(defines.items())))
        if key not in self._libraries:
            self._libraries[key] = ctypes.CDLL(str(self.library(source_of(source), defines)))
        call = getattr(self._libraries[key], f"launch_{kernel}")
        call.restype = ctypes.c_char_p
        cells = [_cell(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(cells))(*[ctypes.addressof(cell) for cell in cells])
        fault = call((ctypes.c_uint * 3)(*grid), threads, pointers)
        if fault is not None:
            raise BackendError(f"{kernel}: {fault.decode()}; the kernel is wrong")

    def library(self, source: str, defines: Mapping[str, int]) -> Path:
        """The built source; built once for each text. Raises UnsupportedError with the compiler's words."""
        text = '#include "host_cuda.h"\n' + source + "\n"
        text += "".join(f"LAUNCHER({name})\n" for name in kernels_in(source))
        flags = [f"-D{name}={value}" for name, value in sorted(defines.items())]
        digest = hashlib.sha256("\0".join([text, HEADER.read_text("utf-8"), *flags]).encode()).hexdigest()[:24]
        built = self._folder / f"{digest}.so"
        if built.exists():
            return built
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder) as work:
            (Path(work) / "kernels.cpp").write_text(text, "utf-8")
            made = Path(work) / "kernels.so"
            command = [self._compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", *flags]
            command += ["-I", str(HEADER.parent), "-o", str(made), str(Path(work) / "kernels.cpp")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UnsupportedError(f"g++ refuses the kernels: {done.stderr[:500]}")
            made.replace(built)
        return built

    def to_device(self, array: Any) -> DeviceArray:
        return np.array(array)

    def stream_key(self) -> int:
        return 0

    def to_host(self, array: DeviceArray) -> Any:
        return array

    def multiply(self, a: DeviceArray, b: DeviceArray, dtype: DataType, *, is_rounded: bool = False) -> DeviceArray:
        return _product(a, b.T, dtype, is_rounded)

    def multiply_many(self, a: DeviceArray, b: DeviceArray, dtype: DataType) -> DeviceArray:
        return _product(a, b, dtype, True)

    def check_graphs(self) -> None:
        raise UnsupportedError("decode: the host machine records no graphs; leave use_graphs off")

    def record(self, step: Callable[[], DeviceArray]) -> Callable[[], DeviceArray]:
        self.check_graphs()
        return step

    def synchronize(self) -> None:
        """Kernels are done when `launch` returns; copies on streams may wait."""
        self.queue.run_all()

    def used_bytes(self) -> int:
        return 0

    def describe(self) -> dict[str, Any]:
        return {"host": self._compiler, "numpy": np.__version__}

    def lendable_bytes(self) -> int:
        return LENDABLE_BYTES

    def allocate_bytes(self, num_bytes: int) -> DeviceArray:
        """Its first bytes hold garbage, as a GPU's do."""
        try:
            whole = np.empty(num_bytes + ALIGNMENT_BYTES, np.uint8)
        except (MemoryError, ValueError) as error:
            raise ResourceExhaustedError(f"allocate_bytes: the host has no {num_bytes} bytes: {error}") from error
        whole[:GARBAGE_BYTES] = GARBAGE
        start = -whole.ctypes.data % ALIGNMENT_BYTES
        return whole[start : start + num_bytes]

    def address(self, array: DeviceArray) -> int:
        return int(array.ctypes.data)

    def copy_bytes(self, target: DeviceArray, source: DeviceArray, stream: DeviceStream | None) -> None:
        """Raises BackendError for memory that overlaps: what a GPU would copy then is not defined."""
        if np.may_share_memory(target, source):
            raise BackendError("copy_bytes: source and target overlap; copy in pieces that do not")
        if stream is None:
            target[...] = source
        elif isinstance(stream, HostStream):
            stream.submit(lambda: np.copyto(target, source))
        else:
            raise BackendError(f"copy: stream: got {type(stream).__name__}, expected a stream of the host")

    def fill_bytes(self, target: DeviceArray, value: int) -> None:
        target[...] = value

    def write_bytes(self, target: DeviceArray, data: Any) -> None:
        target[...] = data

    def new_stream(self) -> HostStream:
        return HostStream(self.queue)

    def current_stream(self) -> HostStream:
        return self._launches

    @contextmanager
    def using(self, stream: DeviceStream) -> Iterator[None]:
        """Kernels run at once, but count as done only when somebody has waited for the stream."""
        if not isinstance(stream, HostStream):
            raise BackendError(f"using: stream: got {type(stream).__name__}, expected a stream of the host")
        stream.submit(lambda: None)
        yield

    @property
    def truncates(self) -> bool:
        return False


def _product(a: DeviceArray, b: DeviceArray, dtype: DataType, is_rounded: bool) -> Any:
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        sums = np.asarray(_widened(a, dtype) @ _widened(b, dtype))
        return narrow(np, sums, dtype) if is_rounded else sums


def _widened(array: Any, dtype: DataType) -> Any:
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype is DataType.BF16 else array.astype(np.float32)


def _cell(argument: Any) -> Any:
    """A ctypes value that holds the argument as the kernel takes it."""
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, np.ndarray):
        return ctypes.c_void_p(argument.ctypes.data)
    kinds = {
        np.dtype(np.int32): ctypes.c_int,
        np.dtype(np.int64): ctypes.c_longlong,
        np.dtype(np.float32): ctypes.c_float,
    }
    return kinds[argument.dtype](argument.item())
