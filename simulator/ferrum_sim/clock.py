"""Events at exact times of the virtual clock, after everything else that happens at that time."""

from __future__ import annotations

import simpy
from simpy.events import EventPriority

LATE = EventPriority(2)  # simpy's own are URGENT 0 and NORMAL 1


class Until(float):
    """A delay that ends at an absolute time: now + Until(t) == t, whatever now is.  [SI-CLOCK-1]

    simpy schedules by delay and adds it to the time. For some pairs of float64 times no delay leads from one to the
    other (the sum rounds past it), and a stretch must end exactly where single steps would.
    """

    __slots__ = ()

    def __radd__(self, now_s: float) -> float:
        return float(self)


class LateEvent(simpy.Event):
    """Happens after all ordinary events of its instant: a step that ends at the very time a request arrives finds that
    request there, whichever of the two was scheduled first.  [SI-CLOCK-1]"""

    def happen_at(self, at_s: float) -> LateEvent:
        """Schedule for exactly `at_s`, which is not past; once. Mutates the environment."""
        self._ok = True
        self._value = None
        self.env.schedule(self, LATE, Until(at_s))
        return self
