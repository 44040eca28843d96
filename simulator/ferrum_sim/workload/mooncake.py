"""Mooncake traces: JSON lines with timestamp (ms), input_length, output_length, hash_ids of 512-token blocks.

Source: Qin et al., "Mooncake: Trading more storage for less computation", FAST 2025, section 4 (trace release).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from ferrum_ref.errors import InvalidFormatError
from ferrum_sim.workload.lines import bad_line, numbered_lines, whole_number
from ferrum_sim.workload.request import SimRequest, Workload, order_by_arrival

FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")
TRACE_BLOCK_TOKENS = 512
LARGEST_TOKEN_ID = 2**32 - 1


def read_mooncake(path: Path, limit: int | None = None) -> Workload:
    """The requests of a Mooncake trace; arrival_s counts from the earliest timestamp read.  [SI-TRACE-2, SI-TRACE-4]

    Token t of a prompt is hash_ids[t // 512] * 512 + t % 512: two prompts agree exactly as far as their hash ids do,
    so the trace's prefix sharing is reproduced for every block size that divides 512.
    `limit`: stop after that many requests (later lines are not looked at).
    Raises FerrumIOError (cannot read), InvalidFormatError (malformed line, missing field, no request).
    """
    stamps_ms: list[float] = []
    parsed: list[tuple[int, int, tuple[tuple[int, int], ...]]] = []
    for line_number, text in numbered_lines(path):
        if limit is not None and len(parsed) >= limit:
            break
        record = _record(path, line_number, text)
        stamps_ms.append(_timestamp_ms(path, line_number, record["timestamp"]))
        prompt = whole_number(path, line_number, "input_length", record["input_length"], 1)
        output = whole_number(path, line_number, "output_length", record["output_length"], 1)
        parsed.append((prompt, output, _runs(path, line_number, record["hash_ids"], prompt)))
    if not parsed:
        raise InvalidFormatError(f"read_mooncake: {path} holds no request; expected one JSON object a line")
    first_ms = min(stamps_ms)
    ordered, num_out_of_order = order_by_arrival(
        [
            SimRequest(index, (stamp - first_ms) / 1000.0, prompt, output, runs)
            for index, (stamp, (prompt, output, runs)) in enumerate(zip(stamps_ms, parsed, strict=True))
        ]
    )
    notes = (f"{path.name}: {num_out_of_order} lines are earlier than the line above; sorted by time",)
    return Workload(ordered, f"{path.name}, {len(ordered)} requests", notes if num_out_of_order else ())


def _record(path: Path, line_number: int, text: str) -> dict[str, object]:
    try:
        record = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise bad_line(path, line_number, f"text that is not JSON ({reason})", "one JSON object") from None
    if not isinstance(record, dict):
        raise bad_line(path, line_number, type(record).__name__, "one JSON object")
    missing = [name for name in FIELDS if name not in record]
    if missing:
        raise bad_line(path, line_number, f"an object without {', '.join(missing)}", f"fields {', '.join(FIELDS)}")
    return record


def _timestamp_ms(path: Path, line_number: int, value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= float(value) < 1e15 or math.isnan(float(value)):  # type: ignore[arg-type]
        raise bad_line(path, line_number, f"timestamp {value!r}", "milliseconds, a number from 0 to 1e15")
    return float(value)  # type: ignore[arg-type]


def _runs(path: Path, line_number: int, hash_ids: object, num_tokens: int) -> tuple[tuple[int, int], ...]:
    """Runs of consecutive token ids for the prompt; the last block is cut to the prompt's length."""
    num_blocks = -(-num_tokens // TRACE_BLOCK_TOKENS)
    if not isinstance(hash_ids, list) or len(hash_ids) != num_blocks:
        got = f"{len(hash_ids)} hash_ids" if isinstance(hash_ids, list) else "hash_ids that are no list"
        raise bad_line(path, line_number, got, f"{num_blocks} of them for {num_tokens} tokens (one per 512)")
    runs = []
    for position, value in enumerate(hash_ids):
        hash_id = whole_number(path, line_number, f"hash_ids[{position}]", value, 0)
        if hash_id * TRACE_BLOCK_TOKENS > LARGEST_TOKEN_ID:
            raise bad_line(path, line_number, f"hash_ids[{position}] {hash_id}", "at most 2^23 - 1 (32-bit token ids)")
        runs.append((hash_id * TRACE_BLOCK_TOKENS, min(TRACE_BLOCK_TOKENS, num_tokens - position * TRACE_BLOCK_TOKENS)))
    return tuple(runs)
