"""The random source of one request.  Clauses: SA-RNG-1..2 (specs/sampler.md)."""

from __future__ import annotations

from typing import Any

import numpy as np


class RequestRandom:
    """PCG64 seeded for one request; unseeded means seeded from the system's entropy.  [SA-RNG-1..2; D-67]

    `next_u32()` is the upper half of the generator's next 64-bit output, so a draw never leaves half an output behind.
    """

    __slots__ = ("_bits",)

    def __init__(self, seed: int | None = None) -> None:
        self._bits = np.random.PCG64(seed)

    def next_u32(self) -> int:
        return int(self._bits.random_raw()) >> 32

    def next_u64(self) -> int:
        return int(self._bits.random_raw())

    def state(self) -> dict[str, Any]:
        """The generator's state, as numpy gives it.  Pure."""
        return dict(self._bits.state)
