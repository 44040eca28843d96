"""All kernel mutants.  Clause: PA-MUTANT-1."""

from __future__ import annotations

from ferrum_ref.parity.mutants.attention import ATTENTION
from ferrum_ref.parity.mutants.choice import EXACT, SAMPLING
from ferrum_ref.parity.mutants.decode import DECODE
from ferrum_ref.parity.mutants.elementwise import ACTIVATION, PRIMITIVE
from ferrum_ref.parity.mutants.linear import LINEAR, QUANTIZED
from ferrum_ref.parity.mutants.mutant import Mutant
from ferrum_ref.parity.mutants.norm import NORM
from ferrum_ref.parity.mutants.packed import PACKED
from ferrum_ref.parity.mutants.paged import PAGED
from ferrum_ref.parity.mutants.rope import ROPE

MUTANTS: tuple[Mutant, ...] = (
    *NORM,
    *ROPE,
    *ATTENTION,
    *PAGED,
    *ACTIVATION,
    *LINEAR,
    *QUANTIZED,
    *PACKED,
    *SAMPLING,
    *PRIMITIVE,
    *EXACT,
    *DECODE,
)
