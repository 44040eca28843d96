"""Projections by weights that stay packed.

Clauses: BK-TORCH-16, BK-TORCH-32, BK-TORCH-39..40 (specs/backend_torch.md); KN-QLINEAR-* (kernels.md), QT-MATRIX-3.
"""

from __future__ import annotations

import math

import torch

from ferrum_ref.errors import ShapeError
from ferrum_ref.interfaces.kernel_ops import QuantScheme
from ferrum_torch.fusing import Run, directly
from ferrum_torch.linear import in_runs
from ferrum_torch.packed_weights import Beside, packed_weight
from ferrum_torch.rounding import round_to, widen
from ferrum_torch.row_formats import half


def quantized_linear(
    x: torch.Tensor, packed: torch.Tensor, scheme: QuantScheme, beside: Beside, run: Run = directly
) -> torch.Tensor:
    """y = x @ W.T, W the float32 values of the packed weight

    x (..., in); packed as `scheme` says; result (..., out) in x's type. Some rows of W at a time are unpacked, and
    never all on the CPU; x is never quantised. Pure. Raises what `packed_weight` raises; ShapeError for another width.
    """
    weight = packed_weight(packed, scheme, beside)
    if x.ndim < 1 or x.shape[-1] != weight.num_inputs:
        raise ShapeError(
            f"quantized_linear: input {tuple(x.shape)} and packed_weight {tuple(packed.shape)}, expected "
            f"(..., {weight.num_inputs}) for that weight"
        )
    rows = widen(x, "quantized_linear").reshape(math.prod(x.shape[:-1]), weight.num_inputs)
    one_kernel = {"q4_0": row_by_q4_0, "q8_0": row_by_q8_0}.get(scheme.kind)
    if len(rows) == 1 and one_kernel is not None and run is not directly:  # it reads the packed weight only
        y = run(one_kernel, rows[0], packed)
    else:
        y = in_runs(rows, weight.num_outputs, weight.rows, weight.row_step)
    return round_to(y, x.dtype).reshape(*x.shape[:-1], weight.num_outputs)


def row_by_q4_0(row: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """y[o] = sum over blocks of d sum_j (q_j - 8) x_j; row (in,), packed (out, blocks * 18) -> (out,) float32. Pure."""
    blocks = packed.reshape(packed.shape[0], packed.shape[1] // 18, 18)
    x = row.reshape(1, packed.shape[1] // 18, 2, 16)
    low, high = (blocks[..., 2:] & 15).to(torch.float32) - 8.0, (blocks[..., 2:] >> 4).to(torch.float32) - 8.0
    sums = (low * x[:, :, 0]).sum(-1) + (high * x[:, :, 1]).sum(-1)
    return (sums * half(blocks, 0).squeeze(-1)).sum(-1)


def row_by_q8_0(row: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """y[o] = sum over blocks of d sum_j q_j x_j; row (in,), packed (out, blocks * 34) -> (out,) float32. Pure."""
    blocks = packed.reshape(packed.shape[0], packed.shape[1] // 34, 34)
    quanta = blocks[..., 2:].view(torch.int8).to(torch.float32)
    sums = (quanta * row.reshape(1, packed.shape[1] // 34, 32)).sum(-1)
    return (sums * half(blocks, 0).squeeze(-1)).sum(-1)
