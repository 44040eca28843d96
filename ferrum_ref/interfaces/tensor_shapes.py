"""Shape arithmetic: upstream's `tensor::utils`.   Clauses: TN-SHAPE-1..5 in specs/tensor.md."""

from __future__ import annotations

from collections.abc import Sequence

from ferrum_ref.errors import ShapeError
from ferrum_ref.types.parity_mode import ParityMode


def matmul_output_shape(
    a_shape: Sequence[int], b_shape: Sequence[int], *, parity_mode: ParityMode = ParityMode.REFERENCE
) -> list[int]:
    """Shape of `a @ b`: `[.., m, k] x [.., k, n] -> [broadcast(..), m, n]` (D-61). Pure.

    UPSTREAM: a's leading axes, whatever b's are.
    Raises BackendError if a rank is below 2, the k differ, or the leading axes do not broadcast.  [TN-SHAPE-1..2]
    """
    if len(a_shape) < 2 or len(b_shape) < 2:
        raise ShapeError(
            f"matmul: shapes {tuple(a_shape)} and {tuple(b_shape)}, expected ranks of at least 2; reshape vectors first"
        )
    if a_shape[-1] != b_shape[-2]:
        raise ShapeError(
            f"matmul: inner dimensions {a_shape[-1]}, {b_shape[-2]} of {tuple(a_shape)} and {tuple(b_shape)} differ; "
            "transpose one operand or use linear()"
        )
    upstream = parity_mode is ParityMode.UPSTREAM
    batch = list(a_shape[:-2]) if upstream else broadcast_shapes(a_shape[:-2], b_shape[:-2])
    if batch is None:
        raise ShapeError(
            f"matmul: leading axes of {tuple(a_shape)} and {tuple(b_shape)} do not broadcast; expected equal or 1"
        )
    return [*batch, a_shape[-2], b_shape[-1]]


def are_broadcastable(shape1: Sequence[int], shape2: Sequence[int]) -> bool:
    """True when, aligned at the right, dims are equal or one of them is 1; missing dims count as 1 (D-32).

    Pure.  [TN-SHAPE-3]
    """
    return all(a == b or a == 1 or b == 1 for a, b in zip(reversed(shape1), reversed(shape2), strict=False))


def broadcast_shapes(
    shape1: Sequence[int], shape2: Sequence[int], *, parity_mode: ParityMode = ParityMode.REFERENCE
) -> list[int] | None:
    """The common shape under numpy's rules, or None when there is none (D-32). Pure.  [TN-SHAPE-3..5]

    A dim of 1 takes the other's size, also when that is 0: `(0,)` with `(1,)` gives `[0]`.
    UPSTREAM: the larger of the two dims, as a release build gives it: `[1]`.
    """
    if not are_broadcastable(shape1, shape2):
        return None
    longer, shorter = (shape1, shape2) if len(shape1) >= len(shape2) else (shape2, shape1)
    result = [int(dim) for dim in longer]
    offset = len(longer) - len(shorter)
    for axis, dim in enumerate(shorter, offset):
        if parity_mode is ParityMode.UPSTREAM:
            result[axis] = max(result[axis], int(dim))
        elif result[axis] == 1:
            result[axis] = int(dim)
    if parity_mode is ParityMode.UPSTREAM:
        result[:offset] = [max(dim, 1) for dim in result[:offset]]  # a missing dim counts as 1
    return result
