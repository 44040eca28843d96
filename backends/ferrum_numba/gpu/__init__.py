"""The Numba-CUDA backend of ferrum-ref: kernels written in Python, compiled by numba-cuda for NVIDIA GPUs.

Importing this package imports no numba; `make_backend` does. On device "simulator" the same kernels run on the host,
one greenlet for each CUDA thread: slow, exact, and strict about races and barriers.

Clauses: BK-NCUDA-* (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ferrum_ref.errors import UnsupportedError

if TYPE_CHECKING:
    from ferrum_ref.interfaces.backend import ComputeBackend

NEEDED = ("numba", "numba_cuda", "greenlet", "cuda", "llvmlite")


def make_backend(device: str = "cuda") -> ComputeBackend:
    """A numba-cuda backend on "cuda", "cuda:N" or "simulator".  [BK-NCUDA-1..3]

    Raises UnsupportedError, with the reason and the remedy, when numba-cuda is not installed or finds no such GPU;
    InvalidParameterError for a text that names no device.
    """
    try:
        from ferrum_numba.gpu.backend import NumbaCudaBackend

        return NumbaCudaBackend.on(device)
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] not in NEEDED:
            raise
        raise UnsupportedError(
            f"make_backend: numba-cuda does not load ({error}), expected numba and numba-cuda >= 0.30; "
            "install them: pip install 'ferrum-ref[numba-cuda]'"
        ) from error


__all__ = ["make_backend"]
