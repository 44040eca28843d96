"""Runtime: what the parts of one torch backend share.

Clauses: BK-TORCH-11, BK-TORCH-21, BK-TORCH-32 (specs/backend_torch.md)."""

from __future__ import annotations

import torch

from ferrum_ref.errors import BackendError, DeviceError
from ferrum_ref.types.devices import Device
from ferrum_torch import conversion
from ferrum_torch.fusing import Run, compiled_on, directly
from ferrum_torch.tensor import TorchTensor


class Runtime:
    """What the parts of one backend share: its device, how it runs chains of operations, whether it is open, and how
    many operations it has done.

    The count is that of one thread at a time; concurrent callers may lose increments, nothing else.
    """

    __slots__ = ("device", "is_open", "num_operations", "run", "sdpa", "torch_device")

    def __init__(self, device: Device, compiled: bool = False, sdpa: bool = False) -> None:
        """Raises DeviceError for a device that torch cannot use; UnsupportedError if it cannot compile for it."""
        self.device = device
        self.torch_device = conversion.torch_device(device, "make_backend")
        self.run: Run = compiled_on(self.torch_device) if compiled else directly
        self.sdpa = sdpa
        self.is_open = True
        self.num_operations = 0

    def take(self, operation: str, argument: str, tensor: object) -> torch.Tensor:
        """The torch tensor behind the first operand of an operation; counts the operation.

        Raises BackendError after shutdown and for another backend's tensor.
        """
        if not self.is_open:
            raise BackendError(f"{operation}: the torch backend was shut down; make a new one with make_backend")
        self.num_operations += 1
        if tensor.__class__ is TorchTensor:
            return tensor.data
        raise _foreign(operation, argument, tensor)

    @staticmethod
    def take_beside(operation: str, argument: str, tensor: object, first: torch.Tensor) -> torch.Tensor:
        """The torch tensor behind a further operand, which must lie where the first does.

        Raises BackendError for another backend's tensor; DeviceError for another device.
        """
        if tensor.__class__ is not TorchTensor:
            raise _foreign(operation, argument, tensor)
        data: torch.Tensor = tensor.data
        if data.device != first.device:
            raise DeviceError(
                f"{operation}: {argument}: is on {data.device}, expected {first.device} like the first operand; "
                "move one with to_device"
            )
        return data


def _foreign(operation: str, argument: str, tensor: object) -> BackendError:
    return BackendError(
        f"{operation}: {argument}: got {type(tensor).__name__}, expected a tensor of the torch backend; "
        "convert it with tensor_factory().from_numpy(tensor.to_numpy())"
    )
