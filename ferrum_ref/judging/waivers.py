"""Known failures with a reason and a date: they do not fail the run until then, and must be failures.

    [[waiver]]
    operation = "linear"            # one operation
    dtype = "bf16"                  # one type, or "*"
    probe = "tail of K"             # optional: only cases whose label holds this
    at_most = 2.0                   # optional: only while err/bound is no larger; a crash is
    reason = "the vendor's GEMM rounds its partial sums; ticket 1234"
    expires = 2027-01-31

Clauses: PA-WAIVER-1..6 (specs/judging.md).
"""

from __future__ import annotations

import datetime
import math
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ferrum_ref.errors import FerrumIOError, InvalidFormatError
from ferrum_ref.parity.ops.catalogue import EVERY, operation_named
from ferrum_ref.parity.runner import FAILED, PASSED, WAIVED, CaseResult
from ferrum_ref.parity.units import STORAGES

_FIELDS = {"operation", "dtype", "probe", "at_most", "reason", "expires"}


@dataclass(frozen=True, slots=True)
class Waiver:
    """One known failure.  [PA-WAIVER-1]"""

    operation: str
    dtype: str
    reason: str
    expires: datetime.date
    probe: str = ""
    at_most: float = math.inf

    def covers(self, result: CaseResult) -> bool:
        """Whether the case is one of those it speaks of."""
        return (
            result.operation == self.operation
            and self.dtype in ("*", result.dtype)
            and (not self.probe or self.probe in result.label)
        )

    def bears(self, result: CaseResult) -> bool:
        """Whether a covered failure is no worse than what was known.  [PA-WAIVER-5]"""
        ratios = (result.ratio_det, result.ratio_prob, result.ratio_sharp, result.ratio_statistical)
        return max(ratio for ratio in ratios if ratio is not None) <= self.at_most

    @property
    def where(self) -> str:
        return f"{self.operation} {self.dtype}" + (f" ({self.probe})" if self.probe else "")


def read_waivers(path: Path) -> list[Waiver]:
    """The waivers of a TOML file.  [PA-WAIVER-1]

    Raises FerrumIOError (cannot be read), InvalidFormatError naming the entry and the field: unknown or missing field,
    unknown operation or type, a probe that no case has, a limit that is not above 1, an empty reason, no date.
    """
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise FerrumIOError(f"read waivers {path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidFormatError(f"read waivers {path}: {error}") from None
    entries = document.pop("waiver", [])
    if document or not isinstance(entries, list):
        raise InvalidFormatError(
            f"read waivers {path}: got {sorted(document) or entries!r}, expected [[waiver]] entries"
        )
    return [_waiver(path, number, entry) for number, entry in enumerate(entries, start=1)]


def _waiver(path: Path, number: int, entry: Any) -> Waiver:
    def refuse(what: str) -> InvalidFormatError:
        return InvalidFormatError(f"read waivers {path}: waiver {number}: {what}")

    if not isinstance(entry, dict):
        raise refuse(f"got {entry!r}, expected a table")
    if unknown := sorted(set(entry) - _FIELDS):
        raise refuse(f"{unknown[0]}: unknown field, expected one of {', '.join(sorted(_FIELDS))}")
    for name in ("operation", "dtype", "reason"):
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            raise refuse(f"{name}: got {entry.get(name)!r}, expected a text")
    if entry["operation"] not in {one.name for one in EVERY}:
        raise refuse(f"operation: there is no {entry['operation']!r}")
    if entry["dtype"] not in (*STORAGES, "*"):
        raise refuse(f"dtype: got {entry['dtype']!r}, expected one of {', '.join(STORAGES)} or *")
    expires = entry.get("expires")
    if not isinstance(expires, datetime.date) or isinstance(expires, datetime.datetime):
        raise refuse(f"expires: got {expires!r}, expected a date such as 2027-01-31")
    if not isinstance(entry.get("probe", ""), str):
        raise refuse(f"probe: got {entry['probe']!r}, expected a text")
    probe, at_most = entry.get("probe", ""), entry.get("at_most", math.inf)
    if not any(probe in case.label for case in operation_named(entry["operation"]).cases):
        raise refuse(f"probe: no case of {entry['operation']} has {probe!r} in its label")
    if isinstance(at_most, bool) or not isinstance(at_most, (int, float)) or not at_most > 1:
        raise refuse(f"at_most: got {at_most!r}, expected an err/bound above 1")
    return Waiver(entry["operation"], entry["dtype"], entry["reason"], expires, probe, float(at_most))


def waived(results: Iterable[CaseResult], waivers: Sequence[Waiver], today: datetime.date) -> Iterator[CaseResult]:
    """The results with covered failures waived.  [PA-WAIVER-2..4]

    A waiver covers through its last day; later its cases fail and say so. A waiver whose cases all passed has outlived
    its reason: the last of them comes out as a failure. So does a failure that is worse than the waiver says.
    """
    seen: dict[Waiver, list[CaseResult]] = {}
    held: dict[Waiver, CaseResult] = {}
    for result in results:
        waiver = next((one for one in waivers if one.covers(result)), None)
        if waiver is None or result.status not in (FAILED, PASSED):
            yield result
            continue
        seen.setdefault(waiver, []).append(result)
        if result.status == PASSED:
            if waiver in held:
                yield held[waiver]
            held[waiver] = result  # told last: it may have to fail
        elif today > waiver.expires:
            yield replace(result, message=f"{result.message}; its waiver expired on {waiver.expires} ({waiver.reason})")
        elif not waiver.bears(result):
            message = f"{result.message}; its waiver is for err/bound up to {waiver.at_most:g} ({waiver.reason})"
            yield replace(result, message=message)
        else:
            yield replace(result, status=WAIVED, message=f"waived until {waiver.expires}: {waiver.reason}")
    for waiver, last in held.items():
        if any(result.status == FAILED for result in seen[waiver]):
            yield last
        else:
            message = (
                f"all {len(seen[waiver])} cases pass, but {waiver.where} is waived ({waiver.reason}); remove the waiver"
            )
            yield replace(last, status=FAILED, message=message)
