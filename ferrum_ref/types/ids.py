"""Identifiers: token ids, and the keys of requests, batches, sessions, tasks, models and clients.

Upstream: `ferrum_types::ids`.  Clauses: TY-IDS-1..5 (specs/types.md).
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.types.parity_mode import ParityMode
from ferrum_ref.types.record import U32, check_unsigned
from ferrum_ref.types.text_form import Displayed

if TYPE_CHECKING:
    import numpy as np

BlockId: TypeAlias = U32

_Uuid = TypeVar("_Uuid", bound="UuidKey")
_Text = TypeVar("_Text", bound="TextKey")


class TokenId(Displayed, int):
    """A vocabulary index in [0, 2**32); compares, orders, hashes and prints as the plain int.  [TY-IDS-1, TY-IDS-5]

    Raises InvalidParameterError outside the range (upstream truncates a 64-bit value silently).
    """

    __slots__ = ()

    def __new__(cls, value: int = 0) -> TokenId:
        return super().__new__(cls, check_unsigned(value, 2**32, "TokenId", "value"))

    @classmethod
    def new(cls, value: int) -> TokenId:
        return cls(value)

    @classmethod
    def from_value(cls, value: int, *, parity_mode: ParityMode = ParityMode.REFERENCE) -> TokenId:
        """The id `value`; under ParityMode.UPSTREAM a wider value is cut to its low 32 bits, as there.  [TY-IDS-1]"""
        if parity_mode is ParityMode.UPSTREAM:
            return cls(check_unsigned(value, 2**64, "TokenId", "value") % 2**32)
        return cls(value)

    def get(self) -> int:
        return int(self)

    @property
    def _0(self) -> int:
        """The wrapped value: upstream's unnamed field `0`.  [TY-IDS-5]"""
        return int(self)

    def __str__(self) -> str:
        return int.__repr__(self)


@dataclass(frozen=True, slots=True, eq=False)
class UuidKey(Displayed):
    """A key around a version-4 UUID; equal only to a key of its own kind with the same UUID.  [TY-IDS-2]"""

    value: uuid.UUID
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.value, uuid.UUID):
            raise InvalidParameterError(
                f"{type(self).__name__}: expected a uuid.UUID, got {self.value!r}; use {type(self).__name__}.parse"
            )
        object.__setattr__(self, "_hash", hash(self.value.int))

    @classmethod
    def new(cls: type[_Uuid], rng: np.random.Generator | None = None) -> _Uuid:
        """A fresh key; from `rng` when given, so that a seeded run repeats its ids (D-79).  [TY-IDS-3]"""
        if rng is None:
            return cls(uuid.uuid4())
        return cls(uuid.UUID(bytes=rng.bytes(16), version=4))

    @classmethod
    def parse(cls: type[_Uuid], text: str) -> _Uuid:
        """The key written as `text`.  Raises InvalidParameterError when it is no UUID."""
        try:
            return cls(uuid.UUID(text))
        except (ValueError, AttributeError, TypeError):
            raise InvalidParameterError(f"{cls.__name__}.parse: expected a UUID, got {text!r}") from None

    @property
    def _0(self) -> uuid.UUID:
        """The wrapped value: upstream's unnamed field `0`.  [TY-IDS-5]"""
        return self.value

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is type(self) and other.value.int == self.value.int)

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return str(self.value)


class RequestId(UuidKey):
    """Key of one request."""

    __slots__ = ()


class BatchId(UuidKey):
    """Key of one batch."""

    __slots__ = ()


class SessionId(UuidKey):
    """Key of one conversation."""

    __slots__ = ()


class TaskId(UuidKey):
    """Key of one task."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class TextKey(Displayed):
    """A key around unvalidated text; equal only to a key of its own kind.  [TY-IDS-4]"""

    value: str

    @classmethod
    def new(cls: type[_Text], id: str) -> _Text:
        return cls(id)

    @classmethod
    def from_value(cls: type[_Text], id: str | TextKey) -> _Text:
        return cls(str(id))

    @property
    def _0(self) -> str:
        """The wrapped value: upstream's unnamed field `0`.  [TY-IDS-5]"""
        return self.value

    def as_str(self) -> str:
        return self.value

    def __str__(self) -> str:
        return self.value


class ModelId(TextKey):
    """Key of a model."""

    __slots__ = ()


class ClientId(TextKey):
    """Key of a tenant."""

    __slots__ = ()
