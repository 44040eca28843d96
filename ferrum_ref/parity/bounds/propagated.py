"""How far the results of a chain of operations may lie from their float64 values, to first order.

    y = f_n(... f_1(x)),   dy = sum over operations i of J_i d_i,   d_i the error that operation i itself makes

    det     sum_i |J_i| b_i            every error at its bound b_i, in the worst direction
    prob    lambda (sum_i J_i^2 s_i^2)^(1/2)    independent errors of mean zero (Hoeffding); s_i^2 sums the squares of
            the bounds of the roundings that make up d_i

J_i is the exact derivative of the results by the output of operation i, taken backwards over the float64 run: nothing
is widened on the way, as it would be if magnitudes were multiplied operation by operation.  Clause: PA-DECODE-3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ferrum_ref.parity.units import Array

Pull = Callable[[Array], Array]


@dataclass(frozen=True, slots=True)
class Node:
    """A value of the chain: where it came from, and the bounds of the error that was made there."""

    index: int
    value: Array
    sources: tuple[tuple[Node, Pull], ...]
    worst: Array | None
    spread: Array | None


class Tape:
    """The operations of one float64 run, in order. A pull takes derivatives `(R, *output)` to `(R, *input)`."""

    def __init__(self) -> None:
        self._nodes: list[Node] = []

    def add(
        self,
        value: Array,
        sources: Sequence[tuple[Node | None, Pull]],
        worst: Array | None = None,
        spread: Array | None = None,
    ) -> Node:
        """Record a value; a source None is an input that is exact. worst, spread: of this operation's own error."""
        known = tuple((node, pull) for node, pull in sources if node is not None)
        self._nodes.append(Node(len(self._nodes), value, known, worst, spread))
        return self._nodes[-1]

    def errors(self, results: Sequence[Node], combined: Array | None = None) -> tuple[Array, Array]:
        """(sum |J| b, (sum J^2 s^2)^(1/2)) of every element of `results`, end to end.  Pure.

        combined: weights of those elements; their weighted sum is one more result, at the end.
        """
        sizes = [node.value.size for node in results]
        seeds = np.eye(sum(sizes)) if combined is None else np.vstack([np.eye(sum(sizes)), combined])
        total = len(seeds)
        waiting: dict[int, Array] = {}
        start = 0
        for node, size in zip(results, sizes, strict=True):
            waiting[node.index] = seeds[:, start : start + size].reshape(total, *node.value.shape)
            start += size
        worst, squares = np.zeros(total), np.zeros(total)
        for node in reversed(self._nodes):
            slope = waiting.pop(node.index, None)
            if slope is None:
                continue
            if node.worst is not None and node.spread is not None:
                flat = slope.reshape(total, -1)
                worst += np.abs(flat) @ node.worst.reshape(-1)
                squares += np.square(flat) @ np.square(node.spread).reshape(-1)
            for source, pull in node.sources:
                pulled = pull(slope)
                waiting[source.index] = waiting[source.index] + pulled if source.index in waiting else pulled
        return worst, np.sqrt(squares)
