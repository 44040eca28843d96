"""Ranks as processes: one that fails is named and ends the run, none is left behind."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import FerrumTimeoutError, InvalidParameterError, NetworkError, NotFoundError
from ferrum_ref.parallel.in_process import run_ranks
from ferrum_ref.parallel.processes import EXIT_LOST, run_processes
from ferrum_ref.parallel.subgroup import ALONE
from ferrum_ref.parallel_run import Job, load_collectives, main, run_job, run_jobs

FOREVER = "import time; time.sleep(600)"
GLOO_RANK = """
import os, signal, sys
import numpy as np
from ferrum_torch.collectives import make_collectives
from ferrum_ref.errors import FerrumError
rank, rendezvous, told = int(sys.argv[1]), sys.argv[2], sys.argv[3]
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the run ends when the other dies: let this one write down
with make_collectives(rank, 2, rendezvous, 60.0) as peers:
    total = peers.all_reduce_sum(np.ones(3, np.float32))
    if rank == 1:
        os._exit(9)
    try:
        peers.all_gather(total)
    except FerrumError as error:
        open(told, "w").write(f"{type(error).__name__} {error}")
        os._exit(3)
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.clause("TP-PROC-1", "TP-PROC-2")
def test_a_rank_that_fails_is_named_and_the_others_end(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    noted = f"import os; open({str(pid) + '.new'!r}, 'w').write(str(os.getpid())); "
    noted += f"os.rename({str(pid) + '.new'!r}, {str(pid)!r}); {FOREVER}"
    failing = f"import os, sys, time\nwhile not os.path.exists({str(pid)!r}): time.sleep(0.01)\n"
    failing += "sys.stderr.write('first\\nout of luck\\n\\n'); sys.exit(7)"
    start_s = time.monotonic()
    with pytest.raises(NetworkError, match="rank 1 of 2 failed with exit code 7: out of luck"):
        run_processes([python(noted), python(failing)], 60.0)
    assert time.monotonic() - start_s < 30.0
    assert not is_alive(int(pid.read_text()))


@pytest.mark.clause("TP-PROC-2")
def test_the_cause_is_named_and_not_its_consequence(tmp_path: Path) -> None:
    consequence = python(f"import sys; sys.exit({EXIT_LOST})")
    near = str(tmp_path / "near")
    waiting = f"import os, sys, time\nwhile not os.path.exists({near!r}): time.sleep(0.01)\nsys.exit({EXIT_LOST})"
    cause = f"import os, time; open({near!r}, 'w').close(); time.sleep(0.2); os.kill(os.getpid(), 9)"
    with pytest.raises(NetworkError, match="rank 1 of 2 failed with signal 9"):
        run_processes([python(waiting), python(cause)], 60.0)
    with pytest.raises(NetworkError, match=rf"rank 0 of 2 failed with exit code {EXIT_LOST}$"):
        run_processes([consequence, consequence], 60.0)


@pytest.mark.clause("TP-PROC-1", "TP-PROC-3")
def test_all_done_or_not_in_time() -> None:
    run_processes([python("pass"), python("pass")], 60.0)
    with pytest.raises(FerrumTimeoutError, match=r"ranks \[(0, )?1\] of 2 are not done after 0\.5 s"):
        run_processes([python("pass"), python(FOREVER)], 0.5)


@pytest.mark.clause("TP-GLOO-3", "TP-GLOO-4", "TP-PROC-2")
def test_a_gloo_rank_that_dies_is_an_error_elsewhere_and_no_hang(tmp_path: Path) -> None:
    told = tmp_path / "told"
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    commands = [[sys.executable, "-c", GLOO_RANK, str(rank), rendezvous, str(told)] for rank in range(2)]
    with pytest.raises(NetworkError, match="rank 1 of 2 failed with exit code 9"):
        run_processes(commands, 120.0)
    assert told.read_text().startswith("NetworkError Network error: all_gather: rank 0 of 2 lost another rank (")


@pytest.mark.clause("TP-PROC-4", "TP-RULE-6")
def test_what_cannot_lie_over_the_ranks_is_refused_before_any_process_starts(
    family_model: Callable[[str], Any],
) -> None:
    path = str(family_model("llama").path)
    cases = (
        (Job(path, [3]), 3, "got 3 for 4 query heads, expected a divisor of 4"),
        (Job(path, [3], num_shards=1), 4, "num_stages: got 4 for 3 layers, expected 1 to 3"),
        (Job(path, [3], num_shards=2), 3, "num_shards: got 2 for 3 ranks, expected a divisor"),
        (Job(path, [3], experts="halved"), 2, "experts: got 'halved', expected one of split, whole"),
    )
    for job, num_ranks, message in cases:
        with pytest.raises(InvalidParameterError, match=message):
            run_jobs([job], num_ranks, collectives="nowhere:nothing")
    with pytest.raises(InvalidParameterError, match=r"got 'gloo', expected 'package\.module:factory'"):
        load_collectives("gloo")
    for target in ("nowhere:nothing", "ferrum_ref.errors:nothing"):
        with pytest.raises(NotFoundError, match=r"nothing|nowhere"):
            load_collectives(target)


@pytest.mark.clause("TP-RUN-5", "TP-PROC-4")
def test_jobs_in_threads_and_alone_generate_the_same_tokens(family_model: Callable[[str], Any]) -> None:
    tiny = family_model("qwen3")
    job = Job(str(tiny.path), tiny.ids[:8], 5, num_shards=2)
    found = run_ranks(4, lambda world: run_job(job, world))
    alone = run_job(Job(job.model, job.token_ids, 5), ALONE)
    assert alone.logits.shape == (8, tiny.config.vocab_size)
    for each in found:
        assert each.tokens == alone.tokens
        assert np.abs(each.logits - alone.logits).max() <= 2 * tiny.bound
        assert each.num_weight_bytes < 0.6 * alone.num_weight_bytes
    stopped = run_job(Job(job.model, job.token_ids, 5, stop_token_ids=(alone.tokens[1],)), ALONE)
    assert stopped.tokens == alone.tokens[: alone.tokens.index(alone.tokens[1]) + 1]


@pytest.mark.clause("TP-PROC-4")
def test_a_ranks_own_process_tells_its_error_and_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = {"jobs": [], "num_ranks": 2, "collectives": "nowhere:nothing", "rendezvous": "", "timeout_s": 1.0}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert main([str(tmp_path), "0"]) == 2
    assert "collectives: 'nowhere:nothing'" in capsys.readouterr().err
    target = "ferrum_torch.collectives:make_collectives"
    late = {**plan, "collectives": target, "rendezvous": f"file://{tmp_path / 'late'}", "timeout_s": 0.3}
    (tmp_path / "plan.json").write_text(json.dumps(late))
    assert main([str(tmp_path), "0"]) == EXIT_LOST
    assert "waited 0.3 s for the others" in capsys.readouterr().err
