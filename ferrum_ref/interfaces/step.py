"""What scheduler, KV-cache manager and step loop share: one record per request, and the two protocols between them.

The rooms never import each other; they meet in these types. Everything here is synchronous and pure of time.
Clauses: ST-SEQUENCE-1..2 (specs/step_loop.md), SC-STEP-*, KV-STEP-*.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from ferrum_ref.types.requests import InferenceRequest, RequestState

if TYPE_CHECKING:
    from ferrum_ref.interfaces.kv_cache import BlockTable
    from ferrum_ref.interfaces.scheduler import BatchHint, SchedulerConfig
    from ferrum_ref.types.ids import RequestId
    from ferrum_ref.types.sampling import FinishReason, Priority

FILLER_TOKEN_ID = 0  # the id every token gets whose value nobody computes (simulation)


class StepHandle(Protocol):
    """The part of a cache handle that the hot loop reads: positions below `writable_tokens` may be written at once."""

    table: BlockTable
    writable_tokens: int
    num_registered_blocks: int


class SequenceState:
    """One request on its way: who writes which field is said beside it.  [ST-SEQUENCE-1..2]

    known = prompt + generated tokens; computed = known tokens whose K/V is in the cache; 0 <= computed < known.
    """

    __slots__ = (
        "arrival_number",  # scheduler, once: the total order's last word
        "block_digests",  # KV manager: chained digests of the full blocks, grown on demand
        "ending",  # step loop: why it ends once the step in flight is over
        "handle",  # KV manager: the cache while running, else None
        "max_known_tokens",  # step loop, once: generation ends there (Length)
        "num_computed_tokens",  # scheduler (admission, preemption), step loop (commit)
        "num_known_tokens",  # step loop
        "num_preemptions",  # scheduler
        "num_prompt_tokens",  # step loop, once
        "priority",  # scheduler
        "queue_entry",  # scheduler: its live entry in the waiting queue
        "request",
        "request_id",
        "started_at_s",  # scheduler: first admission
        "state",  # scheduler
        "stop_token_ids",  # step loop, once
        "submitted_at_s",
        "tokens",  # step loop: known token ids, int64
    )

    def __init__(
        self,
        request: InferenceRequest,
        tokens: array[int],
        num_prompt_tokens: int,
        max_known_tokens: int,
        stop_token_ids: frozenset[int],
        submitted_at_s: float,
    ) -> None:
        self.request = request
        self.request_id: RequestId = request.id
        self.priority: Priority = request.priority
        self.tokens = tokens
        self.num_prompt_tokens = num_prompt_tokens
        self.num_known_tokens = num_prompt_tokens
        self.num_computed_tokens = 0
        self.max_known_tokens = max_known_tokens
        self.stop_token_ids = stop_token_ids
        self.submitted_at_s = submitted_at_s
        self.started_at_s: float | None = None
        self.arrival_number = -1
        self.state = RequestState.Waiting
        self.handle: StepHandle | None = None
        self.block_digests: list[bytes] = []
        self.num_preemptions = 0
        self.queue_entry: Any = None
        self.ending: FinishReason | None = None


class Schedule:
    """Who runs in one step and with how many tokens, and what it takes to undo that."""

    __slots__ = ("admitted", "computed", "members", "partial", "preempted", "running_before", "scheduled", "started")

    def __init__(self) -> None:
        self.members: list[SequenceState] = []
        self.computed: list[int] = []  # computed tokens of each member before the step
        self.scheduled: list[int] = []  # tokens each member computes in the step, >= 1
        self.partial: list[int] = []  # indices of members that do not reach the end of their known tokens
        self.preempted: list[tuple[SequenceState, int]] = []  # with the computed tokens they lost
        self.admitted: list[tuple[SequenceState, RequestState]] = []  # with their state before
        self.started: list[SequenceState] = []  # admitted for the first time
        self.running_before: list[SequenceState] | None = None  # set when `running` changed


class BlockLender(Protocol):
    """What deciding a step asks of a cache.  [KV-STEP-1..4]"""

    @property
    def block_size(self) -> int: ...
    def match_prefix(self, sequence: SequenceState) -> Sequence[int]:
        """Blocks that already hold the head of the known tokens; never all of them. Pure."""

    def admit(self, sequence: SequenceState, hits: Sequence[int], num_tokens: int) -> bool:
        """A handle on `hits` plus new blocks, for `num_tokens` in all; False, with no change, if short."""

    def grow(self, sequence: SequenceState, num_tokens: int) -> bool:
        """Make the first `num_tokens` positions writable; False, with no change, when blocks are short."""

    def release(self, sequence: SequenceState) -> None:
        """Free the sequence's blocks, last first; their digests stay usable until overwritten."""


