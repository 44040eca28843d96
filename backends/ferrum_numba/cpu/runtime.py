"""Runtime: what the parts of one backend share.  Clauses: BK-NCPU-3, BK-NCPU-16 (specs/backend_numba.md)."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from ferrum_numba.cpu.tensor import NumbaTensor
from ferrum_ref.errors import BackendError


class Runtime:
    """Whether the backend is open, and how many operations it has done.

    The count is that of one thread at a time; concurrent callers may lose increments, nothing else.
    """

    __slots__ = ("is_open", "num_operations")

    def __init__(self) -> None:
        self.is_open = True
        self.num_operations = 0

    def take(self, operation: str, argument: str, tensor: object) -> NDArray[Any]:
        """The array behind the first operand of an operation; counts the operation.

        Raises BackendError after shutdown and for another backend's tensor.
        """
        if not self.is_open:
            raise BackendError(f"{operation}: the numba-cpu backend was shut down; make a new one with make_backend")
        self.num_operations += 1
        return self.take_beside(operation, argument, tensor)

    @staticmethod
    def take_beside(operation: str, argument: str, tensor: object) -> NDArray[Any]:
        """The array behind a further operand. Raises BackendError for another backend's tensor."""
        if tensor.__class__ is NumbaTensor:
            return tensor.data
        raise BackendError(
            f"{operation}: {argument}: got {type(tensor).__name__}, expected a tensor of the numba-cpu backend; "
            "convert it with tensor_factory().from_numpy(tensor.to_numpy())"
        )
