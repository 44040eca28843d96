"""Several processes that belong together: all succeed, or the run ends with the reason of the one that did not.

Clauses: TP-PROC-1..3 (specs/parallel.md).
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from ferrum_ref.errors import FerrumTimeoutError, NetworkError

EXIT_LOST: Final = 3  # of a rank that fails because another one did
_POLL_S: Final = 0.02
_GRACE_S: Final = 2.0  # for the others, to fail by themselves, and then to end when told to


def run_processes(
    commands: Sequence[Sequence[str]], timeout_s: float, *, clock: Callable[[], float] = time.monotonic
) -> None:
    """Run one command for each rank, side by side, and wait for all.  [TP-PROC-1..3]

    None outlives the call. Raises NetworkError if one fails, with its rank, exit code or signal, and the last line it
    wrote to standard error; a rank that ended with EXIT_LOST is named only if no other failed. FerrumTimeoutError if
    they are not done in time.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        logs = [Path(folder) / f"{rank}.err" for rank in range(len(commands))]
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for command, log in zip(commands, logs, strict=True):
                with log.open("wb") as stderr:
                    ranks.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr))
            _wait(ranks, logs, timeout_s, clock)
        finally:
            _end(ranks)


def _wait(
    ranks: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path], timeout_s: float, clock: Callable[[], float]
) -> None:
    end_s = clock() + timeout_s
    while True:
        codes = [process.poll() for process in ranks]
        if any(codes):
            raise _failure(_settled(ranks, clock), logs)
        if all(code == 0 for code in codes):
            return
        if clock() > end_s:
            late = [rank for rank, code in enumerate(codes) if code is None]
            raise FerrumTimeoutError(f"parallel run: ranks {late} of {len(ranks)} are not done after {timeout_s} s")
        time.sleep(_POLL_S)


def _settled(ranks: Sequence[subprocess.Popen[bytes]], clock: Callable[[], float]) -> list[int | None]:
    """Exit codes, once one is there that is a cause and not a consequence, or after a grace."""
    end_s = clock() + _GRACE_S
    while True:
        codes = [process.poll() for process in ranks]
        if any(code not in (None, 0, EXIT_LOST) for code in codes) or None not in codes or clock() > end_s:
            return codes
        time.sleep(_POLL_S)


def _failure(codes: Sequence[int | None], logs: Sequence[Path]) -> NetworkError:
    failed = [rank for rank, code in enumerate(codes) if code]
    rank = next((each for each in failed if codes[each] != EXIT_LOST), failed[0])
    code = codes[rank] or 0
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    lines = [line for line in logs[rank].read_text("utf-8", "replace").splitlines() if line.strip()]
    said = f": {lines[-1].strip()}" if lines else ""
    return NetworkError(f"parallel run: rank {rank} of {len(codes)} failed with {how}{said}")


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    for process in ranks:
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
