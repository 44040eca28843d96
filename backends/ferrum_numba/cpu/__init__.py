"""The Numba backend on the CPU: compiled, vectorised, parallel kernels.  Importing this package imports no Numba;
`make_backend` does.

Clauses: BK-NCPU-* (specs/backend_numba.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ferrum_ref.errors import UnsupportedError

if TYPE_CHECKING:
    from ferrum_ref.interfaces.backend import ComputeBackend


def make_backend(device: str = "cpu") -> ComputeBackend:
    """A Numba backend on "cpu", the only device it has.  [BK-NCPU-1..2]

    Raises UnsupportedError, with the remedy, when Numba is not installed, and for another device;
    InvalidParameterError for a text that names no device.
    """
    try:
        from ferrum_numba.cpu.backend import NumbaCpuBackend
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("numba", "llvmlite"):
            raise
        raise UnsupportedError(
            f"make_backend: {error.name} is not installed, expected numba >= 0.61; "
            "install it: pip install 'ferrum-ref[numba]'"
        ) from error
    except (ImportError, OSError) as error:  # a Numba that does not fit this numpy, or whose own libraries do not load
        raise UnsupportedError(
            f"make_backend: numba is installed but does not load ({type(error).__name__}: {error}); "
            "reinstall it: pip install --force-reinstall 'ferrum-ref[numba]'"
        ) from error
    return NumbaCpuBackend.on(device)


__all__ = ["make_backend"]
