"""How a decoder turns its queries and keys by their positions, whichever file said it.

Clauses: LM-ROPE-3..9 (specs/llm.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from ferrum_ref.errors import ConfigError
from ferrum_ref.models.config_fields import finite_number, positive_number, size

KINDS: Final = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "stored")
STORED_FACTORS: Final[Mapping[str, str]] = MappingProxyType(
    {"stored": "rope_freqs.weight", "short": "rope_factors_short.weight", "long": "rope_factors_long.weight"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSettings:
    """One rotary table.  [LM-ROPE-3]

    The first `rotary_dim` entries of a head are turned, the others stay. `original_positions` is the context that the
    unscaled frequencies were trained for; cosines and sines are multiplied by `attention_factor`. "stored" frequencies
    are divided by factors that lie in the file as tensors, as those of "longrope" may (`factors_in_file`).
    Raises ConfigError, naming the field, on numbers that mean nothing.
    """

    rotary_dim: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factors: tuple[float, ...] = ()  # of "stored", too: the only ones there
    long_factors: tuple[float, ...] = ()
    factors_in_file: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"rope_type: got {self.kind!r:.40}, expected one of {', '.join(KINDS)}")
        if size(self.rotary_dim, "rotary_dim") % 2:
            raise ConfigError(f"rotary_dim: got {self.rotary_dim}, expected an even number (rotary pairs)")
        for name in ("theta", "factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
            shown = "rope_theta" if name == "theta" else name
            object.__setattr__(self, name, positive_number(getattr(self, name), shown))
        object.__setattr__(self, "attention_factor", finite_number(self.attention_factor, "attention_factor"))
        if self.kind in ("dynamic", "yarn", "longrope", "llama3"):
            size(self.original_positions, "original_max_position_embeddings")
        if self.kind == "dynamic" and self.rotary_dim <= 2:
            raise ConfigError(f"rotary_dim: got {self.rotary_dim}, expected more than 2 for dynamic scaling")
        if self.kind == "yarn" and self.theta == 1.0:
            raise ConfigError("rope_theta: got 1.0, expected another base for yarn, which divides by its logarithm")
        if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor:
            raise ConfigError(
                f"high_freq_factor: got {self.high_freq_factor}, expected more than low_freq_factor "
                f"{self.low_freq_factor}"
            )
        if self.kind in ("longrope", "stored") and not self.factors_in_file:
            self._check_factors("short_factor", self.short_factors)
            if self.kind == "longrope":
                self._check_factors("long_factor", self.long_factors)

    @property
    def grows(self) -> bool:
        """Whether frequencies depend on how long a sequence is by now."""
        return self.kind in ("dynamic", "longrope")

    def stored_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of the tensors that hold factors.  Pure."""
        names = () if not self.factors_in_file else ("short", "long") if self.kind == "longrope" else ("stored",)
        return {STORED_FACTORS[name]: (self.rotary_dim // 2,) for name in names}

    def with_stored(self, tensors: Mapping[str, Any]) -> RopeSettings:
        """With the factors of the file in place.  Pure.  Raises ConfigError for factors that are not positive."""
        if not self.factors_in_file:
            return self
        found = {
            name: tuple(float(value) for value in np.asarray(tensors[stored]))
            for name, stored in STORED_FACTORS.items()
            if stored in tensors
        }
        short, long = found.get("short", found.get("stored", ())), found.get("long", ())
        return replace(self, short_factors=short, long_factors=long, factors_in_file=False)

    def _check_factors(self, field: str, factors: tuple[float, ...]) -> None:
        if len(factors) != self.rotary_dim // 2:
            raise ConfigError(f"{field}: got {len(factors)} factors, expected {self.rotary_dim // 2}")
        for value in factors:
            positive_number(value, field)
