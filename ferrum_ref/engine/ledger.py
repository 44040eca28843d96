"""Conservation of requests and tokens, and the loop's state.  Clauses: ST-LOOP-11..12 (specs/step_loop.md)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from hashlib import blake2b

from ferrum_ref.errors import InternalError
from ferrum_ref.interfaces.step import SequenceState


class Ledger:
    """Where every token and request went.  [ST-LOOP-11]

    computed + prefix hits = computed tokens of live requests + lost to preemption + retired with their request;
    generated = generated tokens of live requests + retired; submitted = live + retired requests.
    """

    __slots__ = (
        "num_computed_tokens",
        "num_generated_tokens",
        "num_hit_tokens",
        "num_lost_tokens",
        "num_retired",
        "num_retired_computed_tokens",
        "num_retired_generated_tokens",
        "num_submitted",
    )

    def __init__(self) -> None:
        self.num_submitted = 0
        self.num_retired = 0
        self.num_computed_tokens = 0
        self.num_hit_tokens = 0
        self.num_lost_tokens = 0
        self.num_retired_computed_tokens = 0
        self.num_generated_tokens = 0
        self.num_retired_generated_tokens = 0

    def retire(self, sequence: SequenceState) -> None:
        """Book a request that leaves the loop."""
        self.num_retired += 1
        self.num_retired_computed_tokens += sequence.num_computed_tokens
        self.num_retired_generated_tokens += sequence.num_known_tokens - sequence.num_prompt_tokens

    def check(self, live: Collection[SequenceState]) -> None:
        """Raises InternalError unless all three equations hold and every request is consistent."""
        computed = sum(sequence.num_computed_tokens for sequence in live)
        generated = sum(sequence.num_known_tokens - sequence.num_prompt_tokens for sequence in live)
        _require(self.num_submitted == len(live) + self.num_retired, "requests submitted, live and retired differ")
        _require(
            self.num_computed_tokens + self.num_hit_tokens
            == computed + self.num_lost_tokens + self.num_retired_computed_tokens,
            "computed tokens do not add up",
        )
        _require(
            self.num_generated_tokens == generated + self.num_retired_generated_tokens,
            "generated tokens do not add up",
        )
        for sequence in live:
            _require(
                sequence.num_computed_tokens < sequence.num_known_tokens < sequence.max_known_tokens
                and len(sequence.tokens) == sequence.num_known_tokens,
                f"request {sequence.request_id}: {sequence.num_computed_tokens} computed, {sequence.num_known_tokens}"
                f" known, {len(sequence.tokens)} stored, {sequence.max_known_tokens} at most",
            )
            _require(
                (sequence.handle is None) == (sequence.queue_entry is not None)
                and (sequence.handle is not None or sequence.num_computed_tokens == 0),
                f"request {sequence.request_id} waits with a cache, or runs without one",
            )

    def state_parts(self) -> Iterator[object]:
        yield tuple(getattr(self, name) for name in self.__slots__)


def digest_of(parts: Iterable[object]) -> str:
    """blake2b-128 of a stream of plain values. Pure."""
    hasher = blake2b(digest_size=16)
    for part in parts:
        hasher.update(repr(part).encode())
        hasher.update(b"\n")
    return hasher.hexdigest()


def _require(holds: bool, breach: str) -> None:
    if not holds:
        raise InternalError(f"Step loop invariant broken: {breach}")
