"""CUDA C to loaded functions of a GPU, through NVRTC.  Clauses: BK-CUPY-16, BK-CUPY-41 (specs/backend_cupy.md).

CuPy's own `RawModule` adds `-ftz=true` to whatever options it is given, and takes subnormal numbers for zero. bfloat16
has float32's exponents, so whole tensors may be subnormal; hence NVRTC is asked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cupy.cuda import Device, Module, nvrtc

from ferrum_cupy.machine import source_of
from ferrum_ref.errors import BackendError

Key = tuple[str, tuple[tuple[str, int], ...]]


class Compiler:
    """The functions of one GPU, each source compiled at its first use, once for each set of definitions."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._modules: dict[Key, Any] = {}
        self._functions: dict[tuple[Key, str], Any] = {}

    def function(self, source: str, kernel: str, defines: Mapping[str, int]) -> Any:
        """Called as function(grid, block, arguments). The device must be current.  Raises BackendError."""
        key = (source, tuple(defines.items()))
        found = self._functions.get((key, kernel))
        if found is None:
            if key not in self._modules:
                module = Module()
                module.load(machine_code(source_of(source), source, defines, str(self._device.compute_capability)))
                self._modules[key] = module
            found = self._functions[key, kernel] = self._modules[key].get_function(kernel)
        return found


def machine_code(text: str, name: str, defines: Mapping[str, int], capability: str) -> bytes:
    """Machine code for a compute capability such as "90"; PTX of the newest one known to NVRTC for a later GPU. Pure.

    Raises BackendError with the compiler's words for a source that it refuses.
    """
    known = [int(one) for one in nvrtc.getSupportedArchs()]
    is_known = int(capability) in known
    earlier = [one for one in known if one < int(capability)]
    if not is_known and not earlier:
        raise BackendError(f"cupy: NVRTC {nvrtc.getVersion()} compiles for no GPU as old as sm_{capability}")
    target = f"sm_{capability}" if is_known else f"compute_{max(earlier)}"
    options = ("-std=c++17", f"-arch={target}", "-ftz=false", *(f"-D{key}={value}" for key, value in defines.items()))
    program = nvrtc.createProgram(text, f"{name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        code = nvrtc.getCUBIN(program) if is_known else nvrtc.getPTX(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program).strip()
        raise BackendError(f"cupy: NVRTC refuses {name}.cu for {target}: {error}: {log[:2000]}") from error
    finally:
        nvrtc.destroyProgram(program)
    return code if isinstance(code, bytes) else str(code).encode()
