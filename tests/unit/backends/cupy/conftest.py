"""The CuPy backend on the host: numpy arrays, its own CUDA C compiled by g++."""

from __future__ import annotations

import shutil
from typing import Any

import pytest


@pytest.fixture(scope="session")
def host() -> Any:
    """A backend; skipped where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here to compile the kernels for the host")
    from ferrum_cupy.host import make_backend

    return make_backend()
