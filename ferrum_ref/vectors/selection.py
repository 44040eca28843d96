"""Which of the judge's cases become golden vectors, in which element types, and why.   Clauses: GV-SET-1..3.

A case is named by its place in the judge's list of its operation; what its probe name does not say, flags add.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.parity.units import storage_named

SEED: Final = 0
ALL: Final = ("fp32", "fp16", "bf16")
FP32: Final = ("fp32",)
FP16: Final = ("fp16",)
BF16: Final = ("bf16",)
BOTH: Final = ("fp32", "bf16")


@dataclass(frozen=True, slots=True)
class Pick:
    """Case `index` in the element types `storages`; flags and clauses beside those of its probe and group."""

    index: int
    storages: tuple[str, ...]
    flags: tuple[str, ...] = ()
    clauses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """An operation's picks; `clauses` hold for all of them."""

    operation: str
    meaning: str
    clauses: tuple[str, ...]
    picks: tuple[Pick, ...]


def chosen(
    groups: Sequence[Group], operations: Sequence[str], dtypes: Sequence[str]
) -> Iterator[tuple[Group, Pick, str]]:
    """(group, pick, element type) in order; no operation or no type named means all of them.

    Raises InvalidParameterError for a name that no group, or no element type, has.
    """
    known = [group.operation for group in groups]
    for name in operations:
        if name not in known:
            raise InvalidParameterError(f"vectors: operation {name!r} has none; expected one of {', '.join(known)}")
    wanted = [storage_named(name).name for name in dtypes]
    for group in groups:
        if operations and group.operation not in operations:
            continue
        yield from (
            (group, pick, storage)
            for pick in group.picks
            for storage in pick.storages
            if not wanted or storage in wanted
        )
