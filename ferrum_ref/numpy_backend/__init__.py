"""The reference backend: numpy arrays, float32 arithmetic, one rounding at every store.   Clauses: BK-NUMPY-1..5."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ferrum_ref.interfaces.backend import ComputeBackend


def make_backend(device: str = "cpu") -> ComputeBackend:
    """The numpy backend on `device`, ready for use.  [BK-NUMPY-1]

    Pure. Raises UnsupportedError for any device but "cpu"; InvalidParameterError for a text that names none.
    """
    from ferrum_ref.errors import UnsupportedError
    from ferrum_ref.numpy_backend.backend import NumpyBackend
    from ferrum_ref.types.devices import Device

    if Device.parse(device) != Device.CPU:
        raise UnsupportedError(
            f"make_backend: device is {device!r}, and the numpy backend computes on 'cpu' only; "
            "use --backend torch for a GPU"
        )
    return NumpyBackend()
