"""The rotary table of a decoder: cos and sin of every position.  Clauses: LM-ROPE-1..2 (specs/llm.md)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import InvalidParameterError

Table = npt.NDArray[np.float32]


def rope_tables(head_dim: int, max_tokens: int, theta: float) -> tuple[Table, Table]:
    """cos and sin of p * theta**(-2i / D)          [LM-ROPE-1..2]

    `[max_tokens, D/2]` float32, for p in [0, max_tokens) and i in [0, D/2). Exponent, power, its reciprocal and the
    angle are each rounded to float32, as in the code these models are trained with: the angle is off by up to a
    fraction (3 + log(theta)) * 2**-24 of itself. cos and sin of that angle are rounded once.
    Pure. Raises InvalidParameterError unless D is even and positive, theta > 0 and max_tokens >= 1.
    Source: Su et al. 2021, eq. 15.
    """
    if head_dim < 2 or head_dim % 2 or not theta > 0 or max_tokens < 1:
        raise InvalidParameterError(
            f"rope_tables: got head_dim={head_dim}, theta={theta}, max_tokens={max_tokens};"
            " expected an even head_dim, theta > 0 and at least one position"
        )
    exponents = (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)).astype(np.float64)
    frequencies = np.float32(1.0) / (float(theta) ** exponents).astype(np.float32)
    angles = np.arange(max_tokens, dtype=np.float32)[:, None] * frequencies
    wide = angles.astype(np.float64)
    return np.cos(wide).astype(np.float32), np.sin(wide).astype(np.float32)
