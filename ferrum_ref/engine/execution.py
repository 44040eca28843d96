"""One step's work: the mixed forward, then a token for every request that reached the end of what it knows.

Runs in a worker thread and touches nothing but its arguments.  Clauses: EN-STEP-1..3 (specs/engine.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.engine.admission import TokenChooser
from ferrum_ref.errors import BackendError, FerrumError
from ferrum_ref.interfaces.model_executor import UnifiedBatch, UnifiedBatchItem, UnifiedExecutor
from ferrum_ref.types.ids import RequestId

Outcome = NDArray[np.floating[Any]] | FerrumError | None


class Share(NamedTuple):
    """One request's part of a step."""

    request_id: RequestId
    item: UnifiedBatchItem
    chooser: TokenChooser


@dataclass(slots=True)
class StepOutcome:
    """A token or an error for each request that was due one."""

    tokens: dict[RequestId, int] = field(default_factory=dict)
    errors: dict[RequestId, FerrumError] = field(default_factory=dict)
    execute_s: float = 0.0
    sample_s: float = 0.0


def run_step(executor: UnifiedExecutor, shares: Sequence[Share], clock: Callable[[], float]) -> StepOutcome:
    """Execute and sample.  Mutates the K/V behind the shares and the choosers; raises nothing.  [EN-STEP-1..3]"""
    outcome = StepOutcome()
    begin_s = clock()
    results = _execute(executor, shares)
    executed_s = clock()
    for share, result in zip(shares, results, strict=True):
        if isinstance(result, FerrumError):
            outcome.errors[share.request_id] = result
        elif share.item.is_final_chunk:
            _choose(share, result, outcome)
    outcome.execute_s, outcome.sample_s = executed_s - begin_s, clock() - executed_s
    return outcome


def _execute(executor: UnifiedExecutor, shares: Sequence[Share]) -> list[Outcome]:
    """All shares in one forward; when that fails, each by itself, so that only the culprits fail.  [EN-STEP-2]

    Nothing was sampled yet, and K/V go where they would have gone anyway: running a share again changes nothing.
    """
    try:
        results = executor.execute_unified(UnifiedBatch([share.item for share in shares]))
        if len(results) != len(shares):
            raise BackendError(f"execute_unified: expected {len(shares)} results, got {len(results)}")
        return list(results)
    except Exception as error:  # noqa: BLE001  (whatever a backend raises ends requests, not the engine)
        if len(shares) == 1:
            return [FerrumError.from_value(error)]
    return [result for share in shares for result in _execute(executor, [share])]


def _choose(share: Share, logits: Outcome, outcome: StepOutcome) -> None:
    try:
        if not isinstance(logits, np.ndarray):
            raise BackendError(f"execute_unified: no logits for the final chunk of {share.item.seq_id}")
        outcome.tokens[share.request_id] = share.chooser.next_token(logits)
    except Exception as error:  # noqa: BLE001  (a failed choice ends its request, not the engine)
        outcome.errors[share.request_id] = FerrumError.from_value(error)
