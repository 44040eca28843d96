"""The rotary tables of a decoder: cos and sin of every position.  Clauses: LM-ROPE-1..9 (specs/llm.md).

Everything is rounded to float32 in the order of the code these models are trained with. Sources: Su et al. 2021,
eq. 15; linear: Chen et al. 2023; dynamic: "NTK-aware" scaling; yarn: Peng et al. 2023, section 3; longrope: Ding et
al. 2024.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.models.rope_config import RopeSettings

Table = npt.NDArray[np.float32]
_ONE = np.float32(1.0)


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
    return position_table(_ONE / _powers(head_dim, float(theta)), np.arange(max_tokens), 1.0)


def scaled_tables(settings: RopeSettings, max_tokens: int, length: int = 1) -> tuple[Table, Table]:
    """cos and sin of positions 0 .. max_tokens - 1 for a sequence of `length` tokens, `[max_tokens, rotary_dim/2]`.

    Pure.  [LM-ROPE-3..9]
    """
    return position_table(inverse_frequencies(settings, length), np.arange(max_tokens), settings.attention_factor)


def position_table(frequencies: Table, positions: npt.NDArray[np.int64], scale: float) -> tuple[Table, Table]:
    """scale * cos(p f_i) and scale * sin(p f_i); the angle is rounded to float32.  Pure.  [LM-ROPE-1]

    positions `[N]` with frequencies `[D/2]`, or `[N, D/2]`: one row for each position.
    """
    angles = (positions.astype(np.float32)[:, None] * frequencies).astype(np.float64)
    return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)


def inverse_frequencies(settings: RopeSettings, length: int = 1) -> Table:
    """Angle of one position, for each of the rotary_dim/2 pairs, in a sequence of `length` tokens.  [LM-ROPE-3..9]

    `length` matters for dynamic and longrope alone, and there only beyond the original context. Pure.
    """
    dim, theta = settings.rotary_dim, settings.theta
    if settings.kind == "dynamic" and length > settings.original_positions:
        return _ONE / _powers(dim, float(_dynamic_base(settings, length)))
    powers = _powers(dim, theta)
    if settings.kind == "linear":
        return (_ONE / powers) / np.float32(settings.factor)
    if settings.kind == "stored":
        divisors: Table = np.array(settings.short_factors, dtype=np.float32)
        return np.asarray((_ONE / powers) / divisors, dtype=np.float32)
    if settings.kind == "longrope":
        is_long = length > settings.original_positions
        factors = settings.long_factors if is_long else settings.short_factors
        stretched: Table = np.array(factors, dtype=np.float32) * powers
        return _ONE / stretched
    if settings.kind == "yarn":
        return _yarn(settings, powers)
    if settings.kind == "llama3":
        return _llama3(settings, _ONE / powers)
    return _ONE / powers


def _powers(dim: int, theta: float) -> Table:
    """theta**(2i/D), exponent and power rounded to float32 each."""
    exponents = (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)).astype(np.float64)
    return (theta**exponents).astype(np.float32)


def _dynamic_base(settings: RopeSettings, length: int) -> np.float32:
    """theta * (s L / L0 - (s - 1))**(D / (D - 2)), in float32.  [LM-ROPE-5]"""
    dim = settings.rotary_dim
    stretched = np.float32(settings.factor) * np.float32(length) / np.float32(settings.original_positions)
    growth = np.float32(stretched - np.float32(settings.factor - 1)) ** np.float32(dim / (dim - 2))
    return np.float32(np.float32(settings.theta) * growth)


def _yarn(settings: RopeSettings, powers: Table) -> Table:
    """Slow pairs interpolated, fast ones left, a ramp between.  [LM-ROPE-6]"""
    dim = settings.rotary_dim

    def pair_of(rotations: float) -> float:
        ratio = settings.original_positions / (rotations * 2 * math.pi)
        return (dim * math.log(ratio)) / (2 * math.log(settings.theta))

    low, high = pair_of(settings.beta_fast), pair_of(settings.beta_slow)
    if settings.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = _ONE - ramp
    interpolated = _ONE / (np.float32(settings.factor) * powers)
    return np.asarray(interpolated * (_ONE - kept) + (_ONE / powers) * kept, dtype=np.float32)


def _llama3(settings: RopeSettings, frequencies: Table) -> Table:
    """Long waves divided by the factor, short ones left, a smooth passage between.  [LM-ROPE-7]"""
    low, high, factor = settings.low_freq_factor, settings.high_freq_factor, np.float32(settings.factor)
    original = settings.original_positions
    waves = np.float32(2 * math.pi) / frequencies
    smooth = (np.float32(original) / waves - np.float32(low)) / np.float32(high - low)
    between = (_ONE - smooth) * frequencies / factor + smooth * frequencies
    scaled = np.where(waves > np.float32(original / low), frequencies / factor, between)
    return np.where(waves < np.float32(original / high), frequencies, scaled).astype(np.float32)
