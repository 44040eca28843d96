"""Bugs of the rotary embedding."""

from __future__ import annotations

import numpy as np

from ferrum_ref.kernels.rounding import round_to
from ferrum_ref.parity.honest.attention import with_arrays, with_settings
from ferrum_ref.parity.honest.elementwise import rope, turned
from ferrum_ref.parity.honest.sums import F32, stored, wide
from ferrum_ref.parity.mutants.mutant import SIXTEEN_BITS, Mutant
from ferrum_ref.parity.mutants.partial import rows_kept
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.units import Array

Outputs = tuple[Array, ...]
HONEST = rope("plain")


def _at(inputs: Inputs, positions: Array) -> Outputs:
    last = len(inputs.arrays["cos"]) - 1
    return HONEST(with_settings(inputs, positions=np.clip(positions, 0, last)))


def _parts(inputs: Inputs) -> tuple[Array, Array, Array]:
    x, cos, sin = wide(inputs, "x", "cos", "sin")
    c, s = (table[inputs.settings["positions"]][:, None, :] for table in (cos, sin))
    return x, c, s


def adjacent_pairs(inputs: Inputs) -> Outputs:
    x, c, s = _parts(inputs)
    y = np.empty_like(x)
    y[..., 0::2] = x[..., 0::2] * c - x[..., 1::2] * s
    y[..., 1::2] = x[..., 1::2] * c + x[..., 0::2] * s
    return stored(inputs, y)


def sine_negated(inputs: Inputs) -> Outputs:
    x, c, s = _parts(inputs)
    return stored(inputs, turned(x, c, -s))


def first_64_only(inputs: Inputs) -> Outputs:
    """A kernel written for heads of 64: what lies beyond the first 32 pairs stays as it was."""
    x, c, s = _parts(inputs)
    y, half = turned(x, c, s), x.shape[-1] // 2
    y[..., 32:half], y[..., half + 32 :] = x[..., 32:half], x[..., half + 32 :]
    return stored(inputs, y)


def later_batches_not_turned(inputs: Inputs) -> Outputs:
    x, c, s = _parts(inputs)
    y = turned(x, c, s)
    y[1:] = x[1:]
    return stored(inputs, y)


def positions_by_flat_row(inputs: Inputs) -> Outputs:
    """Row b T + t of the flattened batch takes position b T + t beyond the first."""
    x, cos, sin = wide(inputs, "x", "cos", "sin")
    positions, num_tokens = inputs.settings["positions"], x.shape[1]
    last = len(cos) - 1
    rows = [np.minimum(positions + batch * num_tokens, last) for batch in range(x.shape[0])]
    parts = [turned(x[b], cos[rows[b]][:, None, :], sin[rows[b]][:, None, :]) for b in range(x.shape[0])]
    return stored(inputs, np.stack(parts) if parts else x)


def first_position_for_all(inputs: Inputs) -> Outputs:
    positions = inputs.settings["positions"]
    return _at(inputs, (positions[0] if len(positions) else 0) + np.arange(len(positions)))


def positions_in_storage_type(inputs: Inputs) -> Outputs:
    positions = inputs.settings["positions"].astype(np.float64)
    return _at(inputs, round_to(positions, inputs.storage.numpy_dtype).astype(np.int64))


def tables_rounded(inputs: Inputs) -> Outputs:
    """Tables in float32 are rounded to the storage type before they are used."""
    tables = {name: np.array(round_to(inputs.arrays[name], inputs.storage.numpy_dtype)) for name in ("cos", "sin")}
    return HONEST(with_arrays(inputs, **tables))


def products_rounded(inputs: Inputs) -> Outputs:
    x, c, s = _parts(inputs)
    first, second = np.split(x, 2, axis=-1)
    parts = [part.astype(F32) for part in stored(inputs, first * c, second * s, second * c, first * s)]
    return stored(inputs, np.concatenate([parts[0] - parts[1], parts[2] + parts[3]], axis=-1))


def pairs_from_the_end(inputs: Inputs) -> Outputs:
    x, c, s = _parts(inputs)
    return stored(inputs, turned(x, c[..., ::-1], s[..., ::-1]))


ROPE: tuple[Mutant, ...] = (
    Mutant("rope", "rotary_embedding", "GPT-J pairs for NeoX pairs", adjacent_pairs),
    Mutant("rope", "rotary_embedding", "position off by one", lambda one: _at(one, one.settings["positions"] - 1)),
    Mutant("rope", "rotary_embedding", "first position for all", first_position_for_all),
    Mutant("rope", "rotary_embedding", "sine negated", sine_negated),
    Mutant("rope", "rotary_embedding", "only the first 64 elements", first_64_only),
    Mutant("rope", "rotary_embedding", "later batches not turned", later_batches_not_turned),
    Mutant("rope", "rotary_embedding", "positions by flat row", positions_by_flat_row),
    Mutant("rope", "rotary_embedding", "positions in 16 bits", positions_in_storage_type, SIXTEEN_BITS),
    Mutant("rope", "rotary_embedding", "tables rounded to storage", tables_rounded, SIXTEEN_BITS),
    Mutant("rope", "rotary_embedding", "products rounded to storage", products_rounded, SIXTEEN_BITS),
    Mutant("rope", "rotary_embedding", "frequencies in reverse", pairs_from_the_end),
    Mutant("rope", "rotary_embedding", "only 256 heads of tokens", rows_kept(HONEST, 256)),
)
