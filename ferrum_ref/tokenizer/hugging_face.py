"""The Tokenizer contract over Hugging Face `tokenizers`.

Upstream: `ferrum_tokenizer::HuggingFaceTokenizer`; its guesses and defects (D-23, D-26, D-49, D-78) are not repeated.
Clauses: TK-* (specs/tokenizer.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any, Final

import tokenizers

from ferrum_ref.errors import InvalidParameterError, TokenizerError
from ferrum_ref.interfaces.tokenizer import ChatMessage, IncrementalTokenizer, TokenizerInfo, TokenizerType
from ferrum_ref.tokenizer import incremental
from ferrum_ref.tokenizer.chat_template import ChatTemplate
from ferrum_ref.tokenizer.incremental import DetokenizerState
from ferrum_ref.types.sampling import SpecialTokens

_TYPES: Final[Mapping[str, TokenizerType]] = MappingProxyType(
    {"BPE": TokenizerType.BPE, "WordPiece": TokenizerType.WordPiece, "Unigram": TokenizerType.SentencePiece}
)


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
    ) -> None:
        """Takes over `backend` and switches its padding and truncation off."""
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._special_tokens = special_tokens or SpecialTokens()
        self._chat_template = chat_template
        self._model_name = model_name
        self._skipped = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
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
        return self._chat_template

    def encode(self, text: str, add_special: bool) -> list[int]:
        """See Tokenizer.encode; special tokens written out in the text become their ids, as in transformers."""
        try:
            text.encode("utf-8")
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special).ids
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"encode: text: got a lone surrogate at character {error.start}, expected Unicode scalar values"
            ) from None
        return ids

    def decode(self, tokens: Sequence[int], skip_special: bool) -> str:
        """See Tokenizer.decode; an id that the vocabulary does not have stands for no text.  [TK-DECODE-2]"""
        ids = list(tokens)
        if ids and not (min(ids) >= 0 and max(ids) < 2**32):
            wrong = next(token for token in ids if not 0 <= token < 2**32)
            raise InvalidParameterError(f"decode: token id: got {wrong}, expected one in [0, 2**32)")
        return str(self._backend.decode(ids, skip_special_tokens=skip_special))

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
        found: int | None = self._backend.token_to_id(text)
        return found

    def token_text(self, token_id: int) -> str | None:
        if not 0 <= token_id < 2**32:
            return None
        found: str | None = self._backend.id_to_token(token_id)
        return found

    def is_special_token(self, token_id: int) -> bool:
        """True for every id with a role and every added token marked special.  [TK-SPECIAL-1; D-26]"""
        return token_id in self._special

    def apply_chat_template(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The model's own template; the contract's plain form where the model has none.  [TK-CHAT-1, TK-CHAT-2]"""
        if self._chat_template is None:
            return super().apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
        return self._chat_template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)

    def info(self) -> TokenizerInfo:
        """Metadata; counts the vocabulary's longest spelling, so not for hot paths.  [TK-INFO-1]"""
        return TokenizerInfo(
            tokenizer_type=_TYPES.get(type(self._backend.model).__name__, TokenizerType.Custom),
            vocab_size=self.vocab_size(),
            special_tokens=self._special_tokens,
            supports_incremental=True,
            supports_chat_template=self._chat_template is not None,
            max_token_length=max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=None),
            model_name=self._model_name,
        )

    def create_state(self, skip_special: bool = True) -> DetokenizerState:
        """A fresh stream; it leaves special tokens out unless told otherwise."""
        return DetokenizerState(skip_special)

    def decode_incremental_with_state(self, state: DetokenizerState, token: int) -> str:
        """See IncrementalTokenizer; the deltas and the final flush join to `decode` of all ids.  [TK-STREAM-1..3]"""
        if self.token_text(token) is None or (state.skip_special and token in self._skipped):
            self.decode([token], state.skip_special)  # refuses what is no id at all
            return ""
        return incremental.push(state, token, self._decoder(state))

    def flush(self, state: DetokenizerState) -> str:
        return incremental.flush(state, self._decoder(state))

    def reset_state(self, state: DetokenizerState) -> None:
        state.reset()

    def get_decoded_text(self, state: DetokenizerState) -> str:
        return "".join(state.delivered)

    def _decoder(self, state: DetokenizerState) -> incremental.Decode:
        return lambda ids: str(self._backend.decode(ids, skip_special_tokens=state.skip_special))
