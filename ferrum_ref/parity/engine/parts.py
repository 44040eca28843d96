"""What a law is given: constructors of the engine's parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ferrum_ref.errors import FerrumError
from ferrum_ref.interfaces.kv_cache import BlockAllocator, KvCacheHandle, KvCacheManager
from ferrum_ref.interfaces.scheduler import BatchHint
from ferrum_ref.interfaces.step import StepCache, StepScheduler
from ferrum_ref.interfaces.tokenizer import IncrementalTokenizer
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.requests import InferenceRequest


class Member(Protocol):
    """One request's share of a step."""

    @property
    def request_id(self) -> RequestId: ...
    @property
    def num_computed_tokens(self) -> int: ...
    @property
    def num_scheduled_tokens(self) -> int: ...
    @property
    def samples(self) -> bool: ...


class Plan(Protocol):
    """One step."""

    @property
    def sequences(self) -> Sequence[Member]: ...
    @property
    def num_scheduled_tokens(self) -> int: ...
    @property
    def preempted(self) -> Sequence[RequestId]: ...


class Events(Protocol):
    """What a commit did."""

    @property
    def tokens(self) -> Sequence[tuple[RequestId, int]]: ...
    @property
    def finished(self) -> Sequence[tuple[RequestId, Any]]: ...


@dataclass(frozen=True)
class Result:
    """What the law's executor made of a plan."""

    tokens: Mapping[RequestId, int]
    errors: Mapping[RequestId, FerrumError] = field(default_factory=dict)


class Loop(Protocol):
    """A step loop."""

    def submit(
        self,
        request: InferenceRequest,
        prompt_token_ids: Sequence[int],
        *,
        now_s: float,
        stop_token_ids: frozenset[int] = frozenset(),
    ) -> RequestId: ...
    def plan(self, now_s: float) -> Any: ...
    def commit(self, plan: Any, result: Any, now_s: float) -> Any: ...
    def abort(self, plan: Any, *, contents_intact: bool = False) -> None: ...
    def cancel(self, request_id: RequestId, now_s: float) -> bool: ...
    def tokens_of(self, request_id: RequestId, start: int = 0, stop: int | None = None) -> list[int]: ...
    def handle_of(self, request_id: RequestId) -> KvCacheHandle: ...


@dataclass(frozen=True)
class EngineParts:
    """Constructors. make_cache's object is a KvCacheManager too: its statistics say how many blocks are free."""

    make_pool: Callable[[int, int], BlockAllocator]  # num_blocks, block_size
    make_manager: Callable[[int, int], KvCacheManager]  # num_blocks, block_size
    make_cache: Callable[[int, int, bool], StepCache]  # num_blocks, block_size, prefix caching
    make_scheduler: Callable[[int | None, bool], StepScheduler]  # longest chunk, by priority instead of arrival
    make_loop: Callable[[StepScheduler, StepCache, BatchHint], Loop]
    make_tokenizer: Callable[[], IncrementalTokenizer[Any]]  # byte tokens and some longer ones; one special token
