"""`ferrum-ref parallel`: a model over several ranks, from the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from ferrum_ref import parallel_run
from ferrum_ref.cli import parallel
from ferrum_ref.errors import InternalError, InvalidParameterError, RequestValidationError
from ferrum_ref.parallel.in_process import run_ranks
from ferrum_ref.parallel_run import Job, JobResult


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    parallel.add_parser(parser.add_subparsers())
    args = parser.parse_args(["parallel", *arguments])
    return int(args.func(args))


def in_threads(jobs: Sequence[Job], num_ranks: int, **_: Any) -> list[list[JobResult]]:
    """In place of processes."""
    return run_ranks(num_ranks, lambda world: [parallel_run.run_job(job, world) for job in jobs])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=39,
    )
    path = tmp_path_factory.mktemp("parallel") / "tiny"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.clause("TP-CLI-1", "TP-CLI-2")
def test_tokens_weights_and_the_check(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_run, "run_jobs", in_threads)
    own = transformers.LlamaForCausalLM.from_pretrained(model)
    expected = own.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    with torch.no_grad():
        narrow = own(torch.tensor([[5, 6, 7]])).logits
        floor = float((own.double()(torch.tensor([[5, 6, 7]])).logits - narrow).abs().max())
    capsys.readouterr()
    options = ("--token-ids", "5,6,7", "--tensor-parallel", "2", "--pipeline-parallel", "2", "--max-tokens", "6")
    assert run(str(model), *options) == 0
    shown = capsys.readouterr()
    assert shown.out == ",".join(str(token) for token in expected if token != 39) + "\n"
    assert [line[:7] for line in shown.err.splitlines()] == [f"rank {rank}:" for rank in range(4)]
    assert run(str(model), *options, "--check", "--json") == 0
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert answer["token_ids"] == expected
    assert answer["num_ranks"] == len(answer["weight_bytes"]) == 4
    assert answer["same_tokens"] is True
    assert answer["largest_difference"] <= 2 * 4 * floor
    assert 0 < answer["largest_logit"] == pytest.approx(float(narrow.abs().max()))
    assert "the tokens are the same" in shown.err


@pytest.mark.clause("TP-CLI-2")
def test_ranks_that_disagree_are_a_failure(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disagreeing(jobs: Sequence[Job], num_ranks: int, **_: Any) -> list[list[JobResult]]:
        logits = [np.zeros((1, 40), np.float32), np.full((1, 40), 1e-7, np.float32)]
        return [[JobResult(each, [4], 1000)] for each in logits]

    monkeypatch.setattr(parallel_run, "run_jobs", disagreeing)
    with pytest.raises(InternalError, match="rank 1 has other logits than rank 0"):
        run(str(model), "--token-ids", "5", "--tensor-parallel", "2")


@pytest.mark.clause("TP-CLI-1")
@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (("--tensor-parallel", "3"), InvalidParameterError, "got 3 for 4 query heads, expected a divisor of 4"),
        (("--tensor-parallel", "0"), InvalidParameterError, "--tensor-parallel: got 0, expected at least 1"),
        (("--pipeline-parallel", "-1"), InvalidParameterError, "--pipeline-parallel: got -1, expected at least 1"),
        (("--pipeline-parallel", "3"), InvalidParameterError, "got 3 for 2 layers, expected 1 to 2"),
        (("--token-ids", "1,40"), RequestValidationError, r"must be in \[0, 40\)"),
        (("--token-ids", "1,x"), RequestValidationError, "expected numbers with commas"),
    ],
)
def test_bad_numbers_before_a_process_starts(
    options: tuple[str, ...], kind: type[Exception], message: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(parallel_run, "run_processes", never)
    arguments = options if "--token-ids" in options else (*options, "--token-ids", "1,2")
    with pytest.raises(kind, match=message):
        run(str(model), *arguments)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.clause("TP-CLI-1", "TP-CLI-2")
def test_a_real_model_over_three_processes(smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(smollm2_path), "The sky is", "--tensor-parallel", "3", "--max-tokens", "4", "--check", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["same_tokens"] is True
    assert answer["largest_difference"] < 2 * 4 * 1.5e-4  # twice the bound on this model: 4 times transformers' error
    assert max(answer["weight_bytes"]) < 0.4 * 134.5e6 * 4
