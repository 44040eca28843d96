"""From a request and its prompt ids to the record the step loop works with.  Clauses: ST-SUBMIT-1..4."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import RequestValidationError
from ferrum_ref.interfaces.step import SequenceState
from ferrum_ref.types.requests import InferenceRequest

MAX_TOKEN_ID = 2**32 - 1


def make_sequence(
    request: InferenceRequest,
    prompt_token_ids: Sequence[int] | npt.NDArray[np.integer],
    stop_token_ids: frozenset[int],
    context_limit_tokens: int,
    now_s: float,
) -> SequenceState:
    """The record of a new request; generation ends at min(prompt + max_tokens, context limit).  [ST-SUBMIT-1..3]

    Pure.  Raises RequestValidationError: empty prompt, ids outside [0, 2**32), no token to generate, prompt that leaves
    no room for one.
    """
    tokens = token_array(prompt_token_ids)
    max_tokens = request.sampling_params.max_tokens
    if not tokens:
        raise RequestValidationError("submit: the prompt has no tokens; send at least one")
    if max_tokens < 1:
        raise RequestValidationError(f"submit: max_tokens must be >= 1, got {max_tokens}")
    if len(tokens) >= context_limit_tokens:
        raise RequestValidationError(
            f"submit: the prompt has {len(tokens)} tokens; prompt and answer share a context of"
            f" {context_limit_tokens} tokens here; shorten the prompt to at most {context_limit_tokens - 1}"
        )
    limit = min(len(tokens) + max_tokens, context_limit_tokens)
    return SequenceState(request, tokens, len(tokens), limit, stop_token_ids, now_s)


def token_array(ids: Sequence[int] | npt.NDArray[np.integer]) -> array[int]:
    """A growable int64 copy. Pure.  Raises RequestValidationError for anything but ids in [0, 2**32).  [ST-SUBMIT-2]"""
    values = ids if isinstance(ids, array) and ids.typecode == "q" else np.asarray(ids)
    if isinstance(values, np.ndarray):
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
            raise RequestValidationError(
                f"submit: prompt_token_ids must be a sequence of integers, got {values.ndim}-d {values.dtype}"
            )
        if values.dtype == np.uint64 and values.size and int(values.max()) > MAX_TOKEN_ID:
            raise RequestValidationError(f"submit: token ids must be in [0, 2**32), got {values.max()}")
        tokens = array("q")
        tokens.frombytes(np.ascontiguousarray(values, dtype=np.int64).tobytes())
    else:
        tokens = values[:]
    if tokens:
        view = np.frombuffer(tokens, dtype=np.int64)
        low, high = int(view.min()), int(view.max())
        if low < 0 or high > MAX_TOKEN_ID:
            raise RequestValidationError(f"submit: token ids must be in [0, 2**32), got {low if low < 0 else high}")
    return tokens
