"""Per-request figures as arrays in arrival order.  [SI-METRIC-2]"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferrum_sim.metrics.records import RequestRecord

FLOAT_COLUMNS = ("noticed_s", "first_scheduled_s", "first_token_s", "last_token_s", "finish_s", "max_itl_s")
COUNT_COLUMNS = ("num_generated_tokens", "num_preemptions", "num_cached_prompt_tokens")


def request_columns(records: tuple[RequestRecord, ...]) -> dict[str, NDArray[Any]]:
    """One array a column, one entry a request, in arrival order; NaN where a figure does not exist. Pure.

    queue_time_s = first_scheduled_s - arrival_s          ttft_s = first_token_s - arrival_s
    tpot_s = (last_token_s - first_token_s) / (n - 1)     e2e_s = finish_s - arrival_s       n generated tokens, n > 1
    """
    columns: dict[str, NDArray[Any]] = {
        "index": np.asarray([record.request.index for record in records], dtype=np.int64),
        "arrival_s": np.asarray([record.request.arrival_s for record in records], dtype=np.float64),
        "num_prompt_tokens": np.asarray([record.request.num_prompt_tokens for record in records], dtype=np.int64),
        "num_output_tokens": np.asarray([record.request.num_output_tokens for record in records], dtype=np.int64),
        "priority": np.asarray([record.request.priority for record in records], dtype=np.str_),
        "status": np.asarray([record.status for record in records], dtype=np.str_),
        "finish_reason": np.asarray([record.finish_reason for record in records], dtype=np.str_),
    }
    for name in FLOAT_COLUMNS:
        columns[name] = np.asarray([getattr(record, name) for record in records], dtype=np.float64)
    for name in COUNT_COLUMNS:
        columns[name] = np.asarray([getattr(record, name) for record in records], dtype=np.int64)
    columns["queue_time_s"] = columns["first_scheduled_s"] - columns["arrival_s"]
    columns["ttft_s"] = columns["first_token_s"] - columns["arrival_s"]
    columns["e2e_s"] = columns["finish_s"] - columns["arrival_s"]
    num_gaps = columns["num_generated_tokens"] - 1
    decode_s = columns["last_token_s"] - columns["first_token_s"]
    columns["tpot_s"] = np.where(num_gaps > 0, decode_s / np.maximum(num_gaps, 1), np.nan)
    return columns
