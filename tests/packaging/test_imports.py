"""Importing the library loads no framework: a user of the simulator, or of numpy alone, pays for nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

FRAMEWORKS = ("torch", "transformers", "simpy", "pyarrow", "numba", "cupy", "huggingface_hub", "scipy", "gguf")


def loaded_by(program: str) -> set[str]:
    """The top-level packages that a fresh interpreter holds after running `program`."""
    report = "\nimport json, sys\nprint(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", program + report], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.clause("BK-PLUGIN-9")
@pytest.mark.parametrize(
    "program",
    [
        "import ferrum_ref",
        "import ferrum_ref.cli.main",
        "from ferrum_ref.cli.main import build_parser; build_parser()",
        "import ferrum_ref.plugins, ferrum_ref.assembly",
        "import ferrum_ref.interfaces.engine, ferrum_ref.engine.step_loop, ferrum_ref.scheduler, ferrum_ref.kv_cache",
        "import ferrum_torch",
        "from ferrum_ref.plugins import load_backend; load_backend('numpy')",
    ],
)
def test_no_framework_is_loaded(program: str) -> None:
    loaded = loaded_by(program)
    assert "ferrum_ref" in loaded
    assert not loaded & set(FRAMEWORKS)


@pytest.mark.clause("BK-PLUGIN-9")
def test_the_command_line_needs_numpy_level_code_only() -> None:
    """Help and wrong usage answer at once: nothing that a command needs is loaded before it runs."""
    assert not loaded_by("from ferrum_ref.cli.main import build_parser; build_parser()") & {
        "rich",
        "jinja2",
        "tokenizers",
        "safetensors",
        "cattrs",
        "huggingface_hub",
    }


@pytest.mark.clause("BK-PLUGIN-9")
def test_the_probe_can_see_a_framework() -> None:
    assert "simpy" in loaded_by("import simpy")
