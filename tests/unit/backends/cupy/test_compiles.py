"""Every CUDA source through NVRTC, for two generations of GPUs: no GPU is needed for that."""

from __future__ import annotations

import re
from typing import Any

import pytest
from ferrum_cupy.host.machine import kernels_in
from ferrum_cupy.machine import SOURCES, source_of

NAMES = sorted(path.stem for path in SOURCES.glob("*.cu"))


def ptx(name: str, capability: int, **defines: int) -> str:
    nvrtc: Any = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", exc_type=ImportError)
    options = ("-std=c++17", f"--gpu-architecture=compute_{capability}", *(f"-D{k}={v}" for k, v in defines.items()))
    program = nvrtc.createProgram(source_of(name), f"{name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    text = nvrtc.getPTX(program)
    return text.decode() if isinstance(text, bytes) else str(text)


@pytest.mark.clause("BK-CUPY-16")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("storage", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_it_compiles(name: str, storage: int, capability: int) -> None:
    text = ptx(name, capability, STORAGE=storage, HEAD_DIM=128)
    assert f".target sm_{capability}" in text
    assert set(re.findall(r"\.visible \.entry (\w+)\(", text)) == set(kernels_in(source_of(name)))


@pytest.mark.clause("BK-CUPY-16")
@pytest.mark.parametrize("head_dim", [16, 80, 120, 256])
def test_other_head_sizes(head_dim: int) -> None:
    assert "shfl.sync.bfly" in ptx("attention", 90, STORAGE=2, HEAD_DIM=head_dim)


@pytest.mark.clause("BK-CUPY-8")
def test_sixteen_bytes_move_in_one_instruction() -> None:
    for name in ("norms", "pointwise", "attention"):
        assert re.search(
            r"ld\.global(\.nc)?(\.[\w:]+)*\.v4\.u?[bfu]?32|ld\.global\.v4", ptx(name, 90, STORAGE=2, HEAD_DIM=128)
        )
