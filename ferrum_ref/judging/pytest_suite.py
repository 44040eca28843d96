"""Options and fixtures of `pytest --pyargs ferrum_ref.parity`.  Clauses: PA-PYTEST-1..2 (specs/judging.md)."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ferrum_ref.judging.isolated import Isolated
from ferrum_ref.judging.subject import open_subject
from ferrum_ref.judging.waivers import Waiver, read_waivers
from ferrum_ref.parity.ops.catalogue import EVERY, operation_named
from ferrum_ref.parity.units import STORAGES, storage_named


def pytest_addoption(parser: pytest.Parser) -> None:
    """Whom to judge, and how much of it."""
    group = parser.getgroup("ferrum-ref parity")
    group.addoption("--backend", metavar="NAME", help="a backend's name, or package.module:attribute")
    group.addoption("--device", default="cpu", metavar="DEVICE", help="cpu (default), cuda:0, ...")
    group.addoption("--op", action="append", default=[], metavar="NAME", help="this operation; may be repeated")
    group.addoption("--dtype", action="append", default=[], metavar="TYPE", help="fp32, fp16, bf16; repeatable")
    group.addoption("--seeds", type=int, default=1, metavar="K", help="number of seeds (default 1)")
    group.addoption("--small", action="store_true", help="leave out the cases that cost more than milliseconds")
    group.addoption("--time-limit", type=float, default=60.0, metavar="SECONDS", help="of one case (default 60)")
    group.addoption("--waivers", type=Path, metavar="FILE", help="known failures, in TOML")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each operation and element type."""
    if "cell" not in metafunc.fixturenames:
        return
    options = metafunc.config.option
    operations = [operation_named(name) for name in options.op] or list(EVERY)
    storages = [storage_named(name) for name in options.dtype] or list(STORAGES.values())
    cells = [(operation.name, storage.name) for operation in operations for storage in storages]
    metafunc.parametrize("cell", cells, ids=[f"{name}-{dtype}" for name, dtype in cells])


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> Any:
    """The options; without a backend there is nothing to judge."""
    if pytestconfig.option.backend is None:
        raise pytest.UsageError("give --backend NAME, or --backend package.module:attribute")
    return pytestconfig.option


@pytest.fixture(scope="session")
def judged(settings: Any) -> Iterator[Isolated]:
    """The backend in a process of its own."""
    with Isolated(settings.backend, settings.device, open_subject, settings.time_limit) as isolated:
        yield isolated


@pytest.fixture(scope="session")
def waivers(settings: Any) -> list[Waiver]:
    """Known failures."""
    return read_waivers(settings.waivers) if settings.waivers is not None else []


@pytest.fixture(scope="session")
def today() -> datetime.date:
    """The date by which waivers expire."""
    return datetime.date.today()
