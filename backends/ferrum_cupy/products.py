"""Matrix products of a list of pairs, several in one call of cuBLAS.  Clauses: BK-CUPY-47, TN-BATCH-1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from ferrum_cupy import linear
from ferrum_cupy.runtime import Runtime
from ferrum_cupy.tensor import CupyTensor

Pair = tuple[CupyTensor, CupyTensor]
ELEMENTS_WORTH_COPYING: Final = 1 << 18  # copying up to 1 MB together costs less than the launches that it saves


def products(runtime: Runtime, pairs: Sequence[Pair]) -> list[CupyTensor]:
    """a @ b of every pair, in their order. The pairs have been checked. Pure.

    Pairs with one and the same matrix b are one product over the rows of all a's. Pairs of equal shapes and types that
    are small enough are stacked into one batched product. Results of one call are views of one piece of memory.
    """
    results: dict[int, CupyTensor] = {}
    for chosen in groups(pairs):
        members = [pairs[index] for index in chosen]
        results.update(zip(chosen, _products_of_group(runtime, members), strict=True))
    return [results[index] for index in range(len(pairs))]


def groups(pairs: Sequence[Pair]) -> list[list[int]]:
    """Which pairs belong into one call: indices, every pair in one group. Pure."""
    sharing: dict[tuple[object, ...], list[int]] = {}
    for index, (a, b) in enumerate(pairs):
        sharing.setdefault((id(b.array), a.kind, b.kind) if b.array.ndim == 2 else (index,), []).append(index)
    found: dict[tuple[object, ...], list[int]] = {}
    for chosen in sharing.values():
        a, b = pairs[chosen[0]]
        if len(chosen) == 1 and a.array.size + b.array.size <= ELEMENTS_WORTH_COPYING:
            found.setdefault((a.shape(), b.shape(), a.kind, b.kind), []).extend(chosen)
        else:
            found[(chosen[0],)] = chosen
    return list(found.values())


def _products_of_group(runtime: Runtime, pairs: Sequence[Pair]) -> Sequence[CupyTensor]:
    if len(pairs) == 1:
        return [linear.matmul(runtime, *pairs[0])]
    b = pairs[0][1]
    if b.array.ndim == 2 and all(other.array is b.array for _, other in pairs):
        return of_one_matrix(runtime, [left for left, _ in pairs], b)
    return stacked(runtime, pairs)


def of_one_matrix(runtime: Runtime, lefts: Sequence[CupyTensor], b: CupyTensor) -> list[CupyTensor]:
    """a @ b for every a (.., m, k) of one type, as one product of all their rows with b (k, n). Pure."""
    xp, (inner, columns) = runtime.machine.xp, b.shape()
    rows = [left.array.reshape(math.prod(left.shape()[:-1]), inner) for left in lefts]
    product = linear.matmul(runtime, CupyTensor(runtime.machine, xp.concatenate(rows), lefts[0].kind), b)
    results, start = [], 0
    for left, part in zip(lefts, rows, strict=True):
        piece = product.array[start : start + len(part)].reshape(*left.shape()[:-1], columns)
        results.append(CupyTensor(runtime.machine, piece, product.kind))
        start += len(part)
    return results


def stacked(runtime: Runtime, pairs: Sequence[Pair]) -> list[CupyTensor]:
    """a @ b for pairs of equal shapes and types, as one batched product. Pure."""
    machine, xp = runtime.machine, runtime.machine.xp
    rank = max(tensor.array.ndim for tensor in pairs[0])
    both = []
    for position, like in enumerate(pairs[0]):
        array = xp.stack([pair[position].array for pair in pairs])
        array = array.reshape(len(pairs), *(1,) * (rank - like.array.ndim), *like.shape())
        both.append(CupyTensor(machine, array, like.kind))
    product = linear.matmul(runtime, *both)
    return [CupyTensor(machine, product.array[index], product.kind) for index in range(len(pairs))]
