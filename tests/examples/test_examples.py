"""Each example program, run as a user would run it and compared with the output that the README shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SHOWN = re.compile(r"```console\n\$ python (examples/\w+\.py)\n(.*?)```", re.DOTALL)


@pytest.mark.model
@pytest.mark.parametrize("name", ["examples/next_token.py", "examples/three_requests.py"])
def test_an_example_prints_what_the_readme_shows(name: str, repository: Path, smollm2_path: Path) -> None:
    shown = dict(SHOWN.findall((repository / "README.md").read_text("utf-8")))
    done = subprocess.run([sys.executable, name], cwd=repository, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == shown[name]
