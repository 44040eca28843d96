"""Kernels compiled ahead of time, for GPUs that need not be at hand: to PTX by NVVM, to machine code by nvJitLink.

Both come from the packages nvidia-nvvm and nvidia-nvjitlink; no driver is asked.
Clause: BK-NCUDA-17 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

from ferrum_numba.gpu.kernel import Kernel, cuda
from ferrum_ref.errors import BackendError, UnsupportedError

Capability = tuple[int, int]


@dataclass(frozen=True, slots=True)
class MachineCode:
    """Machine code of one kernel and what each thread, or block, of it takes."""

    code: bytes
    num_registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


def to_ptx(kernel: Kernel, capability: Capability) -> str:
    """The kernel's PTX for compute capability (8, 0), (9, 0), ... Pure. Raises BackendError if it does not compile."""
    try:
        text, _ = cuda.compile_ptx(kernel.function, kernel.signature, cc=capability)
    except Exception as error:
        raise BackendError(f"to_ptx: {kernel.name}{kernel.signature[4:]} for {capability}: {error}") from error
    return str(text)


def to_machine_code(ptx: str, capability: Capability) -> MachineCode:
    """The PTX assembled. Pure. Raises UnsupportedError without nvJitLink; BackendError if it refuses the PTX."""
    try:
        nvjitlink = importlib.import_module("cuda.bindings.nvjitlink")
    except ImportError as error:
        raise UnsupportedError(
            f"to_machine_code: nvJitLink does not load ({error}); "
            "install it: pip install nvidia-nvjitlink cuda-bindings"
        ) from error
    options = [f"-arch=sm_{capability[0]}{capability[1]}", "-verbose", "-Xptxas=-v"]
    source = ptx.encode()
    linker = nvjitlink.create(len(options), options)
    try:
        nvjitlink.add_data(linker, nvjitlink.InputType.PTX, source, len(source), "kernel.ptx")
        nvjitlink.complete(linker)
        code = bytearray(nvjitlink.get_linked_cubin_size(linker))
        nvjitlink.get_linked_cubin(linker, code)
        log = bytearray(nvjitlink.get_info_log_size(linker))
        nvjitlink.get_info_log(linker, log)
    except nvjitlink.nvJitLinkError as error:
        raise BackendError(f"to_machine_code: sm_{capability[0]}{capability[1]}: {error}; see the PTX") from error
    finally:
        nvjitlink.destroy(linker)
    return _described(bytes(code), log.decode(errors="replace"))


def _described(code: bytes, log: str) -> MachineCode:
    def first(pattern: str) -> int:
        found: Any = re.search(pattern, log)
        return int(found.group(1)) if found else 0

    return MachineCode(
        code,
        first(r"Used (\d+) registers"),
        first(r"(\d+) bytes stack frame"),
        first(r"(\d+) bytes spill stores") + first(r"(\d+) bytes spill loads"),
        first(r"(\d+) bytes smem"),
    )
