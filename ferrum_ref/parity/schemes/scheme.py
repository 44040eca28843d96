"""What the judge needs to know of a packed form.   Clauses: PA-SCHEME-1..4."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from ferrum_ref.interfaces.quant_schemes import QuantScheme
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.kernels.quant_matrix import QuantMatrix
from ferrum_ref.parity.ops.operation import Case
from ferrum_ref.parity.units import Array

Arrays = Mapping[str, Array]
ONES, EXTREME, SUBNORMAL, NEGATIVE = "lost terms", "extreme codes", "subnormal scales", "negative scales"


class Scheme(ABC):
    """One packed form of a matrix (N, K). `name` is the operation's ending, `kinds` the names in capability lists.

    Arrays: "packed", and what goes with it by the names of the scheme's fields. Instances are stateless.
    """

    name: str
    kinds: tuple[str, ...]
    step_in: int = 32  # K is a multiple of it
    step_out: int = 1  # and N of this
    roundings: int = 2  # that meet a term beside the additions: the weight's making and its product with x

    @abstractmethod
    def cases(self) -> tuple[Case, ...]:
        """The cases of its operation."""

    def kind_of(self, sizes: Mapping[str, Any]) -> str:
        """The capability that a case of these sizes needs. Pure."""
        return self.kinds[0]

    @abstractmethod
    def draw(self, case: Case, num_rows: int, num_columns: int, rng: np.random.Generator) -> dict[str, Array]:
        """Random packed weights of about K^-1/2; with the probe "lost terms" every weight is 1."""

    @abstractmethod
    def matrix(self, arrays: Arrays, sizes: Mapping[str, Any]) -> QuantMatrix:
        """The arrays as the kernels decode them. Pure."""

    @abstractmethod
    def without_codes(self, arrays: Arrays, sizes: Mapping[str, Any]) -> dict[str, Array]:
        """The same scales and offsets with every code 0: what is left of a weight is what its offset adds. Pure."""

    @abstractmethod
    def described(self, tensors: Mapping[str, TensorRef], sizes: Mapping[str, Any]) -> QuantScheme:
        """What `quantized_linear` is told, with the tensors that go with the packed one. Pure."""

    def weights(self, arrays: Arrays, sizes: Mapping[str, Any]) -> Array:
        """(N, K) float64, the exact value of each float32 number that the form stands for. Pure."""
        matrix = self.matrix(arrays, sizes)
        return matrix.rows(0, matrix.shape[0]).astype(np.float64)

    def offsets(self, arrays: Arrays, sizes: Mapping[str, Any]) -> Array:
        """(N, K) float64: the part of each weight that does not depend on its code. Pure."""
        return self.weights(self.without_codes(arrays, sizes), sizes)
