"""The folder of the subjects is on the Python path, here and in the processes that are started."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def subjects(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `subjects_for_tests`."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("subjects_for_tests")
