"""The check on clauses itself: it must go red on each kind of loss, or it is worth nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_clauses.py"
SPEC = "**TY-A-1** First promise.\n\n**TY-A-2** Second promise.\n"
TEST = """import pytest
@pytest.mark.clause("TY-A-1", "TY-A-2")
def test_both(): ...
class TestMore:
    @pytest.mark.clause("TY-A-2")
    def test_second(self): ...
"""


def check(root: Path, *options: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, TOOL, "--root", root, *options], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "specs").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "specs" / "a.md").write_text(SPEC, "utf-8")
    (tmp_path / "tests" / "test_a.py").write_text(TEST, "utf-8")
    assert check(tmp_path, "--write") == (0, "clauses: 2 tested of 2\n")
    return tmp_path


def test_a_recorded_tree_is_green_and_the_record_leads_from_tests_to_clauses(root: Path) -> None:
    assert check(root) == (0, "clauses: 2 tested of 2\n")
    record = json.loads((root / "specs" / "tests.json").read_text("utf-8"))
    assert record == {"tests/test_a.py": {"TestMore::test_second": ["TY-A-2"], "test_both": ["TY-A-1", "TY-A-2"]}}


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        (
            "def test_second",
            "def test_renamed",
            "vanished: TY-A-2 was proven by tests/test_a.py::TestMore::test_second",
        ),
        ('@pytest.mark.clause("TY-A-2")', "", "vanished: TY-A-2 was proven by tests/test_a.py::TestMore::test_second"),
        ('"TY-A-1", "TY-A-2"', '"TY-A-2"', "untested clause: TY-A-1"),
        ('"TY-A-1", "TY-A-2"', '"TY-A-1", "TY-A-3"', "unknown clause: TY-A-3 named in tests/test_a.py::test_both"),
    ],
)
def test_any_lost_test_is_red_even_when_another_still_names_its_clause(
    root: Path, before: str, after: str, complaint: str
) -> None:
    (root / "tests" / "test_a.py").write_text(TEST.replace(before, after), "utf-8")
    code, output = check(root)
    assert code == 1
    assert complaint in output


def test_a_clause_written_twice_a_new_clause_and_a_missing_record_are_red(root: Path) -> None:
    (root / "specs" / "a.md").write_text(SPEC + "\n**TY-A-1** Again.\n\n**TY-B-1** New.\n", "utf-8")
    code, output = check(root)
    assert code == 1
    assert "clause defined twice: TY-A-1" in output
    assert "untested clause: TY-B-1" in output
    (root / "specs" / "tests.json").unlink()
    assert "specs/tests.json is missing" in check(root)[1]
