"""Azure LLM inference traces (2023, 2024): CSV with TIMESTAMP, ContextTokens, GeneratedTokens.

Source: Patel et al., "Splitwise: Efficient generative LLM inference using phase splitting", ISCA 2024.
"""

from __future__ import annotations

import csv
import re
from datetime import datetime
from pathlib import Path

from ferrum_ref.errors import InvalidFormatError
from ferrum_sim.workload.lines import bad_line, numbered_lines, whole_number
from ferrum_sim.workload.request import Workload, order_by_arrival, unshared_requests

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:([+-])(\d\d):(\d\d)|Z)?")
NANOSECONDS = 10**9


def read_azure(path: Path, limit: int | None = None) -> Workload:
    """The requests of an Azure trace; arrival_s counts from the earliest timestamp read.  [SI-TRACE-1, SI-TRACE-4]

    `limit`: stop after that many requests (later lines are not looked at). Columns may stand in any order, others may
    stand among them. The trace says nothing of contents: each prompt gets token ids of its own, none shares a prefix.
    Raises FerrumIOError (cannot read), InvalidFormatError (missing column, malformed line, no request).
    """
    columns: list[int] = []
    stamps_ns: list[int] = []
    lengths: list[tuple[int, int]] = []
    for line_number, text in numbered_lines(path):
        fields = next(csv.reader([text]))
        if not columns:
            columns = _columns(path, line_number, fields)
            continue
        if limit is not None and len(lengths) >= limit:
            break
        if len(fields) <= max(columns):
            raise bad_line(path, line_number, f"{len(fields)} fields", f"{max(columns) + 1} or more")
        stamp, prompt, output = (fields[column] for column in columns)
        stamps_ns.append(_nanoseconds(path, line_number, stamp))
        lengths.append(
            (
                whole_number(path, line_number, "ContextTokens", prompt, 1),
                whole_number(path, line_number, "GeneratedTokens", output, 1),
            )
        )
    if not lengths:
        raise InvalidFormatError(f"read_azure: {path} holds no request; expected a header and lines under it")
    return _workload(path, stamps_ns, lengths)


def _columns(path: Path, line_number: int, header: list[str]) -> list[int]:
    names = [name.strip() for name in header]
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise bad_line(path, line_number, f"a header without {', '.join(missing)}", f"columns {', '.join(COLUMNS)}")
    return [names.index(name) for name in COLUMNS]


def _nanoseconds(path: Path, line_number: int, text: str) -> int:
    """Nanoseconds since 1970 in UTC (times without an offset are taken as UTC): exact, unlike a float of seconds."""
    match = TIMESTAMP.fullmatch(text.strip())
    try:
        if match is None:
            raise ValueError
        whole = datetime.fromisoformat(match[1]) - datetime(1970, 1, 1)
    except ValueError:
        raise bad_line(path, line_number, f"TIMESTAMP '{text}'", "YYYY-MM-DD HH:MM:SS[.fraction][+HH:MM]") from None
    seconds = whole.days * 86400 + whole.seconds
    if match[3]:
        offset_s = int(match[4]) * 3600 + int(match[5]) * 60
        seconds -= offset_s if match[3] == "+" else -offset_s
    return seconds * NANOSECONDS + int((match[2] or "").ljust(9, "0"))


def _workload(path: Path, stamps_ns: list[int], lengths: list[tuple[int, int]]) -> Workload:
    first_ns = min(stamps_ns)
    rows = (
        ((stamp_ns - first_ns) / NANOSECONDS, prompt, output)
        for stamp_ns, (prompt, output) in zip(stamps_ns, lengths, strict=True)
    )
    ordered, num_out_of_order = order_by_arrival(unshared_requests(rows))
    notes = (f"{path.name}: {num_out_of_order} lines are earlier than the line above; sorted by time",)
    return Workload(ordered, f"{path.name}, {len(ordered)} requests", notes if num_out_of_order else ())
