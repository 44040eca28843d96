"""The command line: results on stdout, one line on stderr for every fault, equal bytes for equal seeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ferrum_sim.cli import main as cli_main
from ferrum_sim.cli.main import main

import ferrum_ref
from ferrum_ref.errors import InternalError

SMALL = ["--limit", "40"]
COMMAND = [sys.executable, "-m", "ferrum_sim.cli.main"]


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        code = main(list(words))
    except SystemExit as error:
        code = int(error.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.clause("SI-CLI-1")
def test_version_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version") == (0, f"ferrum-sim {ferrum_ref.__version__}\n", "")
    code, out, _ = call(capsys, "list")
    assert code == 0
    assert "llama-3-8b" in out
    assert "h100" in out
    sheets = json.loads(call(capsys, "list", "--json")[1])
    assert {sheet["name"] for sheet in sheets["hardware"]} >= {"a100-80g", "h100", "h200", "rtx4090"}


@pytest.mark.clause("SI-CLI-1", "SI-REPORT-1")
def test_run_prints_tables_that_say_what_the_json_says(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("run", *SMALL, "--slo-ttft-ms", "100", "--num-blocks", "2000")
    code, out, err = call(capsys, *words, "--check")
    summary = json.loads(call(capsys, *words, "--json")[1])
    assert code == 0
    assert "simulated" in err
    for figure in (
        "time to first token (TTFT)",
        f"{summary['latency']['ttft_s']['max'] * 1e3:.3g} ms",
        "40 submitted, 40 finished",
        f"{100 * summary['goodput']['fraction_of_submitted']:.1f} %",
        f"{summary['kv_cache']['num_blocks']:,} blocks of 16 tokens",
    ):
        assert figure in out
    assert call(capsys, "run", *SMALL, "--quiet")[2] == ""


@pytest.mark.clause("SI-CLI-1", "SI-RUN-2")
def test_step_by_step_prints_the_same_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("run", *SMALL, "--num-blocks", "300", "--json")
    assert call(capsys, *words)[1] == call(capsys, *words, "--step-by-step")[1]


@pytest.mark.clause("SI-REPORT-2")
def test_equal_seeds_give_equal_files_in_every_process(tmp_path: Path) -> None:
    outputs = []
    for folder, hash_seed in (("one", "0"), ("two", "4711")):
        words = ["run", *SMALL, "--arrivals", "gamma:9,2", "--seed", "5", "--num-blocks", "500", "--json", "--out"]
        run = subprocess.run(
            [*COMMAND, *words, str(tmp_path / folder)],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        )
        files = [(tmp_path / folder / name).read_bytes() for name in ("requests.parquet", "timeline.parquet")]
        outputs.append([run.stdout, (tmp_path / folder / "summary.json").read_bytes(), *files])
    assert outputs[0] == outputs[1]
    assert outputs[0][0] == outputs[0][1]
    assert str(tmp_path).encode() not in outputs[0][0]
    summary = json.loads(outputs[0][0])
    requests = pq.read_table(tmp_path / "one" / "requests.parquet")
    timeline = pq.read_table(tmp_path / "one" / "timeline.parquet")
    assert requests.num_rows == 40
    assert timeline.num_rows == summary["engine"]["num_steps"]
    assert max(requests["ttft_s"].to_pylist()) == summary["latency"]["ttft_s"]["max"]


@pytest.mark.clause("SI-REPORT-2")
def test_another_seed_gives_another_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("run", *SMALL, "--json", "--quiet", "--seed")
    assert call(capsys, *words, "1")[1] != call(capsys, *words, "2")[1]


@pytest.mark.clause("SI-CLI-2")
def test_compare_says_which_differences_are_real(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("compare", "--vary", "max-num-batched-tokens=256,2048", "--limit", "300", "--quiet")
    code, out, err = call(capsys, *words)
    assert (code, err) == (0, "")
    assert "max-num-batched-tokens" in out
    assert "real" in out
    result = json.loads(call(capsys, *words, "--json")[1])
    assert result["baseline"] == "256"
    verdicts = {row["metric"]: row for row in result["differences"]}
    assert verdicts["ttft_s"]["verdict"] == "really lower"
    assert verdicts["ttft_s"]["mean_difference"] + verdicts["ttft_s"]["half_width"] < 0
    assert [run["limits"]["max_num_batched_tokens"] for run in result["runs"]] == [256, 2048]


@pytest.mark.clause("SI-CLI-2")
def test_compare_varies_every_option_it_offers(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = {
        "policy": "fcfs,priority",
        "prefix-caching": "on,off",
        "hardware": "h100,a100-80g",
        "model": "llama-3-8b,qwen2.5-7b",
        "tensor-parallel": "1,2",
        "rate-scale": "1,0.5",
        "host-overhead-ms": "0,5",
        "num-blocks": "900,2000,4000",
    }
    for option, values in pairs.items():
        words = ("compare", "--vary", f"{option}={values}", "--limit", "5", "--json", "--quiet")
        code, out, err = call(capsys, *words)
        assert (code, err) == (0, ""), option
        assert json.loads(out)["values"] == values.split(",")


@pytest.mark.clause("SI-CLI-2")
def test_compare_of_runs_that_finish_nothing_in_common(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("compare", "--vary", "num-blocks=4,2000", "--limit", "5", "--quiet")
    code, out, err = call(capsys, *words)
    assert (code, err) == (0, "")
    assert "- (too few pairs)" in out
    assert "nan" not in out
    rows = json.loads(call(capsys, *words, "--json")[1])["differences"]
    assert {(row["num_pairs"], row["mean_difference"], row["verdict"]) for row in rows} == {
        (0, None, "not distinguishable")
    }


def prepared(folder: Path) -> dict[str, str]:
    """Files that the bad calls below name."""
    (folder / "bad.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 00:00:00,1,1\nnonsense,1,1\n")
    (folder / "config.json").write_text('{"hidden_size": 0}')
    (folder / "file").write_text("")
    return {name: str(folder / name) for name in ("bad.csv", "config.json", "file")}


BAD_CALLS: list[tuple[list[str], str]] = [
    ([], "COMMAND"),
    (["walk"], "invalid choice"),
    (["run", "--frobnicate"], "unrecognized"),
    (["run", "--model", "gpt-9"], "gpt-9"),
    (["run", "--model", "{config.json}"], "hidden_size is 0"),
    (["run", "--hardware", "abacus"], "abacus"),
    (["run", "--trace", "nowhere.csv"], "nowhere.csv"),
    (["run", "--trace", "{bad.csv}"], "line 3"),
    (["run", "--trace", "{bad.csv}", "--arrivals", "poisson:1"], "not allowed"),
    (["run", "--trace", "{bad.csv}", "--num-requests", "3"], "num_requests"),
    (["run", "--trace", "{file}"], "expected .csv"),
    (["run", "--arrivals", "poisson:0"], "rate > 0"),
    (["run", "--arrivals", "poisson:1", "--output-tokens", "fixed:0"], "fixed:0"),
    (["run", "--arrivals", "poisson:1", "--prompt-tokens", "empirical:nowhere.csv"], "nowhere.csv"),
    (["run", "--prompt-tokens", "fixed:3"], "prompt_tokens"),
    (["run", "--limit", "0"], "--limit"),
    (["run", "--seed", "-1"], "--seed"),
    (["run", "--rate-scale", "nan"], "--rate-scale"),
    (["run", "--rate-scale", "1e-320"], "finite"),
    (["run", "--block-size", "10000000", "--num-blocks", "4"], "at most"),
    (["run", "--model", "llama-3-70b"], "tensor-parallel"),
    (["run", "--tensor-parallel", "7"], "divisor"),
    (["run", "--compute-efficiency", "1.5"], "compute_efficiency"),
    (["run", "--high-priority-fraction", "2"], "high_priority_fraction"),
    (["run", "--policy", "lifo"], "lifo"),
    (["run", *SMALL, "--out", "{file}/below"], "below"),
    (["compare"], "--vary"),
    (["compare", "--vary", "seed=1,2"], "OPTION=V1,V2"),
    (["compare", "--vary", "max-num-seqs=4"], "OPTION=V1,V2"),
    (["compare", "--vary", "max-num-seqs=4,4"], "OPTION=V1,V2"),
    (["compare", "--vary", "max-num-seqs=4,few"], "few"),
    (["compare", "--vary", "prefix-caching=on,perhaps"], "perhaps"),
]


@pytest.mark.clause("SI-CLI-3")
@pytest.mark.parametrize(("words", "message"), BAD_CALLS, ids=[" ".join(words) or "nothing" for words, _ in BAD_CALLS])
def test_bad_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], message: str
) -> None:
    files = prepared(tmp_path)
    for name, path in files.items():
        words = [word.replace("{" + name + "}", path) for word in words]
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("ferrum-sim")
    assert err.count("\n") == 1


@pytest.mark.clause("SI-CLI-3")
@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt(), 130), (InternalError("a block was lost"), 1)])
def test_interruption_and_broken_invariants_have_their_own_codes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int
) -> None:
    def fail(_: Any) -> int:
        raise raised

    monkeypatch.setattr(cli_main.list, "run", fail)
    got, out, err = call(capsys, "list")
    assert (got, out, err.count("\n")) == (code, "", 1)


@pytest.mark.clause("SI-CLI-3")
def test_a_reader_that_goes_away_is_no_failure() -> None:
    process = subprocess.Popen([*COMMAND, "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


@pytest.mark.clause("SI-CLI-3")
def test_missing_packages_are_named_with_their_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = call(capsys, "run", *SMALL, "--out", str(tmp_path), "--quiet")
    assert code == 2
    assert "pip install 'ferrum-ref[sim]'" in err
    monkeypatch.delitem(sys.modules, "ferrum_sim.simulation")
    monkeypatch.setitem(sys.modules, "simpy", None)
    code, _, err = call(capsys, "run", *SMALL)
    assert code == 2
    assert "simpy" in err
    assert "pip install 'ferrum-ref[sim]'" in err
