"""Azure LLM inference traces (2023, 2024): CSV with TIMESTAMP, ContextTokens, GeneratedTokens.

Source: Patel et al., "Splitwise: Efficient generative LLM inference using phase splitting", ISCA 2024.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

from ferrum_ref.errors import InvalidFormatError
from ferrum_sim.workload.lines import bad_line, numbered_lines, positive_int
from ferrum_sim.workload.request import SimRequest, Workload, order_by_arrival

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
TIMESTAMP = re.compile(r"(\d{4}-\d{2}-\d{2} \d{2}:\d{2}:\d{2})(?:\.(\d{1,9}))?(?:([+-])(\d{2}):(\d{2}))?")
EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 -- the offset, where present, is applied by hand
NANOSECONDS = 10**9


def read_azure(path: Path, limit: int | None = None) -> Workload:
    """The requests of an Azure trace; arrival_s counts from the earliest timestamp read.  [SI-TRACE-1, SI-TRACE-4]

    `limit`: read only the first `limit` lines. Columns may stand in any order and there may be others. Every prompt
    has token ids of its own (the trace says nothing of contents), so no two share a prefix.
    Raises FerrumIOError (cannot read), InvalidFormatError (missing column, malformed line, no request).
    """
    rows = csv.reader(text for _, text in _significant(path))
    columns = _columns(path, next(rows, []))
    stamps_ns: list[int] = []
    lengths: list[tuple[int, int]] = []
    for line_number, row in zip(_line_numbers(path), rows, strict=False):
        if limit is not None and len(lengths) >= limit:
            break
        if len(row) <= max(columns):
            raise bad_line(path, line_number, f"{len(row)} fields", f"at least {max(columns) + 1}")
        stamps_ns.append(_nanoseconds(path, line_number, row[columns[0]]))
        lengths.append((
            positive_int(path, line_number, "ContextTokens", row[columns[1]]),
            positive_int(path, line_number, "GeneratedTokens", row[columns[2]]),
        ))
    if not lengths:
        raise InvalidFormatError(f"read_azure: {path} holds no request; expected lines under the header")
    return _workload(path, stamps_ns, lengths)
