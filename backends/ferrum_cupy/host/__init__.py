"""The same backend without a GPU: numpy's arrays, and the CUDA C kernels compiled for the CPU.

    ferrum-ref parity --backend ferrum_cupy.host:make_backend

A way to test, not to compute fast: the threads of a block are fibers that take turns. It needs g++.
Clauses: BK-CUPY-3..4 (specs/backend_cupy.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ferrum_ref.interfaces.backend import ComputeBackend


def make_backend(device: str = "cpu") -> ComputeBackend:
    """The backend over numpy and g++. Raises UnsupportedError without g++ or for another device than "cpu"."""
    from ferrum_cupy.backend import CupyBackend
    from ferrum_cupy.host.machine import open_host

    return CupyBackend(open_host(device))


__all__ = ["make_backend"]
