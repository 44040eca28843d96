"""The torch backend of ferrum-ref: CPU and CUDA.  Importing this package does not import torch; `make_backend` does.

Clauses: BK-TORCH-* (specs/backend_torch.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ferrum_ref.errors import UnsupportedError

if TYPE_CHECKING:
    from ferrum_ref.interfaces.backend import ComputeBackend


def make_backend(device: str = "cpu", *, compiled: bool = False, sdpa: bool = False) -> ComputeBackend:
    """A torch backend on "cpu", "cuda" or "cuda:N".  [BK-TORCH-1..3, BK-TORCH-32..33, BK-TORCH-36]

    `compiled` passes norms, activations, rotations and packed rows to torch.compile, each as one kernel. `sdpa` passes
    attention to torch's fused kernels, which are faster and round more often, as the backend then declares.
    Raises UnsupportedError, with the remedy, when torch is not installed, has no such device, or finds no compiler
    although `compiled` is set; InvalidParameterError for a text that names no device.
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
    return TorchBackend.on(device, compiled, sdpa)


def make_compiled_backend(device: str = "cpu") -> ComputeBackend:
    """`make_backend(device, compiled=True)`, for places that take a factory: "ferrum_torch:make_compiled_backend"."""
    return make_backend(device, compiled=True)


def make_sdpa_backend(device: str = "cpu") -> ComputeBackend:
    """`make_backend(device, sdpa=True)`, for places that take a factory: "ferrum_torch:make_sdpa_backend"."""
    return make_backend(device, sdpa=True)


__all__ = ["make_backend", "make_compiled_backend", "make_sdpa_backend"]
