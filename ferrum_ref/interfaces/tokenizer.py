"""Text to token ids and back, at once or token by token, and chats to prompts.

Upstream: `ferrum_interfaces::tokenizer`.  Ids are plain ints; they compare and hash as `TokenId`s do.
Clauses: TK-* (specs/tokenizer.md).
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from ferrum_ref.types.record import Record, Usize
from ferrum_ref.types.sampling import SpecialTokens

State = TypeVar("State")


class TokenizerType(enum.Enum):
    """Tokenisation algorithm."""

    BPE = "BPE"
    WordPiece = "WordPiece"
    SentencePiece = "SentencePiece"
    Tiktoken = "Tiktoken"
    Custom = "Custom"


@dataclass(frozen=True, slots=True)
class TokenizerInfo(Record):
    """What a tokenizer is and offers.  [TK-INFO-1]"""

    tokenizer_type: TokenizerType
    vocab_size: Usize  # with added tokens; never a bound for logits (D-78)
    special_tokens: SpecialTokens
    supports_incremental: bool
    supports_chat_template: bool
    max_token_length: Usize | None  # characters
    model_name: str | None


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a chat; `metadata` holds further JSON fields that a chat template may read."""

    role: str
    content: str
    metadata: dict[str, Any]

    @classmethod
    def user(cls, content: str) -> ChatMessage:
        return cls("user", content, {})

    @classmethod
    def assistant(cls, content: str) -> ChatMessage:
        return cls("assistant", content, {})

    @classmethod
    def system(cls, content: str) -> ChatMessage:
        return cls("system", content, {})


class Tokenizer(ABC):
    """Text <-> ids.  Implementations are safe for concurrent use."""

    @abstractmethod
    def encode(self, text: str, add_special: bool) -> list[int]:
        """Ids of a text; `add_special` adds what the tokenizer puts around a text (BOS, EOS).  Pure.  [TK-ENCODE-1..3]

        Raises TokenizerError on text that has no UTF-8 form (lone surrogates).
        """

    @abstractmethod
    def decode(self, tokens: Sequence[int], skip_special: bool) -> str:
        """Text of ids; `skip_special` drops special tokens.  Pure.  [TK-DECODE-1, TK-DECODE-2]

        Raises InvalidParameterError on an id outside [0, 2**32).
        """

    @abstractmethod
    def decode_incremental(self, prev: Sequence[int], next: int) -> str:
        """The text that `next` adds to a stream that has delivered `prev`.  Pure.  [TK-STREAM-4; D-23]"""

    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, added tokens included.  Pure.  [TK-INFO-2; D-78]"""

    @abstractmethod
    def special_tokens(self) -> SpecialTokens:
        """The ids with a role.  Pure."""

    @abstractmethod
    def token_id(self, text: str) -> int | None:
        """The id of a token as the vocabulary spells it.  Pure.  [TK-INFO-3]"""

    @abstractmethod
    def token_text(self, token_id: int) -> str | None:
        """The vocabulary's spelling of an id, None for an id it does not have.  Pure.  [TK-INFO-3]"""

    @abstractmethod
    def info(self) -> TokenizerInfo:
        """Metadata.  Pure.  [TK-INFO-1]"""

    def is_special_token(self, token_id: int) -> bool:
        """True for the ids of `special_tokens()`.  Pure.  [TK-SPECIAL-1; D-26]"""
        special = self.special_tokens()
        return token_id in {getattr(special, field.name) for field in fields(special)}

    def apply_chat_template(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> str:
        """A chat as one prompt.  Pure.  [TK-CHAT-1; D-49]

        This default, for tokenizers without a template, is upstream's: "role: content" lines, trailing whitespace
        stripped, and never a generation prompt.
        """
        return "\n".join(f"{message.role}: {message.content}" for message in messages).rstrip()


class IncrementalTokenizer(Tokenizer, Generic[State]):
    """Detokenisation token by token, with explicit state: correct across split characters.  [TK-STREAM-1..5]"""

    @abstractmethod
    def create_state(self) -> State:
        """A fresh state."""

    @abstractmethod
    def decode_incremental_with_state(self, state: State, token: int) -> str:
        """Push one id; the text that is now certain, "" while a character is incomplete.  Mutates `state`."""

    @abstractmethod
    def flush(self, state: State) -> str:
        """End of the stream: the text still held back.  Mutates `state`.  (Not upstream's: D-23 asks for it.)"""

    @abstractmethod
    def reset_state(self, state: State) -> None:
        """Make `state` as good as fresh.  Mutates `state`."""

    @abstractmethod
    def get_decoded_text(self, state: State) -> str:
        """All text delivered so far.  Pure."""
