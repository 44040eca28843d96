"""The Tokenizer contract over Hugging Face `tokenizers`.

Upstream: `ferrum_tokenizer::HuggingFaceTokenizer`; its guesses and defects (D-23, D-26, D-49, D-78) are not repeated.
Clauses: TK-* (specs/tokenizer.md).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any, Final

import tokenizers

from ferrum_ref.errors import InvalidParameterError, TokenizerError
from ferrum_ref.interfaces.tokenizer import ChatMessage, IncrementalTokenizer, TokenizerInfo, TokenizerType
from ferrum_ref.tokenizer import incremental
from ferrum_ref.tokenizer.chat_template import ChatTemplate
from ferrum_ref.tokenizer.clean_up import clean_up
from ferrum_ref.tokenizer.incremental import DetokenizerState
from ferrum_ref.types.sampling import SpecialTokens

_TYPES: Final[Mapping[str, TokenizerType]] = MappingProxyType(
    {"BPE": TokenizerType.BPE, "WordPiece": TokenizerType.WordPiece, "Unigram": TokenizerType.SentencePiece}
)
_BYTE_TOKEN: Final = re.compile("<0x[0-9A-Fa-f]{2}>")


class HuggingFaceTokenizer(IncrementalTokenizer[DetokenizerState]):
    """A `tokenizers.Tokenizer` with the roles of its special tokens and its chat template."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: SpecialTokens | None = None,
        stop_token_ids: Iterable[int] = (),
        chat_template: ChatTemplate | None = None,
        model_name: str | None = None,
        named_chat_templates: Mapping[str, ChatTemplate] | None = None,
        clean_up_spaces: bool = False,
    ) -> None:
        """Takes over `backend` and switches its padding and truncation off.

        `clean_up_spaces` takes the spaces before punctuation out of decoded text.  [TK-DECODE-3]
        """
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._special_tokens = special_tokens or SpecialTokens()
        self._chat_template = chat_template
        self._named_chat_templates = dict(named_chat_templates or {})
        self._clean_up_spaces = clean_up_spaces
        self._has_byte_runs = b'"ByteFallback"' in _state(backend.decoder)
        self._model_name = model_name
        added = backend.get_added_tokens_decoder()
        self._added_texts = {token_id: token.content for token_id, token in added.items()}
        self._skipped = frozenset(token_id for token_id, token in added.items() if token.special)
        roles = (getattr(self._special_tokens, field.name) for field in fields(SpecialTokens))
        self._special = self._skipped | {int(token_id) for token_id in roles if token_id is not None}
        eos = self._special_tokens.eos_token
        self._stop_token_ids = frozenset(stop_token_ids) | (frozenset() if eos is None else {int(eos)})

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Ids that end a generation: the tokenizer's EOS and those the model's files list.  [TK-SPECIAL-2; D-28]"""
        return self._stop_token_ids

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The template that is used when none is asked for by its name."""
        return self._chat_template

    @property
    def named_chat_templates(self) -> Mapping[str, ChatTemplate]:
        """Further templates of the model ("tool_use", "rag", ...), by name.  [TK-CHAT-9]"""
        return MappingProxyType(self._named_chat_templates)

    def encode(self, text: str, add_special: bool) -> list[int]:
        """See Tokenizer.encode; special tokens written out in the text become their ids, as in transformers."""
        try:
            text.encode("utf-8")
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special).ids
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"encode: text: got a lone surrogate at character {error.start}, expected Unicode scalar values"
            ) from None
        except Exception as error:  # noqa: BLE001  the library raises bare Exceptions
            reason = " ".join(str(error).split())
            raise TokenizerError(f"encode: text: {reason:.200}; expected text that the vocabulary can spell") from None
        return ids

    def decode(self, tokens: Sequence[int], skip_special: bool) -> str:
        """See Tokenizer.decode; an id that the vocabulary does not have stands for no text.  [TK-DECODE-2]"""
        text = self._decode(_checked(tokens), skip_special)
        return clean_up(text) if self._clean_up_spaces else text

    def decode_incremental(self, prev: Sequence[int], next: int) -> str:
        """The last delta of a fresh stream over prev and next; costs one pass over `prev`.  [TK-STREAM-4]"""
        state = self.create_state()
        for token in prev:
            self.decode_incremental_with_state(state, token)
        return self.decode_incremental_with_state(state, next)

    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def special_tokens(self) -> SpecialTokens:
        return self._special_tokens

    def token_id(self, text: str) -> int | None:
        try:
            found: int | None = self._backend.token_to_id(text)
        except UnicodeEncodeError:  # a lone surrogate, which no vocabulary can spell
            return None
        return found

    def token_text(self, token_id: int) -> str | None:
        if not 0 <= token_id < 2**32:
            return None
        found: str | None = self._added_texts.get(token_id)  # which the library gives in its normal form
        return self._backend.id_to_token(token_id) if found is None else found

    def is_special_token(self, token_id: int) -> bool:
        """True for every id with a role and every added token marked special.  [TK-SPECIAL-1; D-26]"""
        return token_id in self._special

    def apply_chat_template(
        self,
        messages: Sequence[ChatMessage | Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool | str = False,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The model's own template; the contract's plain form where the model has none.  [TK-CHAT-1, 2, 9]

        `template` names one of the model's templates; the other arguments are ChatTemplate.render's.
        Raises InvalidParameterError on a name that the model does not have.
        """
        chosen = self._choose_template(template, tools is not None)
        if chosen is None:
            plain = [_as_message(message) for message in messages]
            return super().apply_chat_template(plain, add_generation_prompt=add_generation_prompt)
        return chosen.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=documents,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    def _choose_template(self, name: str | None, has_tools: bool) -> ChatTemplate | None:
        """The named one; else "tool_use" for a chat with tools; else the default."""
        named = self._named_chat_templates
        if name is None:
            chosen = named.get("tool_use") if has_tools else None
            chosen = self._chat_template if chosen is None else chosen
            if chosen is not None or not named:
                return chosen
        elif name == "default" and self._chat_template is not None:
            return self._chat_template
        elif name in named:
            return named[name]
        known = ", ".join(sorted(named)) or "none"
        raise InvalidParameterError(
            f"apply chat template: template: got {name or 'no name'!a:.60}, expected one of this model's: {known}"
        )

    def info(self) -> TokenizerInfo:
        """Metadata; counts the vocabulary's longest spelling, so not for hot paths.  [TK-INFO-1]"""
        return TokenizerInfo(
            tokenizer_type=_TYPES.get(type(self._backend.model).__name__, TokenizerType.Custom),
            vocab_size=self.vocab_size(),
            special_tokens=self._special_tokens,
            supports_incremental=True,
            supports_chat_template=self._chat_template is not None or bool(self._named_chat_templates),
            max_token_length=max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=None),
            model_name=self._model_name,
        )

    def create_state(self, skip_special: bool = True) -> DetokenizerState:
        """A fresh stream; it leaves special tokens out unless told otherwise."""
        return DetokenizerState(skip_special, clean_spaces=self._clean_up_spaces)

    def decode_incremental_with_state(self, state: DetokenizerState, token: int) -> str:
        """See IncrementalTokenizer; the deltas and the final flush join to `decode` of all ids.  [TK-STREAM-1..3, 6]"""
        (token,) = _checked([token])
        text = self._backend.id_to_token(token)
        if text is None or (state.skip_special and token in self._skipped):
            return ""
        open_run = self._has_byte_runs and _BYTE_TOKEN.fullmatch(text) is not None
        return incremental.push(state, token, self._decoder(state), open_run)

    def flush(self, state: DetokenizerState) -> str:
        return incremental.flush(state, self._decoder(state))

    def reset_state(self, state: DetokenizerState) -> None:
        state.reset()

    def get_decoded_text(self, state: DetokenizerState) -> str:
        return "".join(state.delivered)

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=skip_special))

    def _decoder(self, state: DetokenizerState) -> incremental.Decode:
        return lambda ids: self._decode(ids, state.skip_special)


def _checked(tokens: Sequence[int]) -> list[int]:
    """The ids as plain ints in [0, 2**32).  [TK-DECODE-2]"""
    ids = []
    for token in tokens:
        try:
            token_id = operator.index(token)
        except TypeError:
            raise InvalidParameterError(f"decode: token id: got {token!a:.60}, expected an integer") from None
        if not 0 <= token_id < 2**32:
            raise InvalidParameterError(f"decode: token id: got {token_id}, expected one in [0, 2**32)")
        ids.append(token_id)
    return ids


def _state(part: Any) -> bytes:
    """A part of the pipeline as JSON; nothing where there is none."""
    return b"" if part is None else bytes(part.__getstate__())


def _as_message(message: ChatMessage | Mapping[str, Any]) -> ChatMessage:
    """A mapping as the plain form shows it."""
    if isinstance(message, ChatMessage):
        return message
    content = message.get("content")
    return ChatMessage(str(message.get("role", "")), "" if content is None else str(content), {})
