"""A grid of blocks, one block after the other.   Clauses: BK-CUDASIM-1, BK-CUDASIM-10 (specs/backend_numba_cuda.md)."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import numpy as np

from ferrum_numba.simulator.arithmetic import SimulatedLibdevice, SimulatedMath
from ferrum_numba.simulator.binding import Binder
from ferrum_numba.simulator.block import Block
from ferrum_numba.simulator.memory import CheckedArray
from ferrum_numba.simulator.module import SimulatedCuda
from ferrum_numba.simulator.moment import Dim3
from ferrum_ref.errors import InvalidParameterError

MOST_THREADS = 1024
MOST_SHARED_BYTES = 48 * 1024
Size = int | Sequence[int]


class Schedule(enum.Enum):
    """In which order blocks, and threads between barriers, run; a correct kernel gives the same bits either way."""

    FORWARDS = "forwards"
    BACKWARDS = "backwards"


class Simulator:
    """Launches kernels on host arrays, which they change in place.  [BK-CUDASIM-1]"""

    def __init__(self, schedule: Schedule = Schedule.FORWARDS) -> None:
        self.schedule = schedule

    def launch(self, kernel: Any, grid: Size, block: Size, *arguments: Any, shared_bytes: int = 0) -> None:
        """Run `kernel` over the grid. Arrays are checked on every access; other arguments pass as they are.

        Mutates the arrays that the kernel writes. Raises InvalidParameterError for a grid or block that no GPU takes;
        BackendError, naming block and thread, for a divergent barrier, an index out of bounds, a read of what was never
        written and a race; else what the kernel raises.
        """
        grid_shape, block_shape = _dim3("grid", grid), _dim3("block", block)
        if math.prod(block_shape) > MOST_THREADS or shared_bytes > MOST_SHARED_BYTES:
            raise InvalidParameterError(
                f"launch: {math.prod(block_shape)} threads and {shared_bytes} bytes of shared memory a block, "
                f"expected at most {MOST_THREADS} and {MOST_SHARED_BYTES}; take smaller blocks"
            )
        source = getattr(kernel, "py_func", kernel)
        code = source.__code__ if isinstance(source, FunctionType) else Simulator.launch.__code__
        cuda = SimulatedCuda(code, grid_shape, block_shape, shared_bytes)
        stand_ins = {"numba.cuda": cuda, "math": SimulatedMath(), "numba.cuda.libdevice": SimulatedLibdevice()}
        function = Binder(stand_ins).bind(kernel)
        names = function.__code__.co_varnames
        checked = [
            CheckedArray(value, names[place], cuda, starts_written=True) if isinstance(value, np.ndarray) else value
            for place, value in enumerate(arguments)
        ]
        self._run(function.__name__, lambda: function(*checked), cuda)

    def _run(self, name: str, function: Any, cuda: SimulatedCuda) -> None:
        backwards = self.schedule is Schedule.BACKWARDS
        numbered = list(enumerate(np.ndindex(cuda.gridDim.z, cuda.gridDim.y, cuda.gridDim.x)))
        with np.errstate(all="ignore"):
            for number, (z, y, x) in reversed(numbered) if backwards else numbered:
                block = Block(name, Dim3(x, y, z), number, cuda.blockDim)
                cuda.enter(block)
                block.run(function, cuda, backwards)


def _dim3(argument: str, size: Size) -> Dim3:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    if not 1 <= len(sizes) <= 3 or any(one < 1 for one in sizes):
        raise InvalidParameterError(f"launch: {argument}: got {size}, expected one to three sizes of at least 1")
    return Dim3(*(*sizes, 1, 1)[:3])
