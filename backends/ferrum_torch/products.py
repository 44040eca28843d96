"""Matrix products of a list of pairs, several in one call of torch.

Clauses: BK-TORCH-27 (specs/backend_torch.md), TN-BATCH-1 (specs/tensor.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ferrum_torch import linear
from ferrum_torch.rounding import round_to, widen

Pair = tuple[torch.Tensor, torch.Tensor]
# On a GPU, copying operands of up to 1 MB together costs less than the launches that it saves. On a CPU a call costs
# about 3 us and the copy always more than that: measured with pairs from (1, 64) @ (64, 64) up, batches of 2 to 32.
GPU_ELEMENTS_WORTH_COPYING = 1 << 18
CPU_ELEMENTS_WORTH_COPYING = 0


def products(pairs: Sequence[Pair]) -> list[torch.Tensor]:
    """a @ b of every pair, in their order. The pairs have been checked. Pure.

    Pairs with one and the same matrix b are one product over the rows of all a's. Pairs of equal shapes and types that
    are small enough are stacked into one batched product. Results of one call are views of one piece of memory.
    """
    results: dict[int, torch.Tensor] = {}
    for chosen in groups(pairs):
        members = [pairs[index] for index in chosen]
        results.update(zip(chosen, _products_of_group(members), strict=True))
    return [results[index] for index in range(len(pairs))]


def groups(pairs: Sequence[Pair]) -> list[list[int]]:
    """Which pairs belong into one call: indices, every pair in one group. Pure."""
    sharing: dict[tuple[object, ...], list[int]] = {}
    for index, (a, b) in enumerate(pairs):
        sharing.setdefault((id(b), a.dtype) if b.ndim == 2 else (index,), []).append(index)
    found: dict[tuple[object, ...], list[int]] = {}
    for chosen in sharing.values():
        a, b = pairs[chosen[0]]
        worth_copying = CPU_ELEMENTS_WORTH_COPYING if a.is_cpu else GPU_ELEMENTS_WORTH_COPYING
        if len(chosen) == 1 and a.numel() + b.numel() <= worth_copying:
            found.setdefault((a.shape, b.shape, a.dtype, b.dtype, a.device), []).extend(chosen)
        else:
            found[(chosen[0],)] = chosen
    return list(found.values())


def _products_of_group(pairs: Sequence[Pair]) -> Sequence[torch.Tensor]:
    if len(pairs) == 1:
        return [linear.matmul(*pairs[0])]
    if all(b is pairs[0][1] for _, b in pairs) and pairs[0][1].ndim == 2:
        return of_one_matrix([a for a, _ in pairs], pairs[0][1])
    return stacked([a for a, _ in pairs], [b for _, b in pairs])


def of_one_matrix(lefts: Sequence[torch.Tensor], b: torch.Tensor) -> list[torch.Tensor]:
    """a @ b for every a (.., m, k) of one type, as one product of all their rows with b (k, n). Pure."""
    rows = [a.reshape(-1, b.shape[0]) if a.numel() else a.new_empty((_num_rows(a), b.shape[0])) for a in lefts]
    pieces = torch.split(linear.matmul(torch.cat(rows), b), [len(piece) for piece in rows])
    return [piece.view(*a.shape[:-1], b.shape[1]) for a, piece in zip(lefts, pieces, strict=True)]


def stacked(lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """a @ b for pairs of equal shapes and types, as one batched product. Pure."""
    a, b = torch.stack(list(lefts)), torch.stack(list(rights))
    rank = max(a.ndim, b.ndim)
    a = a.reshape(len(a), *(1,) * (rank - a.ndim), *a.shape[1:])
    b = b.reshape(len(b), *(1,) * (rank - b.ndim), *b.shape[1:])
    product = torch.matmul(widen(a, "batch_matmul"), widen(b, "batch_matmul"))
    return round_to(product, linear.check_matmul(lefts[0], rights[0])).unbind(0)


def _num_rows(a: torch.Tensor) -> int:
    return a.shape[:-1].numel()
