"""Entries of tokenizer.ggml.* in a GGUF file, each checked as it is read.  [TK-GGUF-2]"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NoReturn

from ferrum_ref.errors import InvalidFormatError

NORMAL: Final = 1
UNKNOWN: Final = 2
CONTROL: Final = 3
USER_DEFINED: Final = 4
UNUSED: Final = 5
BYTE: Final = 6
ROLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
        "sep_token": "seperator_token_id",  # the specification's own spelling
        "cls_token": "cls_token_id",
        "mask_token": "mask_token_id",
    }
)
_ENDS: Final = ("eos_token_id", "eot_token_id", "eom_token_id")
_UNSET: Final = 2**32 - 1


class GgufVocabulary:
    """tokenizer.ggml.*: the tokens with their types and scores, and every other entry by its type.

    Raises InvalidFormatError, by the entry's name, on what is missing, malformed or contradicts the tokens.
    """

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self.metadata = metadata
        self.source = source
        self.tokens = self.texts("tokens")
        self.types = self._token_types()
        self.ids = {text: token_id for token_id, text in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(text for token_id, text in enumerate(self.tokens) if self.ids[text] != token_id)
            self.fail("tokens", f"{twice!a} twice", "every token once")
        self.roles = {role: found for role, key in ROLES.items() if (found := self.token_id(key)) is not None}

    def fail(self, key: str, got: str, expected: str) -> NoReturn:
        raise InvalidFormatError(f"read {self.source}: tokenizer.ggml.{key}: got {got:.120}, expected {expected}")

    def get(self, key: str) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            self.fail(key, type(value).__name__, "a string")
        return value

    def texts(self, key: str) -> Sequence[str]:
        value = self.get(key)
        if not isinstance(value, (tuple, list)) or not value or not all(isinstance(text, str) for text in value):
            self.fail(key, type(value).__name__, "an array of strings")
        return value

    def scores(self) -> list[float]:
        """One finite number for each token."""
        value = self.get("scores")
        try:
            scores = [float(score) for score in value]
        except (TypeError, ValueError):
            self.fail("scores", type(value).__name__, "an array of numbers")
        if len(scores) != len(self.tokens):
            self.fail("scores", f"{len(scores)} entries", f"one for each of {len(self.tokens)} tokens")
        wrong = next((score for score in scores if not math.isfinite(score)), None)
        if wrong is not None:
            self.fail("scores", str(wrong), "finite numbers")
        return scores

    def token_id(self, key: str) -> int | None:
        """The id that an entry names; None where there is no such entry or it says that there is no such token."""
        value = self.get(key)
        if value is None or (isinstance(value, int) and value == _UNSET):
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(self.tokens):
            self.fail(key, ascii(value), f"an id below {len(self.tokens)}")
        return value

    def end_ids(self) -> list[int]:
        """Ids that end a generation.  [TK-SPECIAL-2]"""
        return [found for key in _ENDS if (found := self.token_id(key)) is not None]

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(key, ascii(value), "true or false")
        return value

    def data(self, key: str) -> bytes:
        """An array of bytes, signed or not; nothing where there is no such entry."""
        value = self.get(key)
        if value is None:
            return b""
        try:
            return bytes(int(item) % 256 for item in value)
        except (TypeError, ValueError):
            self.fail(key, type(value).__name__, "an array of bytes")

    def of_type(self, kinds: Iterable[int]) -> list[int]:
        """Ids of the tokens of these types, in order."""
        wanted = frozenset(kinds)
        return [token_id for token_id, kind in enumerate(self.types) if kind in wanted]

    def _token_types(self) -> list[int]:
        value = self.get("token_type")
        try:
            types = [int(kind) for kind in value] if value is not None else [NORMAL] * len(self.tokens)
        except (TypeError, ValueError):
            self.fail("token_type", type(value).__name__, "an array of integers")
        if len(types) != len(self.tokens):
            self.fail("token_type", f"{len(types)} entries", f"one for each of {len(self.tokens)} tokens")
        return types
