"""Results as files: summary.json, requests.parquet, timeline.parquet. No clock, no host, no path in any of them, so
that equal runs give equal bytes.  [SI-REPORT-2]"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ferrum_ref.errors import FerrumIOError, UnsupportedError
from ferrum_sim.metrics.records import RunRecord
from ferrum_sim.metrics.requests import request_columns


def to_json(figures: dict[str, Any]) -> str:
    """Indented JSON with a final newline; figures that do not exist are null, never NaN. Pure."""
    return json.dumps(figures, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_results(folder: Path, summary: dict[str, Any], run: RunRecord) -> list[Path]:
    """Write the three files into `folder` (made if absent, files replaced); returns their paths.

    requests.parquet: one row a request, NaN times as nulls. timeline.parquet: one row a step.
    Raises UnsupportedError without pyarrow, FerrumIOError when the folder cannot be written.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UnsupportedError(
            "write_results: Parquet needs pyarrow, which is not installed; pip install 'ferrum-ref[sim]'"
        ) from error
    requests = {name: pa.array(values, from_pandas=True) for name, values in request_columns(run.records).items()}
    steps = {name: pa.array(values) for name, values in run.steps.arrays().items()}
    paths = [folder / name for name in ("summary.json", "requests.parquet", "timeline.parquet")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(to_json(summary), encoding="utf-8")
        pq.write_table(pa.table(requests), paths[1], compression="zstd")
        pq.write_table(pa.table(steps), paths[2], compression="zstd")
    except OSError as error:
        raise FerrumIOError(
            f"write_results: {folder}: {error.strerror or error}; expected a writable folder"
        ) from error
    return paths
