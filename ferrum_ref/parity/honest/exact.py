"""Operations that compute nothing, and choices: different ways to the one right answer."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from ferrum_ref.interfaces.kernel_ops import SamplingParams
from ferrum_ref.kernels.rounding import cast as kernel_cast
from ferrum_ref.parity import oracle
from ferrum_ref.parity.honest.sums import F32, Kernel
from ferrum_ref.parity.ops.cast import TARGETS
from ferrum_ref.parity.ops.operation import Inputs, Operation
from ferrum_ref.parity.ops.shaping import _Moving
from ferrum_ref.parity.units import Array

MOVING_FORMS = ("plain", "codes", "indices", "one by one")
CHOICE_FORMS = ("plain", "tiles", "tree", "sorted")


def moving(operation: Operation, form: str) -> Kernel:
    """A rearrangement: of the elements, of their codes, by indices into all elements, or element by element."""

    def run(inputs: Inputs) -> tuple[Array, ...]:
        if not isinstance(operation, _Moving):
            return ()
        arrays = list(inputs.arrays.values())
        if form == "plain":
            return tuple(np.array(piece) for piece in operation.values(arrays, inputs.case))
        dtype = arrays[0].dtype
        if form == "codes":
            codes = [np.ascontiguousarray(array).view(f"u{dtype.itemsize}") for array in arrays]
            return tuple(np.ascontiguousarray(piece).view(dtype) for piece in operation.values(codes, inputs.case))
        starts = np.cumsum([1, *(array.size for array in arrays)])
        indices = [start + np.arange(array.size).reshape(array.shape) for start, array in zip(starts, arrays)]
        padding = np.zeros(1, dtype=dtype)
        everything = np.concatenate([padding, *(np.ascontiguousarray(array).reshape(-1) for array in arrays)])
        moved = [np.asarray(piece) for piece in operation.values(indices, inputs.case)]
        if form == "indices":
            return tuple(everything[piece] for piece in moved)
        outputs = [np.empty(piece.shape, dtype=dtype) for piece in moved]
        for output, piece in zip(outputs, moved, strict=True):
            for place in np.ndindex(piece.shape):
                output[place] = everything[piece[place]]
        return tuple(outputs)

    return run


def embedding(form: str) -> Kernel:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        table, ids = inputs.arrays["table"], inputs.settings["ids"]
        if form == "plain":
            return (np.take(table, ids, axis=0),)
        if form == "tiles":
            return (table[ids],)
        if form == "tree":
            return (np.ascontiguousarray(table).view(f"u{table.dtype.itemsize}")[ids].view(table.dtype),)
        out = np.empty((len(ids), table.shape[1]), dtype=table.dtype)
        for row in np.argsort(ids, kind="stable"):
            out[row] = table[ids[row]]
        return (out,)

    return run


def write_kv(form: str) -> Kernel:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        cache, slots, rows = inputs.arrays["cache"].copy(), inputs.settings["slots"], inputs.arrays["rows"]
        flat = cache.reshape(-1, *cache.shape[2:])
        kept = slots >= 0
        if form == "plain":
            flat[slots[kept]] = rows[kept]
        elif form == "tiles":
            np.put_along_axis(flat, slots[kept][:, None, None], rows[kept], axis=0)
        else:
            order = np.flatnonzero(kept)
            for row in order if form == "tree" else order[::-1]:
                flat[slots[row]] = rows[row]
        return (cache,)

    return run


def argmax(form: str) -> Kernel:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        row = inputs.arrays["logits"].reshape(-1).astype(F32)
        return (np.array(first_maximum(row, form), dtype=np.int64),)

    return run


def first_maximum(row: Array, form: str = "plain") -> int:
    """The first of the largest: at once, by tiles, by a tree of comparisons, or by a stable sort."""
    if form == "tiles":
        starts = range(0, row.size, 32)
        best = [start + int(np.argmax(row[start : start + 32])) for start in starts]
        return max(best, key=lambda index: (row[index], -index))
    if form == "tree":
        indices = list(range(row.size))
        while len(indices) > 1:
            pairs = [indices[start : start + 2] for start in range(0, len(indices), 2)]
            indices = [pair[-1] if len(pair) > 1 and row[pair[1]] > row[pair[0]] else pair[0] for pair in pairs]
        return indices[0]
    if form == "sorted":
        return int(np.argsort(-row, kind="stable")[0])
    return int(np.argmax(row))


def cast(form: str) -> Kernel:
    """to_dtype: the reference's, through float64, by adding to the code, or in pieces."""

    def run(inputs: Inputs) -> tuple[Array, ...]:
        x = np.asarray(inputs.arrays["x"])
        name = inputs.storage.name if inputs.case.probe == "from fp8" else inputs.case.sizes["to"]
        dtype = TARGETS[name][1]
        with np.errstate(all="ignore"):
            if form == "tiles":
                return (kernel_cast(x.astype(np.float64), dtype),)
            if form == "tree" and dtype == ml_dtypes.bfloat16:
                return (_bf16_by_code(x.astype(F32)),)
            if form == "sorted" and x.size:
                halves = np.array_split(np.ascontiguousarray(x).reshape(-1), 2)
                return (np.concatenate([kernel_cast(half, dtype) for half in halves]).reshape(x.shape),)
            return (np.array(kernel_cast(x, dtype)),)

    return run


def _bf16_by_code(x: Array) -> Array:
    """Round to nearest even by adding half a unit, and the last bit that stays, to the code of a float32."""
    codes = np.ascontiguousarray(x).view(np.uint32)
    rounded = (codes + np.uint32(0x7FFF) + ((codes >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (codes >> np.uint32(16)) | np.uint32(0x40)
    result: Array = np.where(np.isnan(x), quiet, rounded).astype(np.uint16).view(ml_dtypes.bfloat16)
    return result


Draw = Callable[[Array, Array], Array]


def sample_token(form: str) -> Kernel:
    """Seeds to indices: running sums at once, in tiles, as remainders, or over the kept ids only."""

    def run(inputs: Inputs) -> tuple[Array, ...]:
        params: SamplingParams = inputs.settings["params"]
        _, p = oracle.sampling_law(inputs.exact("logits").reshape(-1), params)
        uniform = oracle.uniforms(inputs.settings["seeds"])
        return (drawn(p, uniform, form),)

    return run


def drawn(p: Array, uniform: Array, form: str = "plain") -> Array:
    """The first index whose running sum exceeds u times the total."""
    if form == "tiles":
        tiles = [p[start : start + 16] for start in range(0, p.size, 16)]
        before = np.cumsum([0.0, *(tile.sum() for tile in tiles[:-1])])
        running = np.concatenate([start + np.cumsum(tile) for start, tile in zip(before, tiles)])
    elif form == "tree":
        running = 1.0 - np.append(np.cumsum(p[::-1])[::-1][1:], 0.0)
        running = np.where(p > 0.0, running, np.concatenate([[0.0], np.maximum.accumulate(running)[:-1]]))
    elif form == "sorted":
        kept = np.flatnonzero(p > 0.0)
        inside = np.searchsorted(np.cumsum(p[kept]), uniform * p[kept].sum(), side="right")
        return np.asarray(kept[np.minimum(inside, kept.size - 1)], dtype=np.int64)
    else:
        running = np.cumsum(p)
    index = np.searchsorted(running, uniform * running[-1], side="right")
    return np.asarray(np.minimum(index, np.flatnonzero(p > 0.0)[-1]), dtype=np.int64)
