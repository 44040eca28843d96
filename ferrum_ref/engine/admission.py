"""The entrance of an engine: which requests are taken, and with which prompt, limit and stop ids.

Clauses: EN-ADMISSION-1..5 (specs/engine.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError, NotFoundError, RequestValidationError
from ferrum_ref.interfaces.tokenizer import Tokenizer
from ferrum_ref.types.models import ModelInfo
from ferrum_ref.types.requests import InferenceRequest
from ferrum_ref.types.sampling import SamplingParams


class TokenChooser(Protocol):
    """Chooses the tokens of one request, and keeps whatever state that takes."""

    def next_token(self, logits: NDArray[np.floating[Any]]) -> int:
        """The next token.  A failure changes nothing."""


MakeChooser = Callable[[SamplingParams, Sequence[int]], TokenChooser]

# Keys of InferenceRequest.metadata that the engine reads; others are left to the caller.
ADD_SPECIAL_TOKENS = "add_special_tokens"
STOP_TOKEN_IDS = "stop_token_ids"
IGNORE_EOS = "ignore_eos"


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request fit to run: its prompt as ids, its limit cut to the context, its stop ids."""

    request: InferenceRequest
    prompt_token_ids: list[int]
    chooser: TokenChooser
    end_token_ids: frozenset[int]
    own_stop_token_ids: frozenset[int]

    def stop_token_ids(self) -> frozenset[int]:
        return self.end_token_ids | self.own_stop_token_ids


@dataclass(frozen=True, slots=True)
class Entrance:
    """Checks requests before they cost anything.  [EN-ADMISSION-1..5; D-28, D-45]"""

    model_info: ModelInfo
    tokenizer: Tokenizer
    make_chooser: MakeChooser
    end_token_ids: frozenset[int]
    max_context_tokens: int
    add_special_tokens: bool = True

    def admit(self, request: InferenceRequest) -> Admitted:
        """The request, ready to run.  Pure.

        Raises NotFoundError for another model, RequestValidationError for parameters or a prompt that cannot run,
        UnsupportedError for parameters not offered, TokenizerError for text that the vocabulary cannot express.
        """
        if request.model_id != self.model_info.model_id:
            raise NotFoundError(f"infer: model {request.model_id} is not loaded; loaded: {self.model_info.model_id}")
        params = request.sampling_params
        params.validate()
        tokens = self._prompt(request)
        room = self.max_context_tokens - len(tokens)
        if room < 1:
            raise RequestValidationError(
                f"infer: the prompt has {len(tokens)} tokens and the context {self.max_context_tokens}, which leaves"
                " no room for an answer; shorten the prompt"
            )
        if params.max_tokens > room:
            request = request.with_sampling_params(dataclasses.replace(params, max_tokens=room))
        try:
            chooser = self.make_chooser(params, tokens)
        except InvalidParameterError as error:
            raise RequestValidationError(error.message) from error
        ends = frozenset[int]() if request.metadata.get(IGNORE_EOS, False) else self.end_token_ids
        return Admitted(request, tokens, chooser, ends, self._own_stop_ids(request))

    def _prompt(self, request: InferenceRequest) -> list[int]:
        if not isinstance(request.prompt, str) or not request.prompt:
            raise RequestValidationError(f"infer: the prompt must be a text that is not empty, got {request.prompt!r}")
        special = bool(request.metadata.get(ADD_SPECIAL_TOKENS, self.add_special_tokens))
        tokens = [int(t) for t in self.tokenizer.encode(request.prompt, special)]
        if not tokens:
            raise RequestValidationError(f"infer: the prompt {request.prompt!r} has no tokens; give it some text")
        beyond = [t for t in tokens if t >= self.model_info.vocab_size]
        if beyond:
            raise RequestValidationError(
                f"infer: the prompt holds token {beyond[0]}, the model knows {self.model_info.vocab_size}; is this the"
                " model's own tokenizer?"
            )
        return tokens

    def _own_stop_ids(self, request: InferenceRequest) -> frozenset[int]:
        ids: Any = request.metadata.get(STOP_TOKEN_IDS, ())
        if not isinstance(ids, (list, tuple)) or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise RequestValidationError(f"infer: metadata {STOP_TOKEN_IDS!r} must be a list of token ids, got {ids!r}")
        return frozenset(ids)
