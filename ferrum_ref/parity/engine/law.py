"""A law, and how it is tried on parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ferrum_ref.parity.engine.parts import EngineParts

Check = Callable[[EngineParts, np.random.Generator], str]


@dataclass(frozen=True)
class Law:
    """`check(parts, rng)` says in words how the parts break the law; "" if they keep it."""

    group: str
    name: str
    check: Check


def fault_of(law: Law, parts: EngineParts, seed: int) -> str:
    """What the law finds; an exception of the parts is a fault too. Pure.  [PA-ENGINE-1]"""
    try:
        return law.check(parts, np.random.default_rng([seed, len(law.name)]))
    except Exception as error:  # noqa: BLE001  whatever it is, it is the verdict on the parts
        return f"raised {type(error).__name__}: {error}"


def finished(operation: Any) -> Any:
    """The result of a coroutine that never waits: the contracts' `async` methods over a synchronous core."""
    try:
        operation.send(None)
    except StopIteration as done:
        return done.value
    operation.close()
    return None
