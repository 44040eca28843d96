"""Which index an argmax may return.  Clause: PA-ARGMAX-1."""

from __future__ import annotations

import numpy as np

from ferrum_ref.parity.units import Array


def admissible_maxima(logits: Array, error: Array | float = 0.0) -> Array:
    """Indices that are the first maximum of some logits within +- error of the given ones, ascending.

    An index is reachable if its highest value is not below any other's lowest; with error = 0 only the first of the
    equal maxima is. logits (V,) float64 without NaN. Pure.
    """
    errors = np.broadcast_to(np.asarray(error, dtype=np.float64), logits.shape)
    if not np.any(errors > 0):
        return np.array([int(np.argmax(logits))])
    floor = np.max(logits - errors)
    reachable: Array = np.flatnonzero(logits + errors >= floor)
    return reachable
