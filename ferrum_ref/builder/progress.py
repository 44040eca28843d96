"""How far a build is.  Clauses: MB-PROGRESS-1..3 (specs/model_builder.md)."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from itertools import accumulate
from types import MappingProxyType
from typing import Any, Final

from ferrum_ref.errors import CancelledError, FerrumTimeoutError
from ferrum_ref.interfaces.model_builder import BuildPhase, BuildProgress

# Each phase's share of the whole; reading weights takes most of a build.
_SHARES: Final[Mapping[BuildPhase, float]] = MappingProxyType({
    BuildPhase.Validation: 0.02,
    BuildPhase.WeightLoading: 0.80,
    BuildPhase.ModelInitialization: 0.04,
    BuildPhase.LayerConstruction: 0.03,
    BuildPhase.ParameterBinding: 0.03,
    BuildPhase.Optimization: 0.03,
    BuildPhase.FinalValidation: 0.04,
    BuildPhase.Finalization: 0.01,
})  # fmt: skip
_STARTS: Final = MappingProxyType(dict(zip(_SHARES, accumulate(_SHARES.values(), initial=0.0))))


class BuildReporter:
    """Reports to one listener, in order and never backwards; also where a build learns that it must stop.

    Reports come from whichever thread works; a lock keeps them in order. An exception of the listener passes through.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        listener: Callable[[BuildProgress], None] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self._clock = clock
        self._listener = listener
        self._timeout_s = timeout_s
        self._start_s = clock()
        self._lock = threading.Lock()
        self._progress = 0.0
        self._phase = BuildPhase.Validation
        self._stopped = False

    def elapsed_s(self) -> float:
        """Seconds since the build began."""
        return max(0.0, self._clock() - self._start_s)

    def stop(self) -> None:
        """Nobody waits for this build any more: the next `require_time` ends it."""
        self._stopped = True

    def require_time(self) -> None:
        """Raises FerrumTimeoutError past the limit, CancelledError once stopped."""
        if self._timeout_s is not None and self.elapsed_s() >= self._timeout_s:
            raise self.timed_out()
        if self._stopped:
            raise CancelledError("build: cancelled by its caller")

    def timed_out(self) -> FerrumTimeoutError:
        return FerrumTimeoutError(
            f"build: not done after {self._timeout_s} s, in phase {self._phase.value}; raise build_timeout_seconds"
        )

    def report(self, phase: BuildPhase, operation: str, done: float = 0.0, **details: Any) -> None:
        """`done`: the fraction of the phase behind us.  Raises as `require_time`, and what the listener raises."""
        self.require_time()
        with self._lock:
            whole = min(1.0, _STARTS[phase] + _SHARES[phase] * min(max(done, 0.0), 1.0))
            if phase is BuildPhase.Finalization and done >= 1.0:
                whole = 1.0
            if list(BuildPhase).index(phase) > list(BuildPhase).index(self._phase):
                self._phase = phase
            self._progress = max(self._progress, whole)
            if self._listener is None:
                return
            elapsed_s = self.elapsed_s()
            self._listener(
                BuildProgress(
                    phase=self._phase,
                    progress=self._progress,
                    current_operation=operation,
                    elapsed_seconds=int(elapsed_s),
                    remaining_seconds=_remaining(elapsed_s, self._progress),
                    phase_details=details,
                )
            )


def _remaining(elapsed_s: float, progress: float) -> int | None:
    """Seconds to go if the rest takes as long in proportion; None while too little is done to say."""
    return math.ceil(elapsed_s * (1.0 - progress) / progress) if progress >= 0.05 else None
