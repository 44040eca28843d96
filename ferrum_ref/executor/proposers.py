"""Where drafts come from: a text's own past, or a smaller model.

Clauses: MX-PROPOSE-1..5 (specs/model_executor.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.executor.speculation import GREEDY_BELOW, Floats, pick, token_distribution
from ferrum_ref.interfaces.kv_cache import KvCacheHandle
from ferrum_ref.interfaces.model_executor import Proposal
from ferrum_ref.types.parity_mode import ParityMode

Logits = npt.NDArray[np.float32]
NOTHING = Proposal(())


@dataclass(slots=True)
class Speculated:
    """One text in the making: its tokens (prompt, then what was generated) and its own random numbers."""

    key: int
    tokens: list[int]
    num_prompt: int
    random: np.random.Generator


class CachedModel(Protocol):
    """What drafting and verifying need of an executor; `PagedModelExecutor` has it."""

    @property
    def max_tokens(self) -> int:
        """Longest sequence."""

    def new_cache_now(self) -> KvCacheHandle:
        """An empty cache."""

    def append_now(
        self,
        handles: Sequence[KvCacheHandle],
        tokens: Sequence[Sequence[int]],
        wanted: Literal["all", "last", "none"] = "all",
    ) -> list[Logits]:
        """tokens[i] at the end of handles[i], in one forward: the wanted rows of logits `[n_i, V]`."""

    def truncate_now(self, kv_cache: KvCacheHandle, new_len: int) -> None:
        """Forget the tokens from `new_len` on."""

    def release_cache(self, cache_id: str) -> None:
        """Free a cache."""


class Proposer(ABC):
    """Drafts a few tokens for each of several texts.  [MX-PROPOSE-1]"""

    @abstractmethod
    def propose(self, texts: Sequence[Speculated], limits: Sequence[int]) -> list[Proposal]:
        """At most limits[i] tokens after texts[i], with the distributions they were really drawn from.

        May draw from the texts' random numbers; changes nothing else of theirs.
        """

    def forget(self, key: int) -> None:
        """A text is finished: drop what is kept for it; default: nothing."""
        return


class NgramProposer(Proposer):
    """Prompt lookup: what followed the last words when they occurred before.  [MX-PROPOSE-2]

    The longest suffix of max_ngram down to min_ngram tokens that occurs earlier; of its occurrences the latest that is
    followed by enough tokens, else the one followed by most. Every draft is a point mass.
    Source: Saxena 2023, prompt lookup decoding.
    """

    def __init__(self, max_ngram: int = 3, min_ngram: int = 1) -> None:
        """Raises InvalidParameterError unless 1 <= min_ngram <= max_ngram."""
        if not 1 <= min_ngram <= max_ngram:
            raise InvalidParameterError(
                f"NgramProposer: expected 1 <= min_ngram <= max_ngram, got {min_ngram} and {max_ngram}"
            )
        self._max_ngram = max_ngram
        self._min_ngram = min_ngram

    def propose(self, texts: Sequence[Speculated], limits: Sequence[int]) -> list[Proposal]:
        return [
            Proposal(tuple(self.lookup(text.tokens, limit))) if limit > 0 else NOTHING
            for text, limit in zip(texts, limits, strict=True)
        ]

    def lookup(self, tokens: Sequence[int], limit: int) -> list[int]:
        """At most `limit` tokens that followed an earlier occurrence of the end of `tokens`. Pure."""
        ids = np.asarray(tokens, dtype=np.int64)
        for size in range(min(self._max_ngram, len(ids) - 1), self._min_ngram - 1, -1):
            windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], size)
            (starts,) = np.nonzero((windows == ids[-size:]).all(axis=1))
            if len(starts):
                ends = starts + size
                complete = ends[ends + limit <= len(ids)]
                begin = int(complete[-1] if len(complete) else ends[0])
                return [int(token) for token in ids[begin : begin + limit]]
        return []


@dataclass(slots=True)
class _Drafted:
    """A draft model's cache and the tokens in it."""

    handle: KvCacheHandle
    cached: list[int] = field(default_factory=list)


