"""Matrix products and the embedding table.

float32 products accumulate in float32. On the CPU 16-bit operands are widened first, a block of the weight at a time;
on a GPU the tensor cores multiply them exactly and accumulate in float32. Either way the result is rounded once.
Clauses: BK-TORCH-10, BK-TORCH-15 (specs/backend_torch.md), KN-LINEAR-*, KN-EMBED-* (specs/kernels.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.interfaces.kernel_ops import Ints
from ferrum_ref.interfaces.tensor import matmul_output_shape
from ferrum_torch.integers import as_integers
from ferrum_torch.rounding import check_float, common_type, round_to, widen

ELEMENTS_AT_A_TIME = 1 << 18  # of a narrow weight, widened: 1 MB of float32, within one core's second-level cache
GPU_ELEMENTS_AT_A_TIME = 1 << 24  # 64 MB: enough to keep a GPU busy between launches
HALVES = frozenset({torch.float16, torch.bfloat16})


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """y = x @ weight.T; x (..., in) of rank >= 1, weight (out, in); result in x's type. Pure. Raises ShapeError."""
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"linear: input {tuple(x.shape)} and weight {tuple(weight.shape)}, expected (..., in) and (out, in); "
            "weights are stored output first"
        )
    if x.dtype is torch.float32 and weight.dtype is torch.float32:
        return torch.nn.functional.linear(x, weight)
    rows = x.reshape(math.prod(x.shape[:-1]), weight.shape[1])
    if x.is_cuda and x.dtype is weight.dtype and x.dtype in HALVES and x.numel() and weight.numel():
        y = torch.mm(rows, weight.t(), out_dtype=torch.float32)
    elif weight.dtype is torch.float32:
        y = torch.nn.functional.linear(widen(rows, "linear"), weight)
    else:
        y = in_blocks(widen(rows, "linear"), weight, lambda block: widen(block, "linear"))
    return round_to(y, x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def in_blocks(rows: torch.Tensor, weight: torch.Tensor, values: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """rows (M, in) float32 times values(weight).T, some rows of the weight at a time, so that they stay in cache."""
    return in_runs(rows, weight.shape[0], lambda start, stop: values(weight[start:stop]))


def in_runs(
    rows: torch.Tensor, num_outputs: int, values: Callable[[int, int], torch.Tensor], row_step: int = 1
) -> torch.Tensor:
    """The same for a weight whose rows start to stop - 1 values(start, stop) gives, start a multiple of row_step."""
    y = torch.empty((rows.shape[0], num_outputs), dtype=torch.float32, device=rows.device)
    elements = ELEMENTS_AT_A_TIME if rows.is_cpu else GPU_ELEMENTS_AT_A_TIME
    step = max(1, elements // max(1, rows.shape[1] * row_step)) * row_step
    for start in range(0, num_outputs, step):
        stop = min(start + step, num_outputs)
        y[:, start:stop] = torch.nn.functional.linear(rows, values(start, stop))
    return y


def embedding(table: torch.Tensor, ids: Ints) -> torch.Tensor:
    """y[t] = table[ids[t]]; table (V, E) any type, ids T integers; result (T, E). Pure.

    Raises ShapeError if table is not a matrix; InvalidParameterError for an id outside [0, V) or not an integer.
    """
    if table.ndim != 2:
        raise ShapeError(f"embedding: table {tuple(table.shape)}, expected (V, E)")
    index = as_integers("embedding", "ids", ids)
    if index.size and not 0 <= int(index.min()) <= int(index.max()) < table.shape[0]:
        bad = index[(index < 0) | (index >= table.shape[0])]
        raise InvalidParameterError(
            f"embedding: ids: got {int(bad[0])}, expected 0 <= id < {table.shape[0]}; "
            "the tokenizer and the model disagree"
        )
    return table.index_select(0, torch.from_numpy(np.ascontiguousarray(index)).to(table.device))


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b: [.., m, k] x [.., k, n] -> [.., m, n] in the common type; leading axes broadcast. Pure."""
    target = check_matmul(a, b)
    return round_to(torch.matmul(widen(a, "matmul"), widen(b, "matmul")), target)


def check_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.dtype:
    """The element type of a @ b. Pure. Raises ShapeError for shapes, BackendError for types that do not multiply."""
    matmul_output_shape(tuple(a.shape), tuple(b.shape))
    check_float(a, "matmul")
    check_float(b, "matmul")
    return common_type("matmul", a.dtype, b.dtype)
