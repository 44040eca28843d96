"""What a workload is: requests that arrive at known times, with known prompt and output lengths."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ferrum_ref.errors import InvalidParameterError


@dataclass(frozen=True, slots=True)
class SimRequest:
    """One request of a workload; `index` is its arrival number, which breaks every tie.  [SI-WORKLOAD-1]

    `prompt_runs` says which token ids the prompt has, as (first_id, num_tokens) runs of consecutive ids; two prompts
    share a prefix exactly where their ids agree. `priority`: "low", "normal", "high" or "critical".
    """

    index: int
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    prompt_runs: tuple[tuple[int, int], ...]
    priority: str = "normal"

    def prompt_token_ids(self) -> array[int]:
        """The ids of the prompt, `num_prompt_tokens` of them, int64. Pure.  [SI-WORKLOAD-2]"""
        ids = array("q")
        for first_id, num_tokens in self.prompt_runs:
            ids.extend(range(first_id, first_id + num_tokens))
        return ids


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in arrival order, a one-line description, and notes on what was done to the source."""

    requests: tuple[SimRequest, ...]
    description: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        previous_s = 0.0
        for position, request in enumerate(self.requests):
            if request.index != position or not previous_s <= request.arrival_s < math.inf:
                raise InvalidParameterError(
                    f"Workload: requests[{position}] has index {request.index} and arrival_s {request.arrival_s}; "
                    f"expected index {position} and a finite arrival_s >= {previous_s}: order requests by arrival, and "
                    "use rates that give finite times"
                )
            previous_s = request.arrival_s

    @property
    def num_prompt_tokens(self) -> int:
        return sum(request.num_prompt_tokens for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        return sum(request.num_output_tokens for request in self.requests)

    def scaled(self, rate_scale: float) -> Workload:
        """The same requests at `rate_scale` times the rate: arrival_s / rate_scale. Pure.  [SI-WORKLOAD-3]

        Raises InvalidParameterError unless rate_scale is finite and > 0.
        """
        if not 0.0 < rate_scale < float("inf"):
            raise InvalidParameterError(
                f"scaled: rate_scale is {rate_scale}; expected a finite number > 0; 2 doubles the arrival rate"
            )
        if rate_scale == 1.0:
            return self
        scaled = tuple(replace(request, arrival_s=request.arrival_s / rate_scale) for request in self.requests)
        return Workload(scaled, f"{self.description}, rate x {rate_scale:g}", self.notes)

    def limited(self, num_requests: int | None) -> Workload:
        """Its first `num_requests` requests (None: all). Pure.  [SI-WORKLOAD-3]"""
        if num_requests is None or num_requests >= len(self.requests):
            return self
        description = f"{self.description}, first {num_requests}"
        return Workload(self.requests[:num_requests], description, self.notes)


NUM_TOKEN_IDS = 2**32


def fresh_run(next_id: int, num_tokens: int) -> tuple[int, int]:
    """(first id, num_tokens) for a prompt that shares nothing: from `next_id`, or from 0 where the ids would run out
    (after four billion tokens, long after the cache has forgotten the first). Pure."""
    return (next_id if next_id + num_tokens <= NUM_TOKEN_IDS else 0, num_tokens)


def unshared_requests(rows: Iterable[tuple[float, int, int]]) -> list[SimRequest]:
    """Requests (arrival_s, prompt tokens, output tokens) whose prompts have token ids of their own. Pure."""
    requests = []
    next_id = 0
    for index, (arrival_s, num_prompt_tokens, num_output_tokens) in enumerate(rows):
        run = fresh_run(next_id, num_prompt_tokens)
        requests.append(SimRequest(index, arrival_s, num_prompt_tokens, num_output_tokens, (run,)))
        next_id = sum(run)
    return requests


def order_by_arrival(requests: Sequence[SimRequest]) -> tuple[tuple[SimRequest, ...], int]:
    """Requests sorted by arrival time and renumbered, and how many stood before an earlier one. Pure.  [SI-TRACE-4]

    The sort is stable: requests with equal times keep the order of the source.
    """
    num_out_of_order = sum(later.arrival_s < earlier.arrival_s for earlier, later in itertools.pairwise(requests))
    if num_out_of_order:
        requests = sorted(requests, key=lambda request: request.arrival_s)
    ordered = tuple(
        request if request.index == position else replace(request, index=position)
        for position, request in enumerate(requests)
    )
    return ordered, num_out_of_order
