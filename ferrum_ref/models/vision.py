"""The CLIP vision tower, over KernelOps and TensorOps: any ComputeBackend runs it.

    h_0 = norm([class; W_patch patches] + positions)
    a_l = h_l + W_o attention(q, k, v),      [q; k; v] = W_qkv norm_1(h_l)
    h_(l+1) = a_l + W_down act(W_up norm_2(a_l))

Source: Radford et al. 2021; Dosovitskiy et al. 2021 (patches, pre-norm).  Clauses: FM-VISION-4..5, FM-IMAGE-1..2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import InvalidParameterError, ModelError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.families_data import ImageBuffer
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.encoder_ops import Affine, EncoderOps
from ferrum_ref.models.hidden_activation import hidden_activation
from ferrum_ref.models.vision_config import PixelScaling, VisionConfig
from ferrum_ref.models.vision_weights import VisionLayer, VisionWeights


class VisionTower:
    """Stateless. Safe to share between threads."""

    def __init__(
        self, config: VisionConfig, weights: VisionWeights, backend: ComputeBackend, scaling: PixelScaling
    ) -> None:
        """Raises UnsupportedError if the backend lacks attention kernels."""
        self.config = config
        self.weights = weights
        self._ops = EncoderOps(backend, "VisionTower")
        self._factory = backend.tensor_factory()
        self._activation = hidden_activation(config.hidden_act, backend, weights.patch.dtype())
        area = config.patch_size**2
        std = np.repeat(np.asarray(scaling.std), area)
        self._slope = self._constant(scaling.factor / std)
        self._offset = self._constant(-np.repeat(np.asarray(scaling.mean), area) / std)

    def hidden_states(self, pixels: ImageBuffer, layers: Sequence[int]) -> list[TensorRef]:
        """The hidden states h_l `[1 + P, E]` for each asked l, class row first.  [FM-VISION-4..5]

        l counts from 0 (what the first layer gets) to the number of layers. Layers above the last one asked for are not
        run. Pure. Raises ModelError for another number of bytes, InvalidParameterError for an l out of range.
        """
        available = len(self.weights.layers)
        if not layers or min(layers) < 0 or max(layers) > available:
            raise InvalidParameterError(f"VisionTower: layers {list(layers)}, expected some in [0, {available}]")
        hidden = self._embed(pixels)
        states = [hidden]
        for layer in self.weights.layers[: max(layers)]:
            hidden = self._layer(layer, hidden)
            states.append(hidden)
        return [states[index] for index in layers]

    def patches(self, pixels: ImageBuffer) -> TensorRef:
        """Scaled pixels, one patch a row, `[P, 3 * p * p]`: channel, row, column within it.  Pure.  [FM-IMAGE-1..2]"""
        image_size, patch, side = self.config.image_size, self.config.patch_size, self.config.patches_per_side
        if len(pixels) != image_size**2 * 3:
            raise ModelError(
                f"encode_image: {len(pixels)} bytes, expected {image_size**2 * 3}: {image_size} x {image_size} pixels"
                " of red, green, blue; fit other pictures with models.vision_resize.fit_image"
            )
        image = np.frombuffer(pixels, dtype=np.uint8).reshape(image_size, image_size, 3)
        blocks = image[: side * patch, : side * patch].reshape(side, patch, side, patch, 3)
        rows = blocks.transpose(0, 2, 4, 1, 3).reshape(side * side, 3 * patch * patch)
        values = self._factory.from_numpy(np.ascontiguousarray(rows, dtype=np.float32)).to_dtype(self._slope.dtype())
        return self._ops.tensor.add(self._ops.tensor.mul(values, self._slope), self._offset)

    def _embed(self, pixels: ImageBuffer) -> TensorRef:
        rows = self._ops.affine(self.patches(pixels), Affine(self.weights.patch, None))
        rows = self._ops.tensor.concat([self.weights.class_row, rows], 0)
        return self._ops.norm(self._ops.tensor.add(rows, self.weights.positions), self.weights.norm)

    def _layer(self, layer: VisionLayer, hidden: TensorRef) -> TensorRef:
        ops = self._ops
        qkv = ops.affine(ops.norm(hidden, layer.attention_norm), layer.qkv)
        attended = ops.attend(qkv, [1 + self.config.num_patches], self.config.num_heads)
        hidden = ops.tensor.add(ops.affine(attended, layer.output), hidden)
        inner = self._activation(ops.affine(ops.norm(hidden, layer.norm), layer.up))
        return ops.tensor.add(ops.affine(inner, layer.down), hidden)

    def _constant(self, values: npt.NDArray[np.float64]) -> TensorRef:
        return self._factory.from_numpy(values.astype(np.float32)).to_dtype(self.weights.patch.dtype())
