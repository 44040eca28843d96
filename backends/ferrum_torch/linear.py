"""Matrix products, ggml-packed weights and the embedding table.

float32 products accumulate in float32. On the CPU 16-bit operands are widened first, a block of the weight at a time;
on a GPU the tensor cores multiply them exactly and accumulate in float32. Either way the result is rounded once.
Clauses: BK-TORCH-10, BK-TORCH-15..16 (specs/backend_torch.md), KN-LINEAR-*, KN-EMBED-* (specs/kernels.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from ferrum_ref.errors import InvalidParameterError, ShapeError, UnsupportedError
from ferrum_ref.interfaces.kernel_ops import Ints, QuantScheme
from ferrum_ref.interfaces.tensor import matmul_output_shape
from ferrum_torch.integers import as_integers
from ferrum_torch.rounding import common_type, round_to, widen

ELEMENTS_AT_A_TIME = 1 << 18  # of a narrow weight, widened: 1 MB of float32, within one core's second-level cache
GGML_GROUP = 32
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


def quantized_linear(x: torch.Tensor, packed: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """y = x @ W.T, W the float32 values of ggml blocks of 32 weights: q4_0 (q - 8) d, q8_0 q d

    x (..., in); packed (out, in/32 * block bytes) uint8, a block being a float16 scale d and its 4- or 8-bit quanta.
    Result in x's type. Pure.
    Raises UnsupportedError for groups other than 32; ShapeError for other shapes or element types.
    """
    if not isinstance(scheme, QuantScheme.Q4_0 | QuantScheme.Q8_0) or scheme.group_size != GGML_GROUP:
        raise UnsupportedError(
            f"quantized_linear: scheme: got {scheme}, expected Q4_0 or Q8_0 with group_size={GGML_GROUP}, "
            "ggml's blocks; dequantise and call linear"
        )
    block_bytes, unpack = (18, unpack_q4_0) if isinstance(scheme, QuantScheme.Q4_0) else (34, unpack_q8_0)
    if (
        packed.dtype is not torch.uint8
        or packed.ndim != 2
        or x.ndim < 1
        or packed.shape[1] * GGML_GROUP != x.shape[-1] * block_bytes
    ):
        raise ShapeError(
            f"quantized_linear: input {tuple(x.shape)} and packed_weight {tuple(packed.shape)} of {packed.dtype}, "
            f"expected (..., in) and uint8 (out, in/{GGML_GROUP}*{block_bytes})"
        )
    rows = widen(x, "quantized_linear").reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = in_blocks(rows, packed, unpack)
    return round_to(y, x.dtype).reshape(*x.shape[:-1], packed.shape[0])


def in_blocks(rows: torch.Tensor, weight: torch.Tensor, values: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """rows (M, in) float32 times values(weight).T, some rows of the weight at a time, so that they stay in cache."""
    num_outputs = weight.shape[0]
    y = torch.empty((rows.shape[0], num_outputs), dtype=torch.float32, device=rows.device)
    step = max(1, ELEMENTS_AT_A_TIME // max(1, rows.shape[1])) if rows.is_cpu else max(1, num_outputs)
    for start in range(0, num_outputs, step):
        block = values(weight[start : start + step])
        y[:, start : start + step] = torch.nn.functional.linear(rows, block)
    return y


def unpack_q4_0(packed: torch.Tensor) -> torch.Tensor:
    """uint8 (out, blocks * 18) -> float32 (out, blocks * 32). Low nibbles are the first 16 weights of a block. Pure."""
    blocks = packed.reshape(packed.shape[0], packed.shape[1] // 18, 18)
    quanta = torch.cat((blocks[..., 2:] & 15, blocks[..., 2:] >> 4), -1)
    return (_scales(blocks) * (quanta.to(torch.float32) - 8.0)).flatten(1)


def unpack_q8_0(packed: torch.Tensor) -> torch.Tensor:
    """uint8 (out, blocks * 34) -> float32 (out, blocks * 32). Pure."""
    blocks = packed.reshape(packed.shape[0], packed.shape[1] // 34, 34)
    return (_scales(blocks) * blocks[..., 2:].view(torch.int8).to(torch.float32)).flatten(1)


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
    matmul_output_shape(tuple(a.shape), tuple(b.shape))
    product = torch.matmul(widen(a, "matmul"), widen(b, "matmul"))
    return round_to(product, common_type("matmul", a.dtype, b.dtype))


def _scales(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[..., :2].contiguous().view(torch.float16).to(torch.float32)
