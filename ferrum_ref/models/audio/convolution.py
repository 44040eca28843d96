"""Convolutions over time as matrix products over a backend: rows are moments, columns are channels.

    y[t] = b + sum_k W[:, :, k] x[s t + d k - p]      one product of the K shifted inputs, side by side, with [O, K I]

Clauses: FM-CONV-1..5 (specs/audio.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import ShapeError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.encoder_ops import Affine, EncoderOps

_BLOCK_ELEMENTS: Final = 1 << 20  # of shifted inputs side by side at a time: they stay in the caches


@dataclass(frozen=True, slots=True)
class Convolution:
    """affine.weight `[O, K I]`: the K taps' `[O, I]` side by side."""

    affine: Affine
    num_taps: int
    dilation: int = 1
    stride: int = 1
    padding: tuple[int, int] = (0, 0)  # moments of zeros before and behind


@dataclass(frozen=True, slots=True)
class DepthConvolution:
    """Each channel by itself: taps are K rows `[1, C]`; bias `[C]`."""

    taps: tuple[TensorRef, ...]
    bias: TensorRef
    dilation: int


@dataclass(frozen=True, slots=True)
class Upsampling:
    """A transposed convolution as one of `stride` O channels and a cut: moments first : first + length of its rows."""

    inner: Convolution
    stride: int
    num_channels: int
    padding: int
    num_taps: int


def same_padding(num_taps: int, dilation: int = 1) -> tuple[int, int]:
    """Zeros that keep the length: for an even number of taps one more behind.  Pure."""
    reach = dilation * (num_taps - 1)
    return reach // 2, reach - reach // 2


