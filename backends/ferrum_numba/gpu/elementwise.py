"""Activations, broadcast arithmetic and rotary embedding.   Clauses: BK-NCUDA-9, BK-NCUDA-11."""

from __future__ import annotations

from ferrum_numba.gpu.integers import as_integers, check_below
from ferrum_numba.gpu.kernels import elementwise as kernels
from ferrum_numba.gpu.kernels import rope
from ferrum_numba.gpu.operands import fitting
from ferrum_numba.gpu.storage import common_type, storage_of
from ferrum_numba.gpu.tensor import NumbaTensor
from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.interfaces.kernel_ops import Ints
from ferrum_ref.interfaces.tensor import are_broadcastable, broadcast_shapes


def unary(name: str, x: NumbaTensor) -> NumbaTensor:
    """silu, gelu, gelu_tanh or relu of every element, rounded once. Pure."""
    kind = storage_of(x.dtype(), name)
    result = NumbaTensor.empty(x.runtime, x.shape(), x.dtype())
    x.runtime.launch_each(
        kernels.unary, (name, kind, kind), kernels.packs_of(x.numel()), x.flat(), result.array, x.numel()
    )
    return result


def gelu(x: NumbaTensor, approximate: str) -> NumbaTensor:
    """The erf form, or with "tanh" the tanh form. Pure. Raises InvalidParameterError for another `approximate`."""
    if approximate not in ("none", "tanh"):
        raise InvalidParameterError(f"gelu: approximate: got {approximate!r}, expected 'none' or 'tanh'")
    return unary("gelu" if approximate == "none" else "gelu_tanh", x)


def binary(operation: str, a: NumbaTensor, b: NumbaTensor) -> NumbaTensor:
    """add, sub, mul or div, broadcast (D-51), in the common float type. Pure. Raises ShapeError."""
    if a.shape() != b.shape() and not are_broadcastable(a.shape(), b.shape()):
        raise ShapeError(
            f"{operation}: shapes {a.shape()} and {b.shape()} do not broadcast; "
            "expected dimensions, aligned at the right, to be equal or 1"
        )
    kinds = (storage_of(a.dtype(), operation), storage_of(b.dtype(), operation))
    shape = tuple(broadcast_shapes(a.shape(), b.shape()) or ())
    result = NumbaTensor.empty(a.runtime, shape, common_type(operation, a.dtype(), b.dtype()))
    count = result.numel()
    if count:
        left, right = _repeating(a, shape), _repeating(b, shape)
        types = (operation, *kinds, storage_of(result.dtype(), operation))
        sizes = (count, left.numel(), right.numel())
        a.runtime.launch_each(
            kernels.binary, types, kernels.packs_of(count), left.flat(), right.flat(), result.array, *sizes
        )
    return result


def silu_mul(gate: NumbaTensor, up: NumbaTensor) -> NumbaTensor:
    """gate * sigmoid(gate) * up, rounded once to gate's type. Pure. Raises ShapeError unless the shapes are equal."""
    operation = "silu_mul"
    if gate.shape() != up.shape():
        raise ShapeError(f"{operation}: gate {gate.shape()} and up {up.shape()}, expected equal shapes")
    kind = storage_of(gate.dtype(), operation)
    result = NumbaTensor.empty(gate.runtime, gate.shape(), gate.dtype())
    count = gate.numel()
    types = (operation, kind, storage_of(up.dtype(), operation), kind)
    gate.runtime.launch_each(
        kernels.binary, types, kernels.packs_of(count), gate.flat(), up.flat(), result.array, count, count, count
    )
    return result


def rotary_embedding(x: NumbaTensor, cos: NumbaTensor, sin: NumbaTensor, positions: Ints) -> NumbaTensor:
    """Pair (i, i + D/2) of every head turned by its token's angle (D-15). x (B, T, H, D), tables (P, D/2). Pure.

    Raises ShapeError for other shapes; InvalidParameterError for a position outside [0, P).
    """
    operation = "rotary_embedding"
    if x.ndim() != 4 or cos.ndim() != 2 or cos.shape() != sin.shape() or x.shape()[3] != 2 * cos.shape()[1]:
        raise ShapeError(
            f"{operation}: x {x.shape()}, cos_cache {cos.shape()}, sin_cache {sin.shape()}; "
            "expected (B, T, H, D) and tables (P, D/2)"
        )
    batch, num_tokens, num_heads, head_dim = x.shape()
    index = as_integers(operation, "position_ids", positions)
    if len(index) != num_tokens:
        raise ShapeError(f"{operation}: {len(index)} position_ids for {num_tokens} tokens, expected one for each")
    cos, sin = fitting(operation, x, cos), fitting(operation, x, sin)
    result = NumbaTensor.empty(x.runtime, x.shape(), x.dtype())
    if x.numel():
        check_below(operation, "position_ids", index, cos.shape()[0], "build longer tables or shorten the sequence")
        types = (storage_of(x.dtype(), operation), storage_of(cos.dtype(), operation))
        half = head_dim // 2
        arrays = (x.flat(), cos.flat(), sin.flat(), x.runtime.integers(index), result.array)
        grid, block = rope.blocks_for(batch, num_tokens, num_heads, half)
        x.runtime.launch(rope.rotary_embedding, types, grid, block, *arrays, num_heads, half)
    return result


def _repeating(tensor: NumbaTensor, shape: tuple[int, ...]) -> NumbaTensor:
    """The tensor itself where repeating its elements in order gives `shape`, else broadcast to it."""
    own = tensor.shape()
    trimmed = own[next((axis for axis, dim in enumerate(own) if dim != 1), len(own)) :]
    if trimmed == shape[len(shape) - len(trimmed) :]:
        return tensor
    return tensor.broadcast(shape)
