"""Element types of a key/value cache, as markers.

Upstream: `ferrum_interfaces::kv_dtype` (from 0.7.7 on).  Clause: TY-RUNTIME-1 (specs/types.md).
"""

from __future__ import annotations

from abc import ABC
from typing import ClassVar


class KvDtypeKind(ABC):
    """What the keys and values of a cache are stored as; a class to be named, never an object."""

    NAME: ClassVar[str]
    BYTES_PER_ELEM: ClassVar[int]


class KvFp16(KvDtypeKind):
    """IEEE half precision."""

    NAME = "fp16"
    BYTES_PER_ELEM = 2


class KvBf16(KvDtypeKind):
    """bfloat16."""

    NAME = "bf16"
    BYTES_PER_ELEM = 2


class KvInt8(KvDtypeKind):
    """8-bit integers with scales."""

    NAME = "int8"
    BYTES_PER_ELEM = 1


class KvFp8(KvDtypeKind):
    """8-bit floats."""

    NAME = "fp8"
    BYTES_PER_ELEM = 1