class StepCache(BlockLender, Protocol):
    """What the step loop asks of a KV-cache manager.  [KV-STEP-1..8]

    Between `begin_step` and `end_step` every change is undoable.
    """

    @property
    def lock(self) -> AbstractContextManager[Any]: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def caches_prefixes(self) -> bool: ...
    @property
    def bytes_per_block(self) -> int: ...

    def attach(self) -> None:
        """A step loop drives this manager from now on.  Raises SchedulerError when another one does."""

    def begin_step(self, now_s: float) -> None: ...
    def end_step(self) -> None: ...
    def undo_step(self) -> None: ...
    def overwritten(self, sequence: SequenceState, blocks: set[int]) -> bool:
        """Does the sequence hold computed tokens in one of `blocks`. Pure."""

    def planned_blocks(self, schedule: Schedule) -> set[int]:
        """The blocks a step writes to. Pure."""

    def forget_blocks(self, blocks: Iterable[int]) -> None:
        """What these blocks hold is no longer what their digests say."""

    def register_blocks(self, sequence: SequenceState) -> None:
        """Make the full computed blocks findable by `match_prefix`."""

    def stays_blocked(self, sequence: SequenceState, max_new_tokens: int) -> bool:
        """Can `sequence` certainly not be admitted while the running requests only decode. Pure."""

    def decode_steps(self, members: Sequence[SequenceState], max_steps: int) -> int:
        """How many decode steps of `members`, this planned one included, the free blocks can serve. Pure."""

    def grow_decode(self, members: Sequence[SequenceState], num_steps: int) -> None:
        """Take and register the blocks of `num_steps` committed decode steps, in the order single steps would."""

    def check_invariants(self, sequences: Iterable[SequenceState]) -> None: ...
    def state_parts(self) -> Iterable[object]:
        """Everything that decides future behaviour, as a canonical stream of plain values."""


class StepScheduler(Protocol):
    """What the step loop asks of a scheduler.  [SC-STEP-1..8]"""

    @property
    def num_waiting(self) -> int: ...
    @property
    def num_running(self) -> int: ...

    def config(self) -> SchedulerConfig: ...
    def require_usable(self, hint: BatchHint) -> None:
        """Raises SchedulerError or UnsupportedError for limits that no step could keep."""

    def attach(self) -> None:
        """A step loop drives this scheduler from now on.  Raises SchedulerError when something else does."""

    def enqueue(self, sequence: SequenceState) -> None: ...
    def fill(self, schedule: Schedule, cache: BlockLender, hint: BatchHint, now_s: float) -> None:
        """Decide the next step; running and waiting change at once, `undo` takes it back."""

    def undo(self, schedule: Schedule) -> None: ...
    def preempt_now(self, sequence: SequenceState, cache: BlockLender) -> None:
        """Preempt a running request between steps."""

    def applied(self, schedule: Schedule) -> None:
        """The step of `schedule` was committed."""

    def retire(self, sequence: SequenceState, state: RequestState, now_s: float) -> None: ...
    def change_priority(self, sequence: SequenceState, priority: Priority) -> None: ...
    def next_waiting(self, hint: BatchHint, num_decodes: int) -> tuple[SequenceState, int] | None:
        """(request, token limit) that the step after one of `num_decodes` decodes would try to admit. Pure."""

    def check_invariants(self, sequences: Iterable[SequenceState]) -> None: ...
    def queue_position(self, sequence: SequenceState) -> int | None: ...
    def state_parts(self) -> Iterable[object]: ...
