"""`ferrum-ref backends`: the table, the JSON, and what a missing torch looks like to a user."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser, Namespace

import pytest

from ferrum_ref import plugins
from ferrum_ref.cli import backends
from ferrum_ref.plugins import BackendInfo

INFOS = {
    "numpy": BackendInfo("numpy", "ferrum_ref.numpy_backend:make_backend", True, "", "0.1.0", ("cpu",)),
    "torch": BackendInfo("torch", "ferrum_torch:make_backend", False, "torch is absent;\n install it", "", ()),
    "zig": BackendInfo("zig", "ferrum_zig:make", True, "", "12", ("cpu", "cuda:0")),
}

# Runs `ferrum-ref` in an interpreter in which every import of torch fails as if it were not installed.
WITHOUT_TORCH = """
import importlib.abc, sys

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, Hide())
"""


def without_torch(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WITHOUT_TORCH + program], capture_output=True, text=True, check=False)


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "available_backends", lambda: INFOS)


@pytest.mark.clause("BK-PLUGIN-8")
@pytest.mark.usefixtures("listed")
def test_the_table_has_a_line_for_each_backend_and_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert backends.run(Namespace(json=False)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "backend  available  version  devices",
        "numpy    yes        0.1.0    cpu",
        "torch    no         -        -",
        "    torch is absent; install it",
        "zig      yes        12       cpu, cuda:0",
    ]


@pytest.mark.clause("BK-PLUGIN-8")
@pytest.mark.usefixtures("listed")
def test_json_holds_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert backends.run(Namespace(json=True)) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["numpy", "torch", "zig"]
    assert rows[2]["devices"] == ["cpu", "cuda:0"]
    assert set(rows[0]) == {"name", "target", "available", "reason", "version", "devices"}


@pytest.mark.clause("BK-PLUGIN-8")
def test_nothing_registered_still_says_something() -> None:
    assert backends.table([]) == ["no backend is registered; reinstall ferrum-ref"]


@pytest.mark.clause("BK-PLUGIN-8")
def test_the_parser_knows_the_command() -> None:
    parser = ArgumentParser()
    backends.add_parser(parser.add_subparsers())
    args = parser.parse_args(["backends", "--json"])
    assert args.func is backends.run
    assert args.json


@pytest.mark.clause("BK-PLUGIN-8", "BK-PLUGIN-6")
def test_without_torch_the_list_says_how_to_get_it() -> None:
    done = without_torch(
        "from argparse import Namespace\nfrom ferrum_ref.cli import backends\n"
        "sys.exit(backends.run(Namespace(json=True)))"
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["numpy"]["available"]
    assert not rows["torch"]["available"]
    assert "pip install 'ferrum-ref[torch]'" in rows["torch"]["reason"]
    assert done.stderr == ""


@pytest.mark.clause("BK-PLUGIN-6", "BK-TORCH-2")
def test_without_torch_loading_is_one_clear_line() -> None:
    done = without_torch(
        "from ferrum_ref.errors import UnsupportedError\nfrom ferrum_ref.plugins import load_backend\n"
        "try:\n    load_backend('torch')\nexcept UnsupportedError as error:\n    print(error)"
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert "torch is not installed" in done.stdout
    assert "pip install 'ferrum-ref[torch]'" in done.stdout


@pytest.mark.clause("BK-PLUGIN-6", "BK-PLUGIN-8")
@pytest.mark.parametrize("command", [["generate", "smollm2-135m", "hello"], ["parity", "--in-process"]])
def test_asking_for_an_absent_torch_is_one_line_and_exit_code_2(command: list[str]) -> None:
    arguments = [*command, "--backend", "torch"]
    done = without_torch(f"from ferrum_ref.cli.main import main\nsys.exit(main({arguments!r}))")
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("ferrum-ref: error: ")
    assert "pip install 'ferrum-ref[torch]'" in line
