"""A custom layer: a low-rank update of the values that pass.   Clause: MB-CUSTOM-6 (specs/model_builder.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import ConfigError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.model_builder import CustomLayer
from ferrum_ref.interfaces.tensor import TensorFactory, TensorRef

Array = npt.NDArray[Any]


class LowRankAdapter(CustomLayer):
    """y = x + scale * (x @ down.T) @ up.T          [MB-CUSTOM-6]

    x (..., E); down (R, E); up (E, R), R much smaller than E. Stands behind the value named `after`. Pure.
    Raises ConfigError unless the two matrices fit each other and scale is finite.
    Source: Hu et al. 2021 (LoRA), eq. 3; Houlsby et al. 2019 (adapters between layers).
    """

    def __init__(
        self, name: str, after: str, down: Array, up: Array, factory: TensorFactory, *, scale: float = 1.0
    ) -> None:
        down, up = np.asarray(down), np.asarray(up)
        if down.ndim != 2 or up.shape != down.shape[::-1] or not np.isfinite(scale):
            raise ConfigError(
                f"LowRankAdapter {name!r}: down {down.shape}, up {up.shape}, scale {scale}; "
                "expected (R, E), (E, R) and a finite scale"
            )
        self._name, self._after, self._scale = name, after, float(scale)
        self._width = int(down.shape[1])
        # the scale is folded into the smaller product once, in float32
        self._matrices = {"down": down.astype(np.float32), "up": (up * np.float32(scale)).astype(np.float32)}
        self._factory = factory

    def name(self) -> str:
        return self._name

    def layer_type(self) -> str:
        return "low_rank_adapter"

    def input_shape(self) -> list[int]:
        return [-1, self._width]

    def output_shape(self, input_shape: Sequence[int]) -> list[int]:
        return list(input_shape)

    def initialize_parameters(self) -> dict[str, TensorRef]:
        """The two matrices; the scale is in `up`."""
        return {name: self._factory.from_numpy(values.copy()) for name, values in self._matrices.items()}

    def config(self) -> Any:
        return {"after": self._after, "scale": self._scale, "rank": int(self._matrices["down"].shape[0])}

    def forward(
        self, input: TensorRef, parameters: Mapping[str, TensorRef], compute_backend: ComputeBackend
    ) -> TensorRef:
        """x and its update; products through the backend's TensorOps."""
        ops = compute_backend.tensor_ops()
        narrow = ops.matmul(input, ops.transpose(parameters["down"], 0, 1))
        return ops.add(input, ops.matmul(narrow, ops.transpose(parameters["up"], 0, 1)))
