"""memmove on a device whose own copies must not overlap.  Clauses: BK-CUPY-26 (specs/backend_cupy.md), ME-COPY-1."""

from __future__ import annotations

from typing import Final

from ferrum_cupy.machine import DeviceArray, DeviceStream, Machine
from ferrum_ref.errors import ResourceExhaustedError

BOUNCE_BYTES: Final = 1 << 20


def move_bytes(
    machine: Machine,
    target: DeviceArray,
    to: int,
    source: DeviceArray,
    start: int,
    num_bytes: int,
    stream: DeviceStream | None,
) -> DeviceArray | None:
    """target[to:][:num_bytes] = source[start:][:num_bytes] as memmove, in order on `stream`; None: done on return.

    Ranges of one buffer that overlap go in pieces, from the end that nothing overwrites: pieces as long as the
    distance, or, where that is short and there is memory for one, through a bounce buffer. Returns that buffer, which
    must outlive the copy.
    """
    distance = abs(start - to)
    overlaps = machine.address(target) == machine.address(source) and distance < num_bytes
    if num_bytes == 0 or (overlaps and distance == 0):
        return None
    if not overlaps:
        machine.copy_bytes(target[to : to + num_bytes], source[start : start + num_bytes], stream)
        return None
    bounce = _bounce(machine, min(num_bytes, BOUNCE_BYTES)) if distance < BOUNCE_BYTES else None
    step = distance if bounce is None else min(num_bytes, BOUNCE_BYTES)
    pieces = range(0, num_bytes, step)
    for at in pieces if to < start else reversed(pieces):
        length = min(step, num_bytes - at)
        piece = source[start + at : start + at + length]
        goal = target[to + at : to + at + length]
        if bounce is None:
            machine.copy_bytes(goal, piece, stream)
        else:
            machine.copy_bytes(bounce[:length], piece, stream)
            machine.copy_bytes(goal, bounce[:length], stream)
    return bounce


def _bounce(machine: Machine, num_bytes: int) -> DeviceArray | None:
    try:
        return machine.allocate_bytes(num_bytes)
    except ResourceExhaustedError:  # more and shorter pieces then
        return None
