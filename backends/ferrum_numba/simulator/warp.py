"""What the lanes of a warp exchange: shuffles, votes, matches.

Each function takes what every participating lane brought, by lane, and gives every lane its result. Which lanes take
part is settled before (`block`). Numba's intrinsics have the full width of 32 lanes; there is no `width` argument.
Clauses: BK-CUDASIM-3..4 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from ferrum_ref.errors import BackendError

LANES = 32
Operands = Mapping[int, tuple[Any, ...]]


def _shuffle(source: Callable[[int, int], int]) -> Callable[[Operands], dict[int, Any]]:
    """(value, parameter) of every lane -> the value of lane source(lane, parameter), or its own beyond the warp."""

    def exchange(operands: Operands) -> dict[int, Any]:
        results = {}
        for lane, (value, parameter) in operands.items():
            other = source(lane, int(parameter))
            if not 0 <= other < LANES:
                results[lane] = value
            elif other in operands:
                results[lane] = operands[other][0]
            else:
                raise BackendError(f"lane {lane} reads lane {other}, which takes no part: its value is undefined")
        return results

    return exchange


def _vote(decide: Callable[[Operands], Any]) -> Callable[[Operands], dict[int, Any]]:
    def exchange(operands: Operands) -> dict[int, Any]:
        return dict.fromkeys(operands, decide(operands))

    return exchange


def _bits(lanes: list[int]) -> int:
    return sum(1 << lane for lane in lanes)


def _match_any(operands: Operands) -> dict[int, Any]:
    return {
        lane: _bits([other for other, (theirs,) in operands.items() if theirs == value])
        for lane, (value,) in operands.items()
    }


def _match_all(operands: Operands) -> Any:
    equal = len({value for (value,) in operands.values()}) == 1
    return (_bits(list(operands)), True) if equal else (0, False)


EXCHANGES: Mapping[str, Callable[[Operands], dict[int, Any]]] = MappingProxyType(
    {
        "shfl_sync": _shuffle(lambda lane, source: source % LANES),
        "shfl_up_sync": _shuffle(lambda lane, delta: lane - delta),
        "shfl_down_sync": _shuffle(lambda lane, delta: lane + delta),
        "shfl_xor_sync": _shuffle(lambda lane, mask: lane ^ mask),
        "ballot_sync": _vote(lambda operands: _bits([lane for lane, (is_set,) in operands.items() if is_set])),
        "all_sync": _vote(lambda operands: all(is_set for (is_set,) in operands.values())),
        "any_sync": _vote(lambda operands: any(is_set for (is_set,) in operands.values())),
        "eq_sync": _vote(lambda operands: len({bool(is_set) for (is_set,) in operands.values()}) == 1),
        "match_any_sync": _match_any,
        "match_all_sync": _vote(_match_all),
        "syncwarp": _vote(lambda operands: None),
    }
)
