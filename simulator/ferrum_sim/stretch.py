"""Arithmetic of a stretch: when its steps end, and how many blocks are held during each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MAX_STEPS = 4096  # bounds the arrays; a longer stretch is taken in parts, with the same result


def instants(start_s: float, times_s: NDArray[np.float64]) -> list[float]:
    """[start, start + t0, (start + t0) + t1, ...]: summed one by one, as single steps would. Pure.  [SI-RUN-2]"""
    ends_s: list[float] = np.add.accumulate(np.concatenate(((start_s,), times_s))).tolist()
    return ends_s


def blocks_held(num_held: int, computed_tokens: Sequence[int], block_size: int, num_steps: int) -> list[int]:
    """Blocks held during each of `num_steps` decode steps, `num_held` during the first. Pure.  [SI-RUN-3]

    A member with c computed tokens before the stretch writes position c + j in step j (from 0): it takes a new block
    where block_size divides c + j, except in step 0, which is planned and counted already.
    """
    phases = np.bincount(np.asarray(computed_tokens) % block_size, minlength=block_size)
    taken = phases[-np.arange(num_steps) % block_size]
    taken[0] = num_held
    held: list[int] = np.add.accumulate(taken).tolist()
    return held
