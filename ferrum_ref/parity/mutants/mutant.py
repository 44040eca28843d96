"""One bug."""

from __future__ import annotations

from dataclasses import dataclass

from ferrum_ref.parity.honest.sums import Kernel
from ferrum_ref.types.algorithm import Algorithm

EVERY_DTYPE = ("fp32", "fp16", "bf16")
SIXTEEN_BITS = ("fp16", "bf16")
PLAIN = Algorithm()


@dataclass(frozen=True)
class Mutant:
    """A kernel of `operation` with a bug that shows in `dtypes`; it declares `algorithm` and does not keep it."""

    group: str
    operation: str
    name: str
    run: Kernel
    dtypes: tuple[str, ...] = EVERY_DTYPE
    algorithm: Algorithm = PLAIN
