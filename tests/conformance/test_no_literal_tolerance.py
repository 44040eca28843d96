"""Nobody types a tolerance into the package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

NAMES = {"atol", "rtol", "tol", "tolerance", "abs_tol", "rel_tol", "allclose", "isclose", "assert_allclose"}


def names_in(source: str) -> set[str]:
    """Every keyword, parameter, variable, attribute and imported name of a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword | ast.arg) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found.add(node.name.rpartition(".")[2])
    return found


@pytest.mark.clause("PA-GUARD-1")
def test_no_literal_tolerance_stands_in_the_package(repository: Path) -> None:
    files = [path for folder in ("ferrum_ref", "backends") for path in (repository / folder).rglob("*.py")]
    assert len(files) > 50
    guilty = {str(path): names_in(path.read_text(encoding="utf-8")) & NAMES for path in files}
    assert not {path: names for path, names in guilty.items() if names}


@pytest.mark.clause("PA-GUARD-1")
def test_the_search_would_find_one() -> None:
    assert names_in("np.allclose(a, b, atol=1e-3)") & NAMES == {"allclose", "atol"}