class ConvolutionOps:
    """Stateless; over a backend's linear kernels."""

    def __init__(self, backend: ComputeBackend, owner: str) -> None:
        """Raises UnsupportedError if the backend lacks attention or linear kernels."""
        self.base = EncoderOps(backend, owner)
        self.tensor = self.base.tensor
        self._factory = backend.tensor_factory()

    def host(self, x: TensorRef) -> NDArray[np.float64]:
        """The numbers, exactly, for arithmetic that no kernel offers."""
        return np.asarray(x.to_numpy(), dtype=np.float64)

    def rows(self, values: NDArray[Any]) -> TensorRef:
        """Numbers as float32 on the backend, rounded once."""
        return self._factory.from_numpy(np.ascontiguousarray(values, dtype=np.float32))

    def read(
        self,
        weight: NDArray[Any],
        bias: NDArray[Any] | None,
        *,
        dilation: int = 1,
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
    ) -> Convolution:
        """A convolution of weight `[O, I, K]`.  [FM-CONV-1]"""
        out, width, taps = weight.shape
        matrix = self._like(weight.transpose(0, 2, 1).reshape(out, taps * width), weight)
        offset = None if bias is None else self._like(bias, bias)
        return Convolution(Affine(matrix, offset), taps, dilation, stride, padding)

    def read_depthwise(self, weight: NDArray[Any], bias: NDArray[Any], dilation: int) -> DepthConvolution:
        """A convolution of weight `[C, 1, K]`, each channel by itself, that keeps the length.  [FM-CONV-3]"""
        taps = tuple(self._like(weight[:, :, k].T, weight) for k in range(weight.shape[2]))
        return DepthConvolution(taps, self._like(bias, bias), dilation)

    def read_upsampling(self, weight: NDArray[Any], bias: NDArray[Any], stride: int, padding: int) -> Upsampling:
        """A transposed convolution of weight `[I, O, K]`.  [FM-CONV-4]

        Output moment s j + r, uncut, is sum_q W[:, :, s q + r] x[j - q]: a convolution with ceil(K / s) taps
        whose s O channels are s moments of O channels.
        """
        width, out, taps = weight.shape
        groups = -(-taps // stride)
        padded = np.zeros((width, out, groups * stride), weight.dtype)
        padded[:, :, :taps] = weight
        by_group = padded.reshape(width, out, groups, stride)[:, :, ::-1]  # the earliest input first
        as_forward = by_group.transpose(3, 1, 0, 2).reshape(stride * out, width, groups)
        inner = self.read(as_forward, np.tile(bias, stride), padding=(groups - 1, groups - 1))
        return Upsampling(inner, stride, out, padding, taps)

    def convolve(self, x: TensorRef, part: Convolution) -> TensorRef:
        """`[T, I]` -> `[T', O]`, T' = (T + before + behind - dilation (K - 1) - 1) // stride + 1. Pure. [FM-CONV-1..2]

        Raises ShapeError for another number of channels, or an input shorter than the taps reach.
        """
        length, width = x.shape()
        reach = part.dilation * (part.num_taps - 1)
        before, behind = part.padding
        room = length + before + behind - reach
        if width * part.num_taps != part.affine.weight.shape()[1] or room < 1:
            channels, least = part.affine.weight.shape()[1] // part.num_taps, max(1, 1 + reach - before - behind)
            raise ShapeError(f"convolve: input {x.shape()}, expected {channels} channels and at least {least} moments")
        num_rows = (room - 1) // part.stride + 1
        spare = -(length + before + behind) % part.stride  # so that rows of `stride` moments come out even
        whole = self._padded(x, before, behind + spare)
        block = max(1, _BLOCK_ELEMENTS // (part.num_taps * width))
        pieces = [
            self._product(whole, part, start, min(block, num_rows - start)) for start in range(0, num_rows, block)
        ]
        return pieces[0] if len(pieces) == 1 else self.tensor.concat(pieces, 0)

    def depthwise(self, x: TensorRef, part: DepthConvolution) -> TensorRef:
        """`[T, C]` -> `[T, C]`, zeros around.  Pure.  [FM-CONV-3]"""
        length, width = x.shape()
        before, behind = same_padding(len(part.taps), part.dilation)
        whole = self._padded(x, before, behind)
        total = part.bias
        for k, tap in enumerate(part.taps):
            shifted = whole.view((k * part.dilation, 0), (k * part.dilation + length, width))
            total = self.tensor.add(self.tensor.mul(shifted, tap), total)
        return total

    def upsample(self, x: TensorRef, part: Upsampling) -> TensorRef:
        """`[T, I]` -> `[(T - 1) s - 2 p + K, O]`.  Pure.  [FM-CONV-4]"""
        length = x.shape()[0]
        whole = self.convolve(x, part.inner)
        moments = whole.reshape((whole.shape()[0] * part.stride, part.num_channels))
        count = (length - 1) * part.stride + part.num_taps - 2 * part.padding
        return moments.view((part.padding, 0), (part.padding + count, part.num_channels))

    def leaky_relu(self, x: TensorRef, slope: TensorRef) -> TensorRef:
        """max(x, 0) + slope min(x, 0); slope `[1]`.  Pure.  [FM-CONV-5]"""
        above = self.tensor.relu(x)
        return self.tensor.add(above, self.tensor.mul(self.tensor.sub(x, above), slope))

    def _like(self, values: NDArray[Any], kind: NDArray[Any]) -> TensorRef:
        return self._factory.from_numpy(np.ascontiguousarray(values, dtype=kind.dtype))

    def _padded(self, x: TensorRef, before: int, behind: int) -> TensorRef:
        if not before and not behind:
            return x
        width = x.shape()[1]
        parts = [self._zeros(before, width, x), x, self._zeros(behind, width, x)]
        return self.tensor.concat([part for part in parts if part.shape()[0]], 0)

    def _zeros(self, num_rows: int, width: int, like: TensorRef) -> TensorRef:
        return self._factory.zeros((num_rows, width), like.dtype(), like.device())

    def _product(self, whole: TensorRef, part: Convolution, start: int, count: int) -> TensorRef:
        """Outputs start : start + count."""
        width = whole.shape()[1]
        step = part.stride
        first, last = start * step, (start + count - 1) * step
        if part.num_taps == 1 and step == 1:
            taken = whole.view((first, 0), (last + 1, width))
        else:
            taken = self.tensor.concat(
                [self._every(whole, first + k * part.dilation, count, step) for k in range(part.num_taps)], 1
            )
        return self.base.affine(taken, part.affine)

    def _every(self, whole: TensorRef, first: int, count: int, step: int) -> TensorRef:
        """Rows first, first + step, ..., `count` of them."""
        length, width = whole.shape()
        if step == 1:
            return whole.view((first, 0), (first + count, width))
        by_step = whole.reshape((length // step, step * width))
        row, column = divmod(first, step)
        return by_step.view((row, column * width), (row + count, (column + 1) * width))
