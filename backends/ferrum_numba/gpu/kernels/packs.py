"""How kernels move rows in packs of eight elements: sixteen bytes at a time, or one by one to the same values.

A kernel looks at addresses and sizes once and takes one of two bodies, made by one function from the two `Access`es.
Clause: BK-NCUDA-42 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ferrum_numba.gpu.kernel import device
from ferrum_numba.gpu.narrow import fetch_each, put_each
from ferrum_numba.gpu.storage import Storage
from ferrum_numba.gpu.wide import fetch, put, widen_bfloat, widen_half
from ferrum_ref.types.devices import DataType


@dataclass(frozen=True, slots=True)
class Access:
    """Packs of one float type; one at start + first counts as far as first < end.

    fetch(array, start, first, end)         a pack as it lies, zeros beyond the end
    widen(fetched)                          its eight float32 numbers
    put(array, start, first, end, values)   eight float32 numbers, rounded; nothing beyond the end
    """

    fetch: Callable[..., Any]
    widen: Callable[..., Any]
    put: Callable[..., None]


@device
def as_it_is(fetched: Any) -> Any:
    return fetched


def widening(x: Storage) -> Callable[..., Any]:
    """What makes float32 numbers of a pack fetched in one piece."""
    found: Callable[..., Any] = {DataType.FP16: widen_half, DataType.BF16: widen_bfloat}.get(x.data_type, as_it_is)
    return found


def wide_access(x: Storage) -> Access:
    """Rows of whole packs on 16-byte addresses."""
    return Access(fetch, widening(x), put)


def narrow_access() -> Access:
    """Any rows, element by element."""
    return Access(fetch_each, as_it_is, put_each)
