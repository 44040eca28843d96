"""Shared fixtures: the real model, single-threaded BLAS, and repeatable hypothesis runs."""

from __future__ import annotations

import os
from pathlib import Path

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before numpy is imported
    os.environ.setdefault(_name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests build their checkpoints; none is fetched by transformers

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("default")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real SmolLM2-135M-Instruct GGUF; fetched into the user's cache on first use."""
    import argparse

    from ferrum_ref.cli.cache import cache_dir
    from ferrum_ref.models.source import pull_model

    return pull_model("smollm2-135m", cache_dir(argparse.Namespace(cache_dir=None)))


@pytest.fixture(scope="session")
def trace_data(repository: Path) -> Path:
    """The folder of recorded traces beside the checkout; skips, saying so, where it is absent."""
    folder = repository.parent / "shared" / "data" / "traces"
    if not folder.is_dir():
        pytest.skip(f"no recorded traces at ../shared/data/traces beside {repository.name}")
    return folder
