"""Events at exact times of the virtual clock, after everything else that happens at that time."""

from __future__ import annotations

import math

import simpy
from simpy.events import EventPriority

LATE = EventPriority(2)  # simpy's own are URGENT 0 and NORMAL 1


def delay_until(now_s: float, at_s: float) -> float:
    """A delay d with now_s + d == at_s in float64, for at_s >= now_s >= 0. Pure.  [SI-CLOCK-1]

    at_s - now_s may be rounded so that adding it to now_s misses at_s by one unit in the last place.
    """
    delay_s = at_s - now_s
    while now_s + delay_s < at_s:
        delay_s = math.nextafter(delay_s, math.inf)
    while now_s + delay_s > at_s:
        delay_s = math.nextafter(delay_s, -math.inf)
    return delay_s


class LateEvent(simpy.Event):
    """Happens after all ordinary events of its instant: a step that ends at the very time a request arrives finds that
    request there, whichever of the two was scheduled first.  [SI-CLOCK-1]"""

    def happen_at(self, at_s: float) -> LateEvent:
        """Schedule for exactly `at_s`; once. Mutates the environment."""
        self._ok = True
        self._value = None
        self.env.schedule(self, LATE, delay_until(self.env.now, at_s))
        return self
