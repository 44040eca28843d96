"""Makes `pytest --pyargs ferrum_ref.parity` understand `--backend` and the like; otherwise does nothing.

pytest loads this in every run where ferrum-ref is installed, so it imports nothing and adds no option unless the
judge's suite is asked for: a project's own `--backend` stays its own.  Clause: PA-PYTEST-3 (specs/judging.md).
"""

from __future__ import annotations

from typing import Any

SUITE = "ferrum_ref.parity"


def pytest_load_initial_conftests(early_config: Any, parser: Any, args: list[str]) -> None:
    """Registers the suite's options and fixtures if the arguments name the suite."""
    if any(str(argument).partition("::")[0] in (SUITE, f"{SUITE}.test_backend") for argument in args):
        from ferrum_ref.judging import pytest_suite

        early_config.pluginmanager.register(pytest_suite, "ferrum-ref parity")
