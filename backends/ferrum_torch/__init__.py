"""The torch backend of ferrum-ref: CPU and CUDA.  Importing this package does not import torch; `make_backend` does.

Clauses: BK-TORCH-* (specs/backend_torch.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ferrum_ref.errors import UnsupportedError

if TYPE_CHECKING:
    from ferrum_ref.interfaces.backend import ComputeBackend


def make_backend(device: str = "cpu") -> ComputeBackend:
    """A torch backend on "cpu", "cuda" or "cuda:N".  [BK-TORCH-1..3]

    Raises UnsupportedError, with the remedy, when torch is not installed or has no such device; InvalidParameterError
    for a text that names no device.
    """
    try:
        from ferrum_torch.backend import TorchBackend
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "torch":
            raise
        raise UnsupportedError(
            "make_backend: torch is not installed, expected torch >= 2.11; install it: pip install 'ferrum-ref[torch]'"
        ) from error
    except (ImportError, OSError) as error:  # a torch whose own libraries do not load
        raise UnsupportedError(
            f"make_backend: torch is installed but does not load ({type(error).__name__}: {error}); "
            "reinstall it: pip install --force-reinstall 'ferrum-ref[torch]'"
        ) from error
    return TorchBackend.on(device)


__all__ = ["make_backend"]
