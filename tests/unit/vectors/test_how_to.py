"""docs/golden-vectors.md shows what the commands print, and what the manifest says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from ferrum_ref.cli.main import main
from ferrum_ref.vectors.schema import Manifest

SHOWN = re.compile(r"```console\n\$ ferrum-ref (vectors list [^\n]*)\n(.*?)```", re.DOTALL)
LINE = re.compile(r"```json\n(.*?)```", re.DOTALL)


@pytest.mark.clause("GV-CHECK-7")
def test_the_page_shows_what_the_list_prints(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repository)
    ((command, output),) = SHOWN.findall((repository / "docs" / "golden-vectors.md").read_text("utf-8"))
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out == output


@pytest.mark.clause("GV-FORMAT-1")
def test_the_page_shows_a_line_of_the_manifest(repository: Path, manifest: Manifest) -> None:
    (shown,) = LINE.findall((repository / "docs" / "golden-vectors.md").read_text("utf-8"))
    document = json.loads((repository / "specs" / "vectors" / "manifest.json").read_text("ascii"))
    assert json.loads(shown) in document["vectors"]