class DraftModelProposer(Proposer):
    """A smaller model writes ahead, over caches of its own, cut back to what was accepted.  [MX-PROPOSE-3..5; D-24]"""

    def __init__(
        self, model: CachedModel, temperature: float = 0.0, *, parity_mode: ParityMode = ParityMode.REFERENCE
    ) -> None:
        """temperature of the drafts: 0 takes the argmax (point masses), else they are drawn, and their softmax told.

        UPSTREAM takes the argmax and tells the softmax all the same: what comes out then has another distribution than
        the target's.  Raises InvalidParameterError for a negative or infinite temperature.
        """
        if not 0 <= temperature < np.inf:
            raise InvalidParameterError(f"DraftModelProposer: temperature is {temperature}, expected a number >= 0")
        self._model = model
        self._temperature = temperature
        self._parity_mode = parity_mode
        self._drafted: dict[int, _Drafted] = {}

    def propose(self, texts: Sequence[Speculated], limits: Sequence[int]) -> list[Proposal]:
        """[MX-PROPOSE-3..4]  A text at the end of the draft model's context gets no draft."""
        rooms = [
            min(limit, self._model.max_tokens - len(text.tokens) + 1) for text, limit in zip(texts, limits, strict=True)
        ]
        active = [i for i, room in enumerate(rooms) if room > 0]
        tokens: list[list[int]] = [[] for _ in texts]
        rows: list[list[Floats]] = [[] for _ in texts]
        feeds = [self._behind(texts[i]) for i in active]
        while active:
            entries = [self._drafted[texts[i].key] for i in active]
            logits = self._model.append_now([entry.handle for entry in entries], feeds, "last")
            for entry, feed in zip(entries, feeds, strict=True):
                entry.cached += feed
            drawn, told = self._draw(np.concatenate(logits), [texts[i] for i in active])
            for i, token, row in zip(active, drawn, told, strict=True):
                tokens[i].append(token)
                rows[i].append(row)
            going = [at for at, i in enumerate(active) if len(tokens[i]) < rooms[i]]
            feeds = [[drawn[at]] for at in going]
            active = [active[at] for at in going]
        tells = self._temperature >= GREEDY_BELOW
        return [
            Proposal(tuple(part), np.stack(told) if tells else None) if part else NOTHING
            for part, told in zip(tokens, rows, strict=True)
        ]

    def forget(self, key: int) -> None:
        drafted = self._drafted.pop(key, None)
        if drafted is not None:
            self._model.release_cache(drafted.handle.cache_id())

    def _behind(self, text: Speculated) -> list[int]:
        """Cut the text's cache back to what still holds; the known tokens that are not in it, at least the last."""
        entry = self._drafted.get(text.key)
        if entry is None:
            entry = self._drafted[text.key] = _Drafted(self._model.new_cache_now())
        num_kept = common_prefix(entry.cached, text.tokens[:-1])
        if num_kept < len(entry.cached):
            self._model.truncate_now(entry.handle, num_kept)
            del entry.cached[num_kept:]
        return text.tokens[num_kept:]

    def _draw(self, logits: Logits, texts: Sequence[Speculated]) -> tuple[list[int], Floats]:
        """A token after each row, and the rows' distributions."""
        law = token_distribution(logits, self._temperature)
        if self._temperature < GREEDY_BELOW or self._parity_mode is ParityMode.UPSTREAM:
            return logits.argmax(axis=-1).tolist(), law
        return pick(law, np.array([text.random.random() for text in texts])).tolist(), law


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading tokens that both have. Pure."""
    width = min(len(first), len(second))
    if first[:width] == second[:width]:
        return width
    differs = np.asarray(first[:width]) != np.asarray(second[:width])
    return int(differs.argmax())
