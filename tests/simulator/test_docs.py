"""The how-to page's commands, run again and compared with the output it shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from ferrum_sim.cli.main import main

PAGE = Path("docs") / "simulator.md"
BLOCK = re.compile(r"```console\n\$ ferrum-sim (.*?)\n(.*?)```", re.DOTALL)


def check(capsys: pytest.CaptureFixture[str], repository: Path, wants_trace: bool) -> None:
    blocks = BLOCK.findall((repository / PAGE).read_text(encoding="utf-8"))
    wanted = [(command, shown) for command, shown in blocks if ("--trace" in command) == wants_trace]
    assert wanted
    for command, shown in wanted:
        assert main([*shlex.split(command), "--quiet"]) == 0
        printed = "".join(f"{line.rstrip()}\n" for line in capsys.readouterr().out.splitlines())
        assert printed == shown, command


@pytest.mark.clause("SI-REPORT-1", "SI-REPORT-2")
def test_the_page_shows_what_its_commands_print(capsys: pytest.CaptureFixture[str], repository: Path) -> None:
    check(capsys, repository, wants_trace=False)


@pytest.mark.slow
@pytest.mark.clause("SI-REPORT-1")
def test_the_page_shows_what_its_trace_prints(
    capsys: pytest.CaptureFixture[str], repository: Path, trace_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trace_data)
    check(capsys, repository, wants_trace=True)
