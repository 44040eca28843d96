"""This package's own tests: ferrum-ref judges the kernels, and finds the bug in the one that has it."""

from __future__ import annotations

import subprocess
import sys


def judge(attribute: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "--pyargs", "ferrum_ref.parity", "-p", "no:cacheprovider", "-q"]
    command += ["--backend", f"third_party_kernels.parity_adapter:{attribute}", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_kernels_are_right() -> None:
    done = judge("kernels", "--op", "rms_norm", "--op", "silu_mul", "--op", "linear")
    assert done.returncode == 0, done.stdout
    assert "9 passed" in done.stdout


def test_what_is_not_offered_is_told_apart() -> None:
    done = judge("kernels", "--op", "softmax", "--dtype", "fp32", "-rs")
    assert done.returncode == 0
    assert "1 skipped" in done.stdout
    assert "unsupported" in done.stdout


def test_the_bug_is_found_and_named() -> None:
    done = judge("with_a_bug", "--op", "rms_norm")
    assert done.returncode == 1
    assert "3 failed" in done.stdout
    assert "this looks like the bug 'eps outside the square root'" in done.stdout
    assert "run it again: ferrum-ref parity --backend third_party_kernels.parity_adapter:with_a_bug" in done.stdout
