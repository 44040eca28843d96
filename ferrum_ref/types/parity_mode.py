"""Whose result a function gives where upstream is known to be wrong: the reference's, or upstream's.

The switch exists for ports that must compare old outputs.  It changes results only; a crash or a leak of upstream
is never reproduced.  Clause: TY-PARITY-1 (specs/types.md).
"""

from __future__ import annotations

from enum import Enum


class ParityMode(Enum):
    """REFERENCE (the default everywhere) gives the corrected result, UPSTREAM upstream's own.  [TY-PARITY-1]"""

    REFERENCE = "reference"
    UPSTREAM = "upstream"
