"""Runs numba.cuda kernels on the host, deterministically, and finds what a GPU would only show now and then.

One greenlet for each CUDA thread, run in a fixed order, switched at barriers and warp intrinsics alone. Beyond numba's
own simulator: shuffles, votes and `syncwarp`; barriers that not all threads of a block reach are errors, as are indices
out of bounds, reads of memory that was never written, and races between barriers. Kernels are taken as they are: bare
functions, or what `numba.cuda.jit` makes of them; no environment variable is needed, and none gets in the way.

    binding     a kernel's function over stand-ins for `cuda`, `math` and `libdevice`
    module      the stand-in for `numba.cuda` inside a kernel
    arithmetic  the stand-ins for `math` and `numba.cuda.libdevice`: float32 in, float32 out
    atomics     read-modify-write
    memory      arrays that check their indices and who touched what since the last barrier
    warp        shuffles and votes among lanes
    block       the threads of a block and their barriers
    launch      a grid of blocks

Clauses: BK-CUDASIM-* (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from ferrum_numba.simulator.launch import Schedule, Simulator

__all__ = ["Schedule", "Simulator"]
