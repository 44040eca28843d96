"""What is judged: a backend reached through the contracts, or plain functions on arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.parity.ops.decode import DecodeStep, MakeDecode
from ferrum_ref.parity.ops.operation import Inputs, Operation
from ferrum_ref.parity.units import Array, Storage
from ferrum_ref.types.algorithm import Algorithm

ArrayFunction = Callable[[Inputs], tuple[Array, ...]]


class Subject(ABC):
    """An implementation under judgement."""

    name: str

    @abstractmethod
    def declared(self, operation: Operation) -> Algorithm:
        """How it says that it computes `operation`."""

    @abstractmethod
    def run(self, operation: Operation, inputs: Inputs) -> tuple[Array, ...]:
        """The operation's outputs. Raises UnsupportedError if it is not offered."""

    def selector(self) -> str:
        """The command-line options that name this subject in a reproduction."""
        return f"--backend {self.name}"

    def check_offers(self, storage: Storage) -> None:
        """Raises UnsupportedError if tensors of that type do not exist here."""
        return


class BackendSubject(Subject):
    """A `ComputeBackend`, under the name it was loaded by.  [PA-SUBJECT-1]"""

    def __init__(
        self, backend: ComputeBackend, name: str, device: str = "cpu", decode: MakeDecode | None = None
    ) -> None:
        """`decode` builds a decode backend where the backend has no `make_decode_backend` of its own."""
        self.backend, self.name, self.device, self._decode = backend, name, device, decode

    def declared(self, operation: Operation) -> Algorithm:
        kernels = self.backend.kernel_ops()
        return kernels.declared_algorithm(operation.algorithm_name) if kernels is not None else Algorithm()

    def run(self, operation: Operation, inputs: Inputs) -> tuple[Array, ...]:
        if isinstance(operation, DecodeStep) and self._decode and not hasattr(self.backend, "make_decode_backend"):
            return operation.stepped(self.backend, inputs, self._decode)
        return operation.call(self.backend, inputs)

    def selector(self) -> str:
        return f"--backend {self.name}" + (f" --device {self.device}" if self.device != "cpu" else "")

    def check_offers(self, storage: Storage) -> None:
        if storage.data_type not in self.backend.capabilities().supported_dtypes:
            raise UnsupportedError(f"backend {self.name!r} has no {storage.name} tensors")


class FunctionSubject(Subject):
    """Functions on arrays by operation name, each with its declared algorithm.  [PA-SUBJECT-2]"""

    def __init__(
        self, name: str, functions: Mapping[str, ArrayFunction], algorithms: Mapping[str, Algorithm] | None = None
    ) -> None:
        self.name, self.functions, self.algorithms = name, functions, algorithms or {}

    def declared(self, operation: Operation) -> Algorithm:
        default = self.algorithms.get(operation.algorithm_name, Algorithm())
        return self.algorithms.get(operation.name, default)

    def run(self, operation: Operation, inputs: Inputs) -> tuple[Array, ...]:
        if operation.name not in self.functions:
            raise UnsupportedError(f"{self.name!r} offers no {operation.name}")
        return self.functions[operation.name](inputs)
