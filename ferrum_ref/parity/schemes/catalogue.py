"""Every packed form beyond upstream's two, each with an operation of its own.   Clause: PA-SCHEME-1."""

from __future__ import annotations

from ferrum_ref.parity.schemes.groups import Fp8, Groups
from ferrum_ref.parity.schemes.rows import BLOCKS, PlainRows
from ferrum_ref.parity.schemes.scheme import Scheme
from ferrum_ref.parity.schemes.words import Awq, Gptq

SCHEMES: tuple[Scheme, ...] = (*BLOCKS, PlainRows(), Gptq(), Awq(), Groups(8), Groups(4), Fp8())
