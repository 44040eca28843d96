"""The CuPy backend of ferrum-ref: CuPy arrays, cuBLAS products, CUDA C kernels.  Importing it does not import cupy.

Clauses: BK-CUPY-* (specs/backend_cupy.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ferrum_ref.errors import UnsupportedError

if TYPE_CHECKING:
    from ferrum_ref.interfaces.backend import ComputeBackend


def make_backend(device: str = "cuda") -> ComputeBackend:
    """A CuPy backend on "cuda" or "cuda:N".  [BK-CUPY-1]

    Raises UnsupportedError, with the remedy, when cupy is not installed, does not load, or finds no such GPU.
    """
    try:
        from ferrum_cupy.gpu import open_gpu
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "cupy":
            raise
        raise UnsupportedError(
            "make_backend: cupy is not installed, expected cupy >= 14; install it: pip install 'ferrum-ref[cupy]'"
        ) from error
    except (ImportError, OSError) as error:
        raise UnsupportedError(
            f"make_backend: cupy is installed but does not load ({type(error).__name__}: {error}); "
            "reinstall it: pip install --force-reinstall 'ferrum-ref[cupy]'"
        ) from error
    from ferrum_cupy.backend import CupyBackend

    return CupyBackend(open_gpu(device))


__all__ = ["make_backend"]
