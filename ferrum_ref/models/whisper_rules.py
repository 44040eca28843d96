"""Which token may follow: the rules that make Whisper's timestamps come in pairs, and what they say about the text.

Clauses: FM-WHISPER-12..14 (specs/audio.md).  Source: openai/whisper, `ApplyTimestampRules` and `transcribe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.models.whisper_tokens import WhisperTokens

_LATEST_FIRST: Final = 50  # timestamps: the first one lies within 1 s


def allowed(logits: NDArray[np.float32], written: Sequence[int], tokens: WhisperTokens) -> NDArray[np.float64]:
    """A copy of `logits` `[V]` with -inf for every token that may not follow `written`.  Pure.  [FM-WHISPER-12]

    Suppressed tokens never; the first token is a timestamp of at most 1 s; timestamps come in pairs, end before text
    goes on, and never go back; where all timestamps together outweigh every other token, one of them comes.
    """
    masked = np.array(logits, dtype=np.float64)
    masked[list(tokens.suppressed)] = -np.inf
    first = tokens.first_timestamp
    if not written:
        masked[list(tokens.suppressed_first)] = -np.inf
        masked[:first] = -np.inf
        masked[first + _LATEST_FIRST + 1 :] = -np.inf
        return masked
    after_time = written[-1] >= first
    after_pair = after_time and (len(written) < 2 or written[-2] >= first)
    if after_pair:
        masked[first:] = -np.inf
    elif after_time:
        masked[: tokens.end] = -np.inf
    times = [token for token in written if token >= first]
    if times:
        masked[first : times[-1] + (0 if after_time and not after_pair else 1)] = -np.inf
    best_text = masked[:first].max()
    if _log_sum(masked[first:]) > best_text:
        masked[:first] = -np.inf
    return masked


@dataclass(frozen=True, slots=True)
class Span:
    """Timestamps of a window, in steps of 0.02 s from its start, and the text's tokens between them."""

    start: int
    end: int
    tokens: tuple[int, ...]


def spans(written: Sequence[int], tokens: WhisperTokens, num_steps: int) -> tuple[list[Span], int]:
    """The spans that a window's tokens tell of, and how many steps of the window are settled.  Pure.  [FM-WHISPER-13]

    `written` has no end token. Two timestamps in a row divide spans; what follows the last of them is heard again,
    from there, unless the window ends with a single timestamp. Without such a pair the whole window is one span.
    """
    first = tokens.first_timestamp
    is_time = [token >= first for token in written]
    cuts = [index for index in range(1, len(written)) if is_time[index] and is_time[index - 1]]
    if not cuts:
        times = [token - first for token in written if token >= first]
        end = times[-1] if times and times[-1] else num_steps
        begin = times[0] if len(times) > 1 and is_time[0] else 0
        return [Span(begin, max(begin, end), _text(written, first))], num_steps
    closes = len(written) > 1 and is_time[-1] and not is_time[-2]
    borders = [0, *cuts, *([len(written)] if closes else [])]
    found = []
    for low, high in pairwise(borders):
        piece = written[low:high]
        found.append(Span(piece[0] - first, max(piece[0], piece[-1]) - first, _text(piece, first)))
    settled = num_steps if closes else written[cuts[-1] - 1] - first
    return found, settled


def log_probability(masked: NDArray[np.float64], token: int) -> float:
    """ln softmax(masked)[token].  Pure.  [FM-WHISPER-14]"""
    return float(masked[token]) - _log_sum(masked)


def _text(written: Sequence[int], first_timestamp: int) -> tuple[int, ...]:
    return tuple(token for token in written if token < first_timestamp)


def _log_sum(values: NDArray[np.float64]) -> float:
    """ln sum exp; -inf for nothing."""
    highest = values.max(initial=-np.inf)
    return -np.inf if highest == -np.inf else float(highest + np.log(np.exp(values - highest).sum()))
