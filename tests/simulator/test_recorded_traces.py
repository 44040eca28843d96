"""The recorded traces through the whole simulator."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from ferrum_sim.cli.main import main


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["run", "--json", "--quiet", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.clause("SI-RUN-2", "SI-TRACE-1")
def test_the_head_of_the_azure_trace_is_served_alike_in_both_modes(
    capsys: pytest.CaptureFixture[str], trace_data: Path
) -> None:
    words = ("--trace", str(trace_data / "azure_llm_2023_conv.csv"), "--limit", "400", "--rate-scale", "3")
    stretched = run(capsys, *words)
    assert stretched == run(capsys, *words, "--step-by-step")
    summary = json.loads(stretched)
    assert summary["requests"]["finished"] == 400
    assert summary["littles_law"]["relative_gap"] < 1e-12


@pytest.mark.clause("SI-TRACE-2", "SI-METRIC-4")
def test_the_prefix_sharing_of_the_mooncake_trace_is_found(
    capsys: pytest.CaptureFixture[str], trace_data: Path
) -> None:
    """With a pool that forgets nothing, hits are the blocks whose whole prefix of hash ids was seen before."""
    path = trace_data / "mooncake_conversation.jsonl"
    limit = 150
    seen: set[tuple[int, ...]] = set()
    num_hit_tokens = num_prompt_tokens = 0
    for line in path.read_text().splitlines()[:limit]:
        record = json.loads(line)
        hashes, prompt = record["hash_ids"], record["input_length"]
        num_prompt_tokens += prompt
        prefixes = [tuple(hashes[: count + 1]) for count in range(prompt // 512)]
        num_hits = sum(prefix in seen for prefix in prefixes)
        num_hit_tokens += min(512 * num_hits, (prompt - 1) // 512 * 512)
        seen.update(prefixes)
    summary = json.loads(
        run(
            capsys, "--trace", str(path), "--limit", str(limit), "--model", "llama-3.1-8b", "--num-blocks", "6000",
            "--block-size", "512", "--rate-scale", "0.01",
        )
    )  # fmt: skip
    assert summary["requests"]["finished"] == limit
    assert summary["kv_cache"]["prefix_hit_rate"] == num_hit_tokens / num_prompt_tokens


@pytest.mark.slow
@pytest.mark.clause("SI-RUN-6")
def test_the_whole_azure_trace_takes_less_than_a_minute(capsys: pytest.CaptureFixture[str], trace_data: Path) -> None:
    """Processor time, so that a busy neighbour does not count; on an idle core it is the time on the clock."""
    started_s = time.process_time()
    out = run(capsys, "--trace", str(trace_data / "azure_llm_2023_conv.csv"), "--model", "llama-3-8b")
    elapsed_s = time.process_time() - started_s
    summary = json.loads(out)
    assert summary["requests"] == {
        "submitted": 19366, "finished": 19366, "rejected": 0, "unfinished": 0, "preempted": 0, "preemptions": 0,
    }  # fmt: skip
    assert summary["latency"]["ttft_s"]["p99"] < 0.5
    assert elapsed_s < 60.0
